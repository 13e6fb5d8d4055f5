"""Fixed point in the integers modulo 2^16, 2^32 or 2^64: the numbers that masks are added to.

Quantisation of one coordinate and the choice of its range follow Bonawitz et al. 2017 (Practical Secure Aggregation for
Privacy-Preserving Machine Learning, section 4), with signed numbers in place of an offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_shared.errors import DataError

Floats = NDArray[np.float32] | NDArray[np.float64]
Ring = NDArray[np.unsignedinteger[Any]]

DTYPES: dict[int, np.dtype[Any]] = {16: np.dtype("<u2"), 32: np.dtype("<u4"), 64: np.dtype("<u8")}
"""Width of the ring in bits, and how an element lies in memory and on the wire."""

MAX_SITES = 100
_TILE = 32 * 1024  # elements: their float64 is 256 KiB, which stays in the second cache
_FLOAT64_LEVELS = 2**52  # float64 holds every integer up to here, and one more bit for its rounding
_SCALE = 1e100  # far beyond every weight, and near enough that no product overflows


@dataclass(frozen=True)
class FixedPoint:
    """Numbers of at most ``bound`` as integers of at most ``levels``, which up to ``sites`` sites add without overflow.

    A number v becomes round(v × Q / bound) with Q = ``levels``, so an integer of one site is at most Q in absolute
    value. Q ≤ (2^(bits−1) − 1) / sites. Hence the sum of ``sites`` of them is at most 2^(bits−1) − 1, and the signed
    integer in that range that is congruent to it modulo 2^bits is the sum itself. Only a site that encodes otherwise
    can make the sum wrap: it falsifies the sum then, and learns nothing.

    >>> code = FixedPoint(bits=32, sites=3, bound=1.0)
    >>> total = np.zeros(2, dtype=DTYPES[32])
    >>> for update in ([0.5, -0.25], [0.25, 0.25], [1.0, -1.0]):  # each site's own
    ...     encoded = np.empty_like(total)
    ...     clipped = code.encode(np.asarray(update), encoded)
    ...     total += encoded
    >>> mean = np.empty(2)
    >>> code.decode(total, mean, divisor=3)
    >>> mean.round(6).tolist()
    [0.583333, -0.333333]

    Attributes:
        bits: width of the ring: 16, 32 or 64.
        sites: how many sites add at most, 1 … 100.
        bound: the largest absolute value of one site, in the unit of the values; what is larger is clipped to it.

    Raises:
        ValueError: an unknown width, a number of sites or a bound out of range.
    """

    bits: int
    sites: int
    bound: float

    def __post_init__(self) -> None:
        """Refuse what the proof does not cover."""
        if self.bits not in DTYPES:
            raise ValueError(f"a ring has {', '.join(map(str, DTYPES))} bits, not {self.bits}")
        if not 1 <= self.sites <= MAX_SITES:
            raise ValueError(f"from 1 to {MAX_SITES} sites can add, not {self.sites}")
        if not (math.isfinite(self.bound) and self.bound >= np.finfo(np.float32).tiny):
            raise ValueError("the bound of a coordinate must be a positive, finite number")

    @property
    def levels(self) -> int:
        """Q: a power of two, and at most 2^52, where float64 still tells integers apart."""
        largest = ((1 << (self.bits - 1)) - 1) // self.sites
        return min(1 << (largest.bit_length() - 1), _FLOAT64_LEVELS)

    @property
    def error(self) -> float:
        """Largest error of the decoded sum by one site's rounding, in the unit of the values.

        Half a level, and what the float64 arithmetic of ``encode`` and of ``decode`` into float64 adds: at most four
        roundings of relative 2^-53 each, which is below 2^-20 of a level at 32 bits and up to four levels at 64. A
        decoded value that is stored as float32 is rounded once more, by a relative 2^-24 of the sum.
        """
        return self.bound * (0.5 / self.levels + 2.0**-50)

    def encode(self, values: Floats, out: Ring, scale: float = 1.0) -> int:
        """``out[i]`` = round(clip(``values[i]`` × ``scale``, ± bound) × Q / bound), ties to even.

        Args:
            values: float32 or float64 ``[k]``.
            out: elements of this ring ``[k]``, contiguous. May be the memory of ``values`` if both have elements of one
                size; may not overlap it otherwise. Less than 1 MiB of memory is used besides.
            scale: from 1e-100 to 1e100; the weight of the site, for instance.

        Returns:
            How many coordinates were clipped.

        Raises:
            DataError: a value is not finite. What came in tiles before it is written; ``out`` is to be thrown away.
            ValueError: wrong dtypes, shapes or scale.
        """
        self._check(values, out)
        if not 1 / _SCALE <= scale <= _SCALE:
            raise ValueError("the scale of an update must be positive and of a sensible size")
        factor, limit = scale * self.levels / self.bound, self.bound / scale
        signed = out.view(f"<i{out.itemsize}")
        product = np.empty(min(_TILE, values.size))
        clipped = 0
        for start in range(0, values.size, _TILE):
            tile = values[start : start + _TILE]
            levels = product[: tile.size]
            largest = max(float(tile.max()), -float(tile.min()))  # NaN if one is among them
            if not math.isfinite(largest):
                raise DataError("the update has a value that is not finite: training diverged. Nothing was sent.")
            np.copyto(levels, tile)
            if largest > limit:
                clipped += int(np.count_nonzero(np.abs(levels) > limit))
                np.clip(levels, -limit, limit, out=levels)
            levels *= factor
            np.rint(levels, out=levels)
            if self.levels == _FLOAT64_LEVELS:  # only there the last bit of the product is a whole level
                np.clip(levels, -self.levels, self.levels, out=levels)
            np.copyto(signed[start : start + _TILE], levels, casting="unsafe")
        return clipped

    def decode(self, total: Ring, out: Floats, divisor: float = 1.0) -> None:
        """``out[i]`` = the signed integer that ``total[i]`` stands for × bound / Q / ``divisor``.

        Args:
            total: elements of this ring ``[k]``, contiguous: the sum of at most ``sites`` encoded vectors.
            out: float32 or float64 ``[k]``. May be the memory of ``total`` if both have elements of one size; may not
                overlap it otherwise.
            divisor: from 1e-100 to 1e100; the summed weight, for instance.

        Raises:
            ValueError: wrong dtypes, shapes or divisor.
        """
        self._check(out, total)
        if not 1 / _SCALE <= divisor <= _SCALE:
            raise ValueError("the divisor of a sum must be positive and of a sensible size")
        unit = self.bound / self.levels / divisor
        signed = total.view(f"<i{total.itemsize}")
        product = np.empty(min(_TILE, total.size))
        for start in range(0, total.size, _TILE):
            part = signed[start : start + _TILE]
            values = product[: part.size]
            np.copyto(values, part, casting="same_kind")
            values *= unit
            np.copyto(out[start : start + _TILE], values, casting="same_kind")

    def _check(self, values: Floats, elements: Ring) -> None:
        if values.dtype not in (np.float32, np.float64) or values.ndim != 1:
            raise ValueError("values are one vector of float32 or float64")
        if elements.dtype != DTYPES[self.bits] or elements.shape != values.shape:
            raise ValueError(f"elements of a ring of {self.bits} bits are {DTYPES[self.bits]}, as many as the values")
        if not elements.flags.c_contiguous:
            raise ValueError("elements of a ring lie side by side")
        same = (values.ctypes.data, values.strides) == (elements.ctypes.data, elements.strides)
        if not same and np.may_share_memory(values, elements):
            raise ValueError("values and elements overlap without being the same memory")


def integers_limit(sites: int) -> int:
    """The largest absolute value of one site's integer that ``sites`` of them can be added in the ring of 64 bits.

    Raises:
        ValueError: a number of sites out of 1 … 100.
    """
    if not 1 <= sites <= MAX_SITES:
        raise ValueError(f"from 1 to {MAX_SITES} sites can add, not {sites}")
    return (2**63 - 1) // sites
