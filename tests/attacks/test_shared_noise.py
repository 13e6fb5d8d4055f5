"""Attacks on noise that sites share: no sum is opened with less honest noise than each of its sites was charged for.

The sites here run the real state machines, under terms and minimum as a site of that contract has them. What a whole
site does, from charge to masked bytes, is in ``tests/unit/client/test_shared_noise.py``.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from tests.support.sharing import shared_study
from tests.support.sums import Federation

from consilium_client.policy import AssetBudget, SharedNoise, SitePolicy, objections
from consilium_shared.errors import PeerError, PolicyRefusal
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import DpSgdEvent, event_from_dict, event_to_dict
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.secagg.terms import least_sites, tolerated
from consilium_shared.study import Study

ROSTER = 8


def plan(study: Study) -> PrivacyPlan:
    found = plan_of(study, 0)
    assert isinstance(found, PrivacyPlan)
    return found


@pytest.fixture(scope="module")
def eight() -> Federation:
    """Eight sites of a study with the noise of four honest ones beside two that may lie: six are in every sum."""
    rules = shared_study(4, 2).aggregation
    made = Federation(ROSTER, minimum=least_sites(rules, ROSTER), tolerated=tolerated(rules, ROSTER), handshake=False)
    made.parts = {site: made.part(site, honest=4) for site in made.names}
    return made


# -- who is in a sum


def test_no_honest_site_signs_a_set_in_which_all_liars_leave_too_little_noise(eight: Federation) -> None:
    attempt = eight.sum()
    attempt.fold()
    few = eight.names[:5]  # three honest ones beside two that add nothing
    for site in few:
        with pytest.raises(PeerError, match="5 survivors, and at least 6 are needed"):
            eight.parts[site].sign(attempt.states[site], few, b"")


def test_a_program_that_forgot_the_minimum_is_held_by_the_shares(eight: Federation) -> None:
    """Whoever calls the state machine with a smaller minimum than the contract's gets what the noise needs."""
    part, attempt = eight.part("site-00", honest=7, minimum=2), eight.sum()
    with pytest.raises(PeerError, match="fewer than the 7 whose noise is the whole"):
        part.mask(attempt.states["site-00"], attempt.terms)


def test_a_cohort_of_the_liars_and_a_few_others_gets_no_masked_vector(eight: Federation) -> None:
    attempt = eight.sum(cohort=eight.names[:5])
    with pytest.raises(PeerError, match="fewer than the 6"):
        attempt.mask("site-00")


@pytest.mark.parametrize(("told", "why"), [(None, "no corrupt site"), (0, "no corrupt site")])
def test_terms_that_reckon_with_no_liar_get_no_masked_vector(eight: Federation, told: int | None, why: str) -> None:
    attempt = eight.sum()
    with pytest.raises(PeerError, match=why):
        eight.parts["site-00"].mask(attempt.states["site-00"], attempt.terms_with(corrupt=told))


def test_two_sets_of_one_attempt_are_not_both_opened(eight: Federation) -> None:
    attempt = eight.sum()
    attempt.fold()
    first = attempt.total.close(eight.minimum)
    other = first[:-1]
    for site in other[:4]:  # the honest ones; both liars sign everything
        attempt.sign(site)
        with pytest.raises(PeerError, match="another set"):
            eight.parts[site].sign(attempt.states[site], other, b"")
    assert attempt.terms.threshold <= 4 + 2 and attempt.terms.threshold > ROSTER - 2 - 4 + 2


@pytest.mark.parametrize("roster", range(3, 21))
def test_every_cohort_a_contract_allows_holds_the_noise_and_opens_one_set(roster: int) -> None:
    for liars in range(1, (roster - 1) // 3 + 2):
        honest = roster - liars
        if honest < 2:
            continue
        rules = shared_study(honest, liars).aggregation
        federation = Federation(roster, handshake=False, tolerated=tolerated(rules, roster), minimum=roster)
        terms = federation.sum().terms
        terms.check_shares(roster, honest)
        assert 2 * terms.threshold > roster + liars
        with pytest.raises(PeerError, match="whose noise is the whole"):
            terms.check_shares(roster - 1, honest)


def test_shares_are_released_only_where_the_noise_is_whole(eight: Federation) -> None:
    attempt = eight.sum()
    attempt.close()
    attempt.sign()
    careful = eight.part("site-00", honest=7)
    with pytest.raises(PeerError, match="fewer than the 7"):
        careful.release(attempt.states["site-00"], attempt.total.signatures, attempt.total.sealed_for("site-00"))
    attempt.release()
    assert np.array_equal(attempt.total.open()["update"], attempt.plain()["update"])


# -- contracts


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"training": {"steps_per_round": 2}}, "steps_per_round: 1"),
        ({"aggregation": {"min_sites": 3}}, "min_sites is 3"),
        ({"aggregation": {"min_sites": 6}}, "min_sites is 6"),
        ({"aggregation": {"corrupt_sites": 0, "min_sites": 3}}, "at least 1"),
        ({"aggregation": {"corrupt_sites": "third"}}, "a number as aggregation.corrupt_sites"),
        ({"aggregation": {"threat_model": "honest-but-curious"}}, "malicious-server"),
        ({"aggregation": {"weighting": "equal"}}, "weighting: patients"),
        ({"aggregation": {"weighting": "equal", "ring_bits": 16}}, "privacy.sums takes"),
        ({"sums": {"empty_coordinates": 0}}, "empty_coordinates"),
        ({"sums": {"honest_sites": 101}}, "honest_sites"),
        ({"training": {"adaptive_clipping": {}}}, "no adaptive_clipping"),
        ({"training": {"optimizer": {"lr": 0.1, "momentum": 0.9}}}, "privacy.sums takes optimizer"),
    ],
)
def test_a_contract_under_which_a_sum_could_hold_less_noise_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        shared_study(**wrong)


def test_two_local_steps_with_shares_show_more_than_they_were_charged_for() -> None:
    """Why they are refused: the first step's patient moves everybody else's second gradient, under one share alone."""
    draw, sites, sigma, patients, runs = np.random.default_rng(0), 10, 3.0, 100, 40_000
    share = sigma / math.sqrt(sites)

    def advantage_of(whole: bool) -> float:
        own, others = (sigma, 0.0) if whole else (share, math.sqrt(2 * (sites - 1)) * share)
        shown = []
        for canary in (0.0, 1.0):
            weight = 0.5 - (canary + own * draw.standard_normal(runs))
            second = patients * np.sign(weight) + own * draw.standard_normal(runs)
            shown.append((weight - second + others * draw.standard_normal(runs) > 0).mean())
        return abs(shown[0] - shown[1])

    # The best that may be told of two releases of the whole noise: 2 Φ(√2 / 2σ) - 1.
    allowed = math.erf(math.sqrt(2) / sigma / 2 / math.sqrt(2))
    assert advantage_of(whole=True) < allowed < advantage_of(whole=False) - 0.15


def test_a_contract_that_leaves_the_noise_to_each_site_is_refused_by_whoever_receives_it() -> None:
    contract = shared_study(privacy={"noise_multiplier": "auto"}).contract
    with pytest.raises(PeerError, match="noise_multiplier stands in the contract"):
        Study.from_contract(contract)
    assert Study.from_contract(shared_study().contract) == shared_study()


def test_whoever_is_told_another_noise_clipping_norm_or_number_of_honest_sites_is_in_another_study() -> None:
    told = shared_study().digest
    others = [
        shared_study(4, 2),
        shared_study(3, 1),
        shared_study(privacy={"noise_multiplier": 5.0}),
        shared_study(privacy={"clipping_norm": 0.25}),
        shared_study(sums={"sampling_rate": 0.5}),
    ]
    assert len({told, *(each.digest for each in others)}) == 6  # and each slot's keys are for one study's digest


# -- what is charged


def test_a_charge_is_of_the_whole_noise_and_tells_what_is_left_without_the_others() -> None:
    study = shared_study(4, 2)
    mine, event = plan(study), plan(study).event(3)
    assert event_from_dict(event_to_dict(event)) == event != DpSgdEvent(1.0, 4.0, 3)
    assert mine.cost() == epsilon([DpSgdEvent(1.0, 4.0, 3)], 1e-3)
    assert 1.9 * mine.cost() < mine.cost_alone() <= epsilon([DpSgdEvent(1.0, 2.0, 3)], 1e-3) < mine.cost_alone() + 1e-3
    assert 4 * mine.own_noise_multiplier**2 >= mine.noise_multiplier**2
    assert mine.whole().cost() == mine.whole().cost_alone() == mine.cost()


def test_a_plan_without_shares_is_written_as_it_was_before_there_were_any() -> None:
    written = plan(shared_study()).whole().to_dict()
    assert not {"honest_sites", "colluding_sites"} & set(written)
    shared = plan(shared_study()).to_dict()
    assert (shared["honest_sites"], shared["colluding_sites"]) == (3, 2)


def test_evaluation_counts_carry_each_sites_whole_noise_whatever_is_shared() -> None:
    counted = shared_study(evaluation={"epsilon": 0.5})
    assert plan(counted).evaluation_noise == plan(shared_study(2, 1, evaluation={"epsilon": 0.5})).evaluation_noise


# -- what a hospital permits


def policy(**shared: Any) -> SitePolicy:
    budget = AssetBudget(epsilon=5.0, delta=1e-3, shared_noise=SharedNoise(**shared))
    return SitePolicy(budgets={"a": budget}, tasks=("tabular-classification",), minimum_patients=1)


@pytest.mark.parametrize(
    ("shared", "roster", "why"),
    [
        ({}, 6, "permits none such"),
        ({"permit": True, "min_colluding": 3}, 6, "this site asks for 3"),
        ({"permit": True, "max_epsilon_alone": 1.0}, 6, "own share of the noise alone would limit"),
        ({"permit": True}, 20, "does not hold against 6 of its 20"),
        ({"permit": True}, 6, None),
    ],
)
def test_a_hospital_permits_shared_noise_asset_by_asset_and_within_its_own_limits(
    shared: dict[str, Any], roster: int, why: str | None
) -> None:
    study = shared_study(4, 2, privacy={"noise_multiplier": 8.0})
    found = [str(each) for each in objections(policy(**shared), study, roster)]
    assert [each for each in found if why is None or why not in each] == []
    assert bool(found) == (why is not None)


def test_without_a_word_in_site_yaml_no_noise_is_shared() -> None:
    assert not SharedNoise().permit
    with pytest.raises(PolicyRefusal, match="permits none such"):
        raise objections(policy(), shared_study(), 6)[0]
