"""Many sites' vectors become one sum, folded in as they arrive, never kept.

The interface (``fold`` a payload, then read the total) is what secure aggregation fills: it hands in masked vectors and
opens only the total. In this version the vectors arrive readable, which ``READABLE`` says in plain words wherever a
program starts.

Sums are taken in integers (fixed point), so they do not depend on the order in which sites answer: a resumed round
gives the same model, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from consilium_shared import limits
from consilium_shared.errors import PeerError

READABLE = (
    "Updates reach this server readable: secure aggregation is not part of this version. Whoever runs the server can "
    "look at one hospital's update and evaluation counts. Differential privacy, where the study has it, bounds what an "
    "update tells about a patient; nothing hides it from the server."
)

FRACTION_BITS = 26
"""100 sites × weight 1e6 × coordinate 1e3 × 2^26 = 6.7e18 < 2^63 - 1: no sum of honest or refused values overflows."""

PIECE = 1 << 20
"""Coordinates folded at a time: bounds the temporary float64 copy to 8 MiB whatever the model's size."""


class UpdateSum:
    """Running Σ wᵢ·uᵢ [d] and Σ wᵢ of the sites that were folded in."""

    def __init__(self, width: int, *, equal: bool = False) -> None:
        """``width``: d, the number of parameters. ``equal``: every site has the weight 1, whatever it would like."""
        self.width = width
        self.payload_bytes = 4 * (width + 1)
        self._equal = equal
        self._total: npt.NDArray[np.int64] = np.zeros(width + 1, dtype=np.int64)
        self.sites: list[str] = []

    def fold(self, site: str, payload: bytes) -> None:
        """Add one site's payload: float32 little-endian [d + 1], weight × update, then the weight.

        A payload is checked whole before the first coordinate is added.

        Raises:
            PeerError: wrong length, a value that is not finite or beyond ``limits``, a weight outside (0, WEIGHT],
                or a site that was folded in before. The sum is unchanged.
        """
        if site in self.sites:
            raise PeerError("this site's update is in the sum already")
        if len(payload) != self.payload_bytes:
            raise PeerError(f"an update has {self.payload_bytes} bytes, this one {len(payload)}")
        vector = np.frombuffer(payload, dtype="<f4")
        weight = float(vector[-1])
        if not (1 <= weight <= (1 if self._equal else limits.WEIGHT) and weight.is_integer()):
            raise PeerError("the weight is not a number of patients" if not self._equal else "the weight is not 1")
        bound = weight * limits.UPDATE_COORDINATE
        for start in range(0, self.width, PIECE):
            piece = vector[start : min(start + PIECE, self.width)]
            if not bool(np.all(np.abs(piece) <= bound)):  # False for NaN too
                raise PeerError("an update has coordinates that are not finite or far too large")
        for start in range(0, self.width + 1, PIECE):
            piece = vector[start : start + PIECE]
            self._total[start : start + PIECE] += np.rint(np.ldexp(piece.astype(np.float64), FRACTION_BITS)).astype(
                np.int64
            )
        self.sites.append(site)

    def mean(self) -> npt.NDArray[np.float64]:
        """Σ wᵢ·uᵢ / Σ wᵢ, float64 [d]; raises ValueError when nothing was folded in."""
        if not self.sites:
            raise ValueError("no site in the sum")
        return self._total[:-1].astype(np.float64) / float(self._total[-1])


class CountSum:
    """Running sum of evaluation counts, int64 [width]."""

    LARGEST = 2**40
    """Largest single count of one site (a loss sum in fixed point is the largest); 100 of them stay below 2^63."""

    def __init__(self, width: int, *, noised: bool) -> None:
        """``noised``: the counts carry noise, and may be negative."""
        self.width = width
        self.payload_bytes = 8 * width
        self._least = -self.LARGEST if noised else 0
        self.total: npt.NDArray[np.int64] = np.zeros(width, dtype=np.int64)
        self.sites: list[str] = []

    def fold(self, site: str, payload: bytes) -> npt.NDArray[np.int64]:
        """Add one site's payload, int64 little-endian [width]; returns it.

        Raises:
            PeerError: wrong length, a negative or absurd count, or a site that was folded in before.
        """
        if site in self.sites:
            raise PeerError("this site's counts are in the sum already")
        if len(payload) != self.payload_bytes:
            raise PeerError(f"counts have {self.payload_bytes} bytes, these {len(payload)}")
        counts = np.frombuffer(payload, dtype="<i8").astype(np.int64)
        if bool(np.any(counts < self._least)) or bool(np.any(counts > self.LARGEST)):
            raise PeerError("a count is negative, without noise, or absurd")
        self.total += counts
        self.sites.append(site)
        return counts
