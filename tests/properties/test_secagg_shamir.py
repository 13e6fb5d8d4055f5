"""Shares: enough of them are the secret, fewer are as likely for every other one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium_shared.secagg.shamir import combine, split


def product(a: int, b: int) -> int:
    """Polynomials over GF(2) multiplied, then divided by x^8 + x^4 + x^3 + x + 1 (FIPS 197, section 4.2), by hand."""
    whole = 0
    for i in range(8):
        for j in range(8):
            whole ^= (a >> i & b >> j & 1) << (i + j)
    for degree in range(14, 7, -1):
        if whole >> degree & 1:
            whole ^= 0x11B << (degree - 8)
    return whole


ALL = bytes(range(256))


def test_every_product_of_the_field_is_right() -> None:
    """The share of 0 with slope c at the point x is c × x."""
    shares = split(bytes(256), 2, range(1, 256), ALL)
    for x in range(1, 256):
        assert shares[x] == bytes(product(c, x) for c in ALL)


def test_every_quotient_of_the_field_is_right() -> None:
    """Through (1, 0) and (x, y) goes the line whose value at 0 is y / (x + 1): only one byte times x + 1 is y."""
    for x in range(2, 256):
        values = combine({1: bytes(256), x: ALL})
        assert bytes(product(value, x ^ 1) for value in values) == ALL


@given(st.data())
def test_any_threshold_of_shares_is_the_secret(data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 255), min_size=2, max_size=30, unique=True))
    threshold = data.draw(st.integers(2, len(points)))
    secret = data.draw(st.binary(min_size=1, max_size=40))
    randomness = data.draw(st.binary(min_size=len(secret) * (threshold - 1), max_size=len(secret) * (threshold - 1)))
    shares = split(secret, threshold, points, randomness)
    assert list(shares) == points
    chosen = data.draw(st.permutations(points))[:threshold]
    assert combine({point: shares[point] for point in chosen}) == secret


@given(st.integers(2, 8), st.binary(min_size=7, max_size=7), st.lists(st.integers(1, 255), min_size=8, unique=True))
def test_a_share_is_the_value_of_the_polynomial(threshold: int, coefficients: bytes, points: list[int]) -> None:
    secret, randomness = b"\x53", coefficients[: threshold - 1]
    for point, share in split(secret, threshold, points, randomness).items():
        value, power = 0, 1
        for coefficient in secret + randomness:
            value ^= product(coefficient, power)
            power = product(power, point)
        assert share == bytes([value])


@pytest.mark.parametrize("secret", [0, 1, 0x53, 0xFF])
def test_one_share_of_two_is_equally_likely_for_every_secret(secret: int) -> None:
    """Over all 256 random bytes each share takes each value once, whatever the secret is."""
    shares = split(bytes([secret]) * 256, 2, range(1, 256), ALL)
    for share in shares.values():
        assert sorted(share) == list(ALL)


@given(
    st.integers(2, 7),
    st.lists(st.integers(1, 255), min_size=7, max_size=7, unique=True),
    st.binary(min_size=24, max_size=24),
    st.binary(min_size=4, max_size=4),
)
def test_one_share_too_few_fits_every_secret(threshold: int, points: list[int], noise: bytes, other: bytes) -> None:
    """The missing share can be chosen so that the others belong to any other secret: here by interpolating at it."""
    shares = split(b"four", threshold, points, noise[: 4 * (threshold - 1)])
    known = {point: shares[point] for point in points[: threshold - 1]}
    missing = points[threshold - 1]
    # Shifted by the missing point, 0 and the known points are points of the same polynomial.
    shifted = {missing: other} | {point ^ missing: share for point, share in known.items()}
    assert combine(known | {missing: combine(shifted)}) == other


def test_every_subset_of_enough_shares_agrees_and_smaller_ones_do_not_tell() -> None:
    secret = bytes(range(32))
    shares = split(secret, 3, [1, 2, 3, 4, 5], bytes(range(100, 164)))
    for size in (3, 4, 5):
        for points in itertools.combinations(shares, size):
            assert combine({point: shares[point] for point in points}) == secret
    assert all(combine({p: shares[p] for p in pair}) != secret for pair in itertools.combinations(shares, 2))


@pytest.mark.parametrize(
    ("secret", "threshold", "points", "randomness"),
    [
        (b"", 2, [1, 2], b""),
        (b"s", 1, [1, 2], b""),
        (b"s", 3, [1, 2], b"ab"),
        (b"s", 2, [1, 1], b"a"),
        (b"s", 2, [0, 1], b"a"),
        (b"s", 2, [1, 256], b"a"),
        (b"s", 2, [1, 2], b""),
        (b"s", 2, [1, 2], b"ab"),
    ],
)
def test_a_wrong_split_is_refused(secret: bytes, threshold: int, points: list[int], randomness: bytes) -> None:
    with pytest.raises(ValueError):
        split(secret, threshold, points, randomness)


@pytest.mark.parametrize(
    "shares", [{}, {1: b"a"}, {1: b"a", 2: b"bc"}, {0: b"a", 1: b"b"}, {1: b"", 2: b""}, {1: b"a", 256: b"b"}]
)
def test_a_wrong_combination_is_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(ValueError):
        combine(shares)
