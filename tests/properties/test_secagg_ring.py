"""Fixed point: sums that honest sites can make never overflow, and the stated error is the error."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from consilium_shared.errors import DataError
from consilium_shared.secagg.ring import DTYPES, FixedPoint, integers_limit

BITS = st.sampled_from(sorted(DTYPES))
SITES = st.integers(1, 100)
BOUNDS = st.sampled_from([2.0**-20, 0.1, 1.0, 3.0, 1e6])
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)


def encoded(ring: FixedPoint, values: np.ndarray, scale: float = 1.0) -> np.ndarray:
    out = np.empty(values.size, DTYPES[ring.bits])
    ring.encode(values, out, scale)
    return out


def decoded(ring: FixedPoint, total: np.ndarray, divisor: float = 1.0) -> np.ndarray:
    out = np.empty(total.size)
    ring.decode(total, out, divisor)
    return out


@pytest.mark.parametrize("bits", sorted(DTYPES))
@pytest.mark.parametrize("sites", range(1, 101))
def test_the_largest_values_of_all_sites_add_without_overflow(bits: int, sites: int) -> None:
    ring = FixedPoint(bits, sites, 3.0)
    extremes = np.array([3.0, -3.0, 3e38, -3e38, 0.0], np.float32)
    one = encoded(ring, extremes, 1e30)
    total = np.zeros_like(one)
    for _ in range(sites):
        total += one
    assert sites * ring.levels <= 2 ** (bits - 1) - 1
    assert decoded(ring, total).tolist() == [3.0 * sites, -3.0 * sites, 3.0 * sites, -3.0 * sites, 0.0]


@pytest.mark.parametrize("sites", range(1, 101))
def test_levels_are_the_largest_power_of_two_that_fits(sites: int) -> None:
    for bits in (16, 32):
        levels = FixedPoint(bits, sites, 1.0).levels
        assert levels.bit_count() == 1 and 2 * levels * sites > 2 ** (bits - 1) - 1
    assert FixedPoint(64, sites, 1.0).levels == 2**52


@given(
    BITS,
    BOUNDS,
    st.floats(0.001, 1.0),
    hnp.arrays(np.float64, st.tuples(st.integers(1, 100), st.just(5)), elements=st.one_of(st.floats(-2, 2), ANY)),
)
def test_the_sum_is_as_exact_as_stated(bits: int, bound: float, scale: float, updates: np.ndarray) -> None:
    sites = len(updates)
    updates = updates * bound
    ring = FixedPoint(bits, sites, bound)
    total = sum((encoded(ring, row, scale) for row in updates), start=np.zeros(5, DTYPES[bits]))
    limit = Fraction(bound)
    for i, value in enumerate(decoded(ring, total)):
        exact = sum(min(max(Fraction(float(v)) * Fraction(scale), -limit), limit) for v in updates[:, i])
        assert abs(Fraction(float(value)) - exact) <= sites * Fraction(ring.error)


@given(BITS, SITES, st.floats(0.5, 1000.0), hnp.arrays(np.float32, 7, elements=st.floats(-1, 1, width=32)))
def test_a_mean_is_the_sum_divided(bits: int, sites: int, divisor: float, values: np.ndarray) -> None:
    ring = FixedPoint(bits, sites, 1.0)
    mean = decoded(ring, encoded(ring, values), divisor)
    np.testing.assert_allclose(mean, decoded(ring, encoded(ring, values)) / divisor, rtol=1e-15)


@given(st.integers(0, 70_000), st.sampled_from([0.25, 1.0]))
def test_in_place_is_the_same_and_tiles_do_not_show(size: int, scale: float) -> None:
    ring = FixedPoint(32, 10, 1.0)
    values = np.linspace(-5, 5, size, dtype=np.float32)
    apart = encoded(ring, values, scale)
    assert apart.tobytes() == b"".join(encoded(ring, values[i : i + 999], scale).tobytes() for i in range(0, size, 999))
    back = np.empty(size, np.float32)
    ring.decode(apart, back)

    memory = values.copy()
    ring.encode(memory, memory.view(np.uint32), scale)
    assert memory.tobytes() == apart.tobytes()
    ring.decode(memory.view(np.uint32), memory)
    assert memory.tobytes() == back.tobytes()


@given(BITS, hnp.arrays(np.float32, 20, elements=ANY), st.floats(0.01, 100.0))
def test_what_was_clipped_is_counted(bits: int, values: np.ndarray, scale: float) -> None:
    out = np.empty(20, DTYPES[bits])
    count = FixedPoint(bits, 5, 1.0).encode(values, out, scale)
    assert count == sum(abs(float(v)) > 1.0 / scale for v in values)


def test_a_value_on_the_bound_is_not_clipped() -> None:
    out = np.empty(2, np.uint32)
    assert FixedPoint(32, 3, 0.7).encode(np.array([0.7, -0.7]), out) == 0
    assert out.view(np.int32).tolist() == [2**29, -(2**29)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 32 * 1024 + 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_that_is_not_finite_is_refused_before_its_tile_is_written(bad: float, place: int, dtype: type) -> None:
    values: Any = np.ones(place + 10, dtype)
    values[place] = bad
    out = np.full(place + 10, 7, np.uint32)
    with pytest.raises(DataError, match="finite"):
        FixedPoint(32, 3, 1.0).encode(values, out)
    tile = place - place % (32 * 1024)
    assert (out[tile:] == 7).all()


@pytest.mark.parametrize(
    ("bits", "sites", "bound"),
    [(8, 3, 1.0), (32, 0, 1.0), (32, 101, 1.0), (32, 3, 0.0), (32, 3, -1.0), (32, 3, math.nan), (32, 3, math.inf)],
)
def test_what_the_proof_does_not_cover_cannot_be_made(bits: int, sites: int, bound: float) -> None:
    with pytest.raises(ValueError):
        FixedPoint(bits, sites, bound)


def test_vectors_that_do_not_fit_each_other_are_refused() -> None:
    ring = FixedPoint(32, 3, 1.0)
    values, out = np.ones(8, np.float32), np.empty(8, np.uint32)
    memory = np.ones(9, np.float32)
    wrong: list[tuple[Any, Any]] = [
        (values, out[:7]),
        (values, np.empty(8, np.uint64)),
        (values, np.empty(8, np.int32)),
        (values, np.empty(16, np.uint32)[::2]),
        (values.reshape(2, 4), out.reshape(2, 4)),
        (values.astype(np.float16), out),
        (memory[1:], memory.view(np.uint32)[:8]),
    ]
    for bad_values, bad_out in wrong:
        with pytest.raises(ValueError):
            ring.encode(bad_values, bad_out)
        with pytest.raises(ValueError):
            ring.decode(bad_out, bad_values)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            ring.encode(values, out, bad)
        with pytest.raises(ValueError, match="divisor"):
            ring.decode(out, values, bad)


@pytest.mark.parametrize("sites", range(1, 101))
def test_counts_up_to_the_limit_add_without_overflow(sites: int) -> None:
    limit = integers_limit(sites)
    assert sites * limit <= 2**63 - 1 < sites * (limit + 1)


def test_a_limit_for_no_site_or_too_many_is_refused() -> None:
    for sites in (0, 101):
        with pytest.raises(ValueError):
            integers_limit(sites)
