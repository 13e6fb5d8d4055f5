"""Whoever drops out, lies or tries again, each opened sum holds the honest noise that its sites were charged for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.test_private_sums import without
from tests.support.sharing import CLIPPING_NORM, EMPTY, SIGMA, shared_study
from tests.support.sums import Federation, Sum, same, seed
from tests.support.training import records, run

from consilium_shared.errors import PeerError
from consilium_shared.models.vector import width
from consilium_shared.privacy.measured_noise import deviations, doubt
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.private_sums import Grid, Integers
from consilium_shared.protocol.summand import read, segments
from consilium_shared.secagg.terms import least_sites, tolerated
from consilium_shared.shared_noise import rounding_gap, share
from consilium_shared.study import Study
from dpsgd.noise import Noise


def integers(study: Study, patients: int, secret: bytes) -> Integers:
    plan = plan_of(study, 0)
    assert isinstance(plan, PrivacyPlan)
    found = run(study, records(patients=patients), plan, seed=secret).integers
    assert found is not None
    return found


def noise(study: Study, secret: bytes) -> npt.NDArray[np.int64]:
    """This site's own share, as it follows from its secret, in steps of the grid."""
    total, honest = torch.zeros(width(study) + EMPTY, dtype=torch.float64), study.privacy.sums
    assert honest is not None
    deviation = share(SIGMA, honest.honest_sites) * CLIPPING_NORM / Grid.of(study, width(study)).step
    Noise(secret).add_to(total, deviation)
    return total.numpy().astype(np.int64)


class Charged:
    """A study's sites, each with its secret; charges and noise are counted beside the real state machines."""

    def __init__(self, sites: int, liars: int, absent: int) -> None:
        self.honest_sites, self.liars = sites - absent - liars, liars
        self.study = shared_study(self.honest_sites, liars)
        rules = self.study.aggregation
        least = least_sites(rules, sites)
        self.federation = Federation(sites, minimum=least, tolerated=tolerated(rules, sites), handshake=False)
        self.federation.parts = {
            site: self.federation.part(site, honest=self.honest_sites) for site in self.federation.names
        }
        self.corrupt = self.federation.names[:liars]
        self.segments = segments(self.study, "training", 1, width(self.study))
        self.vectors: dict[str, dict[str, Any]] = {}
        for number, site in enumerate(self.federation.names):
            vector = integers(self.study, 3 + number, seed(site, "secret"))
            if site in self.corrupt:  # it adds no noise, or takes off what it knows of it: what it adds it knows
                vector = np.zeros_like(vector)
            self.vectors[site] = {"update": vector, "weight": np.ones(1, np.uint64)}

    def attempt(self, number: int = 1) -> Sum:
        slot = self.federation.slot(attempt=number)
        return Sum(self.federation, slot=slot, vectors=self.vectors, segments=self.segments)

    def honest_noise(self, survivors: tuple[str, ...]) -> float:
        """Variance of the shares in a sum that nobody at the coordinator's side knows, over what is charged."""
        honest = [site for site in survivors if site not in self.corrupt]
        return len(honest) * share(SIGMA, self.honest_sites) ** 2 / SIGMA**2


@given(st.integers(4, 7), st.integers(0, 2), st.data())
@settings(derandomize=True, deadline=None, max_examples=8)
def test_every_sum_that_can_be_opened_holds_the_honest_noise_that_was_charged(
    sites: int, absent: int, data: st.DataObject
) -> None:
    made = Charged(sites, 1, min(absent, sites - 3))
    names = made.federation.names
    first = made.attempt()
    first.fold()
    survivors = tuple(sorted(data.draw(st.sets(st.sampled_from(names), min_size=2, max_size=sites))))
    opened = True
    try:
        totals = made.attempt().opened(*survivors)
    except (PeerError, ValueError):  # too few: no site signs, or none masks
        opened = False
    assert opened == (made.honest_noise(survivors) >= 1 and len(survivors) >= made.study.aggregation.min_sites)
    if not opened:
        return
    assert same(totals, first.plain(*survivors))
    honest = [site for site in survivors if site not in made.corrupt]
    known = sum(noise(made.study, seed(site, "secret")) for site in honest)
    gradients = [
        made.vectors[site]["update"] - noise(made.study, seed(site, "secret")).astype(np.uint32) for site in honest
    ]
    left = totals["update"] - sum(gradients)
    assert np.array_equal(left.view(np.int32).astype(np.int64), known), "the shares, exactly, and nothing after them"


def test_after_a_dead_attempt_the_same_shares_are_in_one_opened_sum_alone() -> None:
    made = Charged(5, 1, 0)
    first = made.attempt()
    first.mask()
    for site in made.federation.names:
        first.states[site] = made.federation.parts[site].abandon(first.states[site])
    second = made.attempt(2)
    assert first.terms.dead(second.adverts)
    assert same(second.opened(), second.plain())
    for site in made.federation.names:
        with pytest.raises(PeerError):
            made.federation.parts[site].sign(first.states[site], made.federation.names, b"")


def test_two_sums_have_independent_noise_so_their_difference_tells_no_more() -> None:
    study = shared_study()
    rounds = [noise(study, seed("site", number)).astype(np.float64) for number in range(40)]
    both = [float(one @ other) / len(one) for one, other in itertools.pairwise(rounds)]
    deviation = float(np.mean([np.mean(each**2) for each in rounds]))
    assert abs(np.mean(both)) < 6 * deviation / math.sqrt(len(both) * len(rounds[0]))


def test_a_site_that_forgets_its_share_stops_the_study_and_one_that_lies_in_it_does_not() -> None:
    study, sites = shared_study(8, 2), 10
    size = width(study)

    def opened(number: int, forgets: bool, lies: bool) -> Any:
        total = np.zeros(size + EMPTY, dtype=np.uint32)
        for site in range(sites):
            mine = noise(study, seed(site, number))
            if site == 0 and forgets:
                mine[:] = 0
            if site == 0 and lies:
                mine[:size] = 0
            total += mine.astype(np.uint32)
        return read(study, "training", sites, sites, {"update": total, "weight": np.full(1, sites, np.uint64)}).noise

    for forgets, lies, stops in ((False, False, False), (True, False, True), (False, True, False)):
        measured = [opened(number, forgets, lies) for number in range(48)]
        assert (doubt(measured) is not None) == stops, deviations(measured)


def test_a_sum_of_rounded_shares_is_the_gaussian_that_is_charged() -> None:
    """The bound on the distance holds where it can be computed exactly, and is nothing at the shares there are."""
    for deviation, sites in ((1.0, 2), (1.0, 3), (1.5, 2)):
        reach = 60
        grid = np.arange(-reach, reach + 1, dtype=np.float64)

        def cumulative(x: npt.NDArray[np.float64], of: float) -> npt.NDArray[np.float64]:
            return np.array([0.5 * (1 + math.erf(each / of / math.sqrt(2))) for each in x])

        one = cumulative(grid + 0.5, deviation) - cumulative(grid - 0.5, deviation)
        summed = one
        for _ in range(sites - 1):
            summed = np.convolve(summed, one, mode="same")
        weights = np.ones(1)
        for _ in range(sites):
            weights = np.convolve(weights, np.ones(4000 // sites) / (4000 // sites))
        fine = np.linspace(-0.5 * sites, 0.5 * sites, len(weights))
        whole = deviation * math.sqrt(sites)
        density = np.array(
            [
                float(weights @ (np.exp(-((each - fine) ** 2) / 2 / whole**2) / whole / math.sqrt(2 * math.pi)))
                for each in grid
            ]
        )
        assert 0.5 * np.abs(summed - density).sum() <= rounding_gap(deviation, sites) + 1e-6
    plan, study = plan_of(shared_study(94, 6), 0), shared_study(94, 6)
    assert isinstance(plan, PrivacyPlan)
    steps = plan.own_noise_multiplier * plan.clipping_norm / Grid.of(study, width(study)).step
    assert rounding_gap(steps, 94) < 1e-100


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 1e4, math.inf, math.nan]))
@settings(derandomize=True, deadline=None, max_examples=5)
def test_a_crafted_patient_moves_a_share_by_at_most_the_clipping_norm(draw: int, size: float) -> None:
    study, data = shared_study(), records(patients=8, seed=draw)
    with np.errstate(all="ignore"):
        data.inputs[0][3] = np.random.default_rng(draw).standard_normal(data.inputs[0][3].shape) * size
    plan = plan_of(study, 0)
    assert isinstance(plan, PrivacyPlan)
    whole, less = (run(study, each, plan, seed=seed(draw)).integers for each in (data, without(data, 3)))
    assert whole is not None and less is not None
    moved = (whole - less).view(np.int32).astype(object)
    assert int((moved**2).sum()) <= int(CLIPPING_NORM / Grid.of(study, width(study)).step) ** 2
    assert not moved[-EMPTY:].any()
