"""What a site adds is bounded and whole, and what is read off the sum is what went in; the order changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.site import CONTRACT

from consilium_shared.errors import DataError, PeerError
from consilium_shared.identity import Identity
from consilium_shared.metrics import Layout
from consilium_shared.protocol.summand import (
    bound,
    counts_segment,
    counts_with,
    fixed_point,
    largest_weight,
    read,
    segments,
)
from consilium_shared.secagg import ring
from consilium_shared.secagg.ring import integers_limit
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import trailer_bytes
from consilium_shared.secagg.terms import Advert, Slot, Terms
from consilium_shared.study import Study

Values = Any


def study(**aggregation: Any) -> Study:
    return Study.model_validate({**CONTRACT, "aggregation": {"min_sites": 2, **aggregation}})


PLAIN = study()
WIDTH = Layout.of(PLAIN).width


def vector(asked: Study, values: list[float], weight: int, sites: int) -> Values:
    """A site's update as it is added."""
    update = np.asarray(values, dtype=np.float32)
    bound(update, asked)
    encoded = np.empty(update.size, dtype=ring.DTYPES[asked.aggregation.ring_bits])
    fixed_point(asked, sites).encode(update, encoded, weight / largest_weight(asked))
    return encoded


def whole(*numbers: int) -> Values:
    """A segment of the ring of 64 bits."""
    return np.asarray(numbers, dtype=np.int64).view(np.uint64)


def totals(asked: Study, added: list[tuple[list[float], int]], counts: Values = None, counted: int = 0) -> Values:
    """The opened sum of these updates and weights."""
    weight = sum(each for _, each in added)
    vectors = [vector(asked, values, each, len(added)) for values, each in added]
    found = {"update": np.sum(vectors, axis=0, dtype=vectors[0].dtype), "weight": whole(weight)}
    return found if counts is None else {**found, "counts": whole(counted, *counts)}


# -- the parts


def test_counts_of_the_model_before_ride_on_updates_and_the_last_have_a_sum_of_their_own() -> None:
    alone = Study.model_validate({**CONTRACT, "evaluation": {}})
    every_second = Study.model_validate({**CONTRACT, "evaluation": {"epsilon": 0.5, "every": 2}})
    assert [counts_with(PLAIN, number) for number in (1, 2, 3)] == [False, True, True]
    assert [counts_with(every_second, number) for number in (1, 2, 3)] == [False, False, True]
    assert not any(counts_with(alone, number) for number in (1, 2, 3))
    lengths = [[(part.name, part.bits, part.length) for part in segments(PLAIN, "training", n, 6)] for n in (1, 2)]
    assert lengths == [
        [("update", 32, 6), ("weight", 64, 1)],
        [("update", 32, 6), ("weight", 64, 1), ("counts", 64, 1 + WIDTH)],
    ]
    evaluation = segments(PLAIN, "evaluation", 3, 6)
    assert [(part.name, part.bits, part.length) for part in evaluation] == [("counts", 64, 1 + WIDTH)]


def test_half_the_bytes_with_16_bits() -> None:
    coarse = study(ring_bits=16, weighting="equal")
    assert [part.bits for part in segments(coarse, "training", 1, 6)] == [16, 64]


# -- what one site adds


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_an_update_is_within_both_bounds_and_keeps_its_direction(values: list[float]) -> None:
    asked = study(norm_bound=3.0, coordinate_bound=2.5)
    update = np.asarray(values, dtype=np.float32)
    before = update.astype(np.float64)
    factor = bound(update, asked)
    norm = float(np.linalg.norm(before))
    assert factor == pytest.approx(min(1.0, 3.0 / norm) if norm else 1.0)
    assert float(np.linalg.norm(update.astype(np.float64))) <= 3.0 * (1 + 1e-6)
    assert float(np.abs(update).max()) <= 2.5
    np.testing.assert_allclose(update, np.clip(before * factor, -2.5, 2.5), rtol=1e-6, atol=1e-12)


def test_an_update_within_the_bounds_is_not_touched() -> None:
    update = np.asarray([1.0, -2.0, 7.5], dtype=np.float32)
    assert bound(update, PLAIN) == 1.0
    assert update.tolist() == [1.0, -2.0, 7.5]
    assert bound(np.zeros(4, dtype=np.float32), PLAIN) == 1.0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_never_leaves(wrong: float) -> None:
    with pytest.raises(DataError, match="not finite"):
        bound(np.asarray([1.0, wrong], dtype=np.float32), PLAIN)


def test_an_update_larger_than_float32_can_square_is_scaled_down_all_the_same() -> None:
    update = np.asarray([3e38, 0.0], dtype=np.float32)
    bound(update, PLAIN)
    assert update.tolist() == [8.0, 0.0]


def test_no_site_takes_more_weight_than_the_study_allows() -> None:
    assert largest_weight(PLAIN) == 65_536
    assert largest_weight(study(max_weight=500)) == 500
    assert largest_weight(study(weighting="equal", max_weight=500)) == 1


def test_counts_stand_behind_the_one_who_counted() -> None:
    counts = np.asarray([5, -2, 0], dtype=np.int64)
    assert counts_segment(counts, 2, counted=True).view(np.int64).tolist() == [1, 5, -2, 0]


def test_a_count_that_could_overflow_the_sum_is_refused() -> None:
    for sites in (2, 100):
        most = integers_limit(sites)
        fine = counts_segment(np.asarray([most, -most]), sites, counted=True)
        assert fine.view(np.int64).tolist() == [1, most, -most]
        for wrong in (most + 1, -most - 1):
            with pytest.raises(DataError, match="too large"):
                counts_segment(np.asarray([wrong]), sites, counted=True)


def test_a_site_without_counts_adds_zeros_of_the_same_length() -> None:
    nothing = counts_segment(np.full(WIDTH, 7), 3, counted=False)
    assert nothing.tolist() == [0] * (1 + WIDTH)
    assert nothing.size == segments(PLAIN, "training", 2, 6)[2].length


# -- what is read off the sum


def test_the_mean_is_weighted() -> None:
    opened = read(PLAIN, "training", 2, 2, totals(PLAIN, [([1.0, 0.0], 1000), ([4.0, -2.0], 3000)]))
    np.testing.assert_allclose(opened.mean, [3.25, -1.5], atol=1e-5)
    assert (opened.weight, opened.counted, opened.counts, opened.implausible) == (4000, 0, None, None)


@given(
    st.lists(st.tuples(st.floats(-8, 8, width=32), st.integers(1, 5000)), min_size=2, max_size=5),
    st.sampled_from([32, 16]),
)
def test_the_mean_is_within_the_encodings_error(sites: list[tuple[float, int]], bits: int) -> None:
    asked = study(max_weight=5000) if bits == 32 else study(ring_bits=16, weighting="equal")
    added = [([value, -value / 3], weight if bits == 32 else 1) for value, weight in sites]
    opened = read(asked, "training", len(sites), len(sites), totals(asked, added))
    weight = sum(each for _, each in added)
    exact = sum(np.asarray(values) * each for values, each in added) / weight
    slack = len(sites) * fixed_point(asked, len(sites)).error * largest_weight(asked) / weight
    assert float(np.abs(opened.mean - exact).max()) <= slack + 2e-6
    assert opened.weight == weight and opened.implausible is None


def test_counts_add_up_and_tell_how_many_sites_counted() -> None:
    added = [([0.0], 10), ([0.0], 10), ([0.0], 10)]
    opened = read(PLAIN, "training", 3, 3, totals(PLAIN, added, counts=[4, -6], counted=2))
    assert opened.counts is not None
    assert (opened.counts.tolist(), opened.counted) == ([4, -6], 2)
    opened = read(PLAIN, "evaluation", 3, 3, {"counts": whole(2, 4, -6)})
    assert opened.counts is not None
    assert (opened.counts.tolist(), opened.counted, opened.weight, opened.mean.size) == ([4, -6], 2, 0, 0)


@pytest.mark.parametrize("weight", [0, 1, -5, 2 * 65_536 + 1, 2**63 - 1])
def test_a_weight_that_no_sites_could_have_means_that_the_sum_was_spoilt(weight: int) -> None:
    found = {**totals(PLAIN, [([1.0], 10), ([1.0], 10)], counts=[7], counted=2), "weight": whole(weight)}
    opened = read(PLAIN, "training", 2, 2, found)
    assert opened.implausible == f"the summed weight of 2 sites is {weight}: somebody spoilt the sum"
    assert (opened.mean.size, opened.weight, opened.counted, opened.counts) == (0, 0, 0, None)


@pytest.mark.parametrize("counted", [-1, 3, 2**62])
def test_more_sites_that_counted_than_there_are_mean_that_the_sum_was_spoilt(counted: int) -> None:
    training = totals(PLAIN, [([1.0], 10), ([1.0], 10)], counts=[7], counted=counted)
    for opened in (
        read(PLAIN, "evaluation", 2, 2, {"counts": whole(counted, 7)}),
        read(PLAIN, "training", 2, 2, training),
    ):
        assert opened.implausible == f"{counted} of 2 sites say that they counted: somebody spoilt the sum"
        assert (opened.mean.size, opened.weight, opened.counted, opened.counts) == (0, 0, 0, None)


def said_of(asked: Study, mean: list[float]) -> str | None:
    """What is said of two sites of full weight whose mean is this, whatever the bounds."""
    encoding = fixed_point(asked, 2)
    update = np.rint(2 * np.asarray(mean) * encoding.levels / encoding.bound).astype(np.int32)
    found = {"update": update.view(np.uint32), "weight": whole(2 * largest_weight(asked))}
    return read(asked, "training", 2, 2, found).implausible


def test_a_mean_beyond_what_honest_sites_can_give_is_implausible() -> None:
    asked = study(norm_bound=3.0, coordinate_bound=2.0)
    assert said_of(asked, [2.0, 2.0, -1.0]) is None
    assert "norm 3.002, and every site's own is at most 3" in str(said_of(asked, [2.0, 2.0, -1.005]))
    assert said_of(asked, [-2.0, 0.0, 0.0]) is None
    assert "a coordinate of the mean update is 2.1" in str(said_of(asked, [-2.1, 0.0, 0.0]))


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=2, max_size=6), st.data())
def test_what_honest_sites_give_is_never_implausible(updates: list[list[float]], data: st.DataObject) -> None:
    asked = study(norm_bound=2.0, coordinate_bound=1.0)
    weights = data.draw(st.lists(st.integers(1, 65_536), min_size=len(updates), max_size=len(updates)))
    found = totals(asked, list(zip(updates, weights, strict=True)))
    opened = read(asked, "training", len(updates), len(updates), found)
    assert opened.implausible is None


# -- how the coordinator adds


class Arrived:
    """Bytes that have arrived, given in the pieces that are asked for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def pieces(self, size: int) -> Any:
        return (self.data[start : start + size] for start in range(0, self.size, size))


SITES = ("a", "b", "c", "d")


def server() -> ServerSum:
    keys = {site: Identity.generate() for site in SITES}
    slot = Slot(federation="1" * 64, study="2" * 64, roster="3" * 64, purpose="training", round=1, attempt=1)
    adverts = {s: Advert.sign(slot, s, bytes([n]) * 32, keys[s]) for n, s in enumerate(SITES, 1)}
    about = {"model": "4" * 64, "segments": segments(PLAIN, "training", 1, 3), "threat_model": "malicious-server"}
    return ServerSum(Terms(slot=slot, adverts=adverts, **about), {s: key.public for s, key in keys.items()})  # type: ignore[arg-type]


def contribution(total: ServerSum, fill: int) -> Arrived:
    size = total.terms.masked_bytes + trailer_bytes(total.terms)
    return Arrived(np.random.default_rng(fill).bytes(size))


def test_the_order_of_arrival_does_not_change_one_bit() -> None:
    found = set()
    for order in itertools.permutations(range(3)):
        total = server()
        for place in order:
            total.fold(SITES[place], contribution(total, place))
        found.add(tuple((name, part.tobytes()) for name, part in total._totals.items()))
        assert total.survivors == SITES[:3]
    assert len(found) == 1


def test_a_site_counts_once_and_a_stranger_not_at_all() -> None:
    total = server()
    total.fold("a", contribution(total, 1))
    for site in ("a", "z"):
        with pytest.raises(PeerError, match="not in the cohort, or in the sum already"):
            total.fold(site, contribution(total, 2))
    assert total.survivors == ("a",)


@pytest.mark.parametrize("change", [-1, 1, -100, 10_000])
def test_a_vector_of_another_length_leaves_the_sum_unchanged(change: int) -> None:
    total = server()
    total.fold("a", contribution(total, 1))
    before = {name: part.tobytes() for name, part in total._totals.items()}
    data = contribution(total, 2).data
    with pytest.raises(PeerError, match="bytes, this one"):
        total.fold("b", Arrived(data[:change] if change < 0 else data + bytes(change)))
    assert {name: part.tobytes() for name, part in total._totals.items()} == before
    assert total.survivors == ("a",)


def test_a_closed_set_takes_nobody_more_and_too_few_do_not_close() -> None:
    total = server()
    for place, site in enumerate(SITES[:2]):
        total.fold(site, contribution(total, place))
    with pytest.raises(PeerError, match="at least 3 are needed"):
        total.close(2)
    total.fold("c", contribution(total, 3))
    assert total.close(2) == ("a", "b", "c")
    with pytest.raises(PeerError, match="closed"):
        total.fold("d", contribution(total, 4))
