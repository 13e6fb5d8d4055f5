"""Shamir's secret sharing (Shamir 1979), byte by byte over GF(2^8) with the polynomial of AES (FIPS 197, section 4).

Points and the coefficients made of them are public, so they may be branched on. Bytes of secrets and shares are only
doubled and added (exclusive or), without tables and branches: which instructions run, and on which addresses, does not
depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_POINT = 255


def split(secret: bytes, threshold: int, points: Sequence[int], randomness: bytes) -> dict[int, bytes]:
    """Shares of ``secret``, one for each point, each as long as the secret; any ``threshold`` of them give it back.

    The share at x is Σ cⱼ xʲ over j < threshold, c₀ the secret. Fewer than ``threshold`` shares are as likely for every
    other secret, if ``randomness`` is uniform and used once.

    >>> import secrets
    >>> shares = split(b"a seed", threshold=2, points=[1, 2, 3], randomness=secrets.token_bytes(6))
    >>> combine({1: shares[1], 3: shares[3]})
    b'a seed'

    Args:
        secret: at least one byte.
        threshold: from 2 to the number of points.
        points: distinct, each from 1 to 255.
        randomness: the coefficients c₁ …: exactly len(secret) × (threshold − 1) bytes.

    Raises:
        ValueError: an argument is not as described.
    """
    _check_points(points)
    if not 2 <= threshold <= len(points):
        raise ValueError("a threshold lies between 2 and the number of shares")
    if not secret or len(randomness) != len(secret) * (threshold - 1):
        raise ValueError("a shared secret has at least one byte, and threshold − 1 random bytes for each")
    coefficients = np.frombuffer(secret + randomness, np.uint8).reshape(threshold, len(secret))
    doubled = _doublings(coefficients)
    return {
        point: _combination([_product([point] * j) for j in range(threshold)], doubled).tobytes() for point in points
    }


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from exactly ``threshold`` shares by their points (Lagrange's interpolation at 0).

    Shares of different secrets, altered ones, or too few of them give other bytes, and nothing shows it: the caller
    checks the secret against its commitment.

    Raises:
        ValueError: fewer than two shares, points out of range, shares of different lengths or empty.
    """
    _check_points(list(shares))
    if len(shares) < 2 or len({len(share) for share in shares.values()}) != 1 or b"" in shares.values():
        raise ValueError("a secret is combined from two or more shares of one length")
    others = {point: [other for other in shares if other != point] for point in shares}
    weights = [_product(others[point], [other ^ point for other in others[point]]) for point in shares]
    rows = np.frombuffer(b"".join(shares.values()), np.uint8).reshape(len(shares), -1)
    return _combination(weights, _doublings(rows)).tobytes()


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(1 <= point <= MAX_POINT for point in points):
        raise ValueError(f"points of shares are distinct and from 1 to {MAX_POINT}")


def _product(factors: Iterable[int], divisors: Iterable[int] = ()) -> int:
    """The product of public field elements other than 0, divided by others."""
    return _POWERS[(sum(_LOGARITHMS[x] for x in factors) - sum(_LOGARITHMS[x] for x in divisors)) % 255]


def _powers_of_three() -> Iterator[int]:
    """3 generates the field's 255 elements other than 0; 3 a = a + 2 a (FIPS 197, section 4.2.1)."""
    element = 1
    for _ in range(255):
        yield element
        element ^= (element << 1) ^ (0x11B * (element >> 7))


_POWERS = tuple(_powers_of_three())
_LOGARITHMS = {element: exponent for exponent, element in enumerate(_POWERS)}


def _doublings(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[m, L]`` to ``[8 m, L]``: each row times 1, 2, 4 … 128."""
    found = np.empty((rows.shape[0], 8, rows.shape[1]), np.uint8)
    found[:, 0] = rows
    for bit in range(1, 8):
        before = found[:, bit - 1]
        found[:, bit] = (before << 1) ^ ((before >> 7) * np.uint8(0x1B))
    return found.reshape(-1, rows.shape[1])


def _combination(factors: Iterable[int], doubled: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Σ factorᵢ × rowᵢ ``[L]``: the doublings that the bits of the public factors name, added up."""
    chosen = [8 * row + bit for row, factor in enumerate(factors) for bit in range(8) if factor >> bit & 1]
    found: NDArray[np.uint8] = np.bitwise_xor.reduce(doubled[chosen], axis=0)
    return found
