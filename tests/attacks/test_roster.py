"""Fewer than a third of the roster help the coordinator, which puts all of them into one small cohort with a victim."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tests.attacks.test_survivors import opened_sets, views
from tests.support.site import CONTRACT
from tests.support.sums import Federation, Sum, Whole

from consilium_client.policy import SitePolicy, check_corrupt, check_sites
from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import PeerError, PolicyRefusal
from consilium_shared.secagg.terms import Terms, corrupt, holds_against, least_sites, threshold, tolerated
from consilium_shared.study import Aggregation, Study


def rules(**changes: Any) -> Aggregation:
    """As a new study without a word on it has them, but for the changes."""
    return Study.model_validate({**CONTRACT, "aggregation": {"min_sites": 2, **changes}}).aggregation


def old(**changes: Any) -> Aggregation:
    """As a contract has them that came before the key."""
    found = Study.model_validate({**CONTRACT, "aggregation": {"min_sites": 2, **changes}, "schema_version": 1})
    assert "corrupt_sites" not in found.contract["aggregation"]
    return found.aggregation


@pytest.fixture(scope="module")
def ten() -> Federation:
    """Ten sites, of which three may lie."""
    study = rules()
    least = least_sites(study, 10)
    return Federation(10, minimum=least, tolerated=tolerated(study, 10), handshake=False)


def test_no_sum_shows_a_victim_with_fewer_than_a_third_of_the_roster_as_helpers(ten: Federation) -> None:
    assert ten.minimum == 5 and ten.corrupt == 3
    for size in range(2, 5):
        attempt = ten.sum(cohort=ten.names[:size])
        with pytest.raises(PeerError, match="fewer than the 5"):
            attempt.mask("site-00")
    attempt = ten.sum(cohort=ten.names[:5])
    opened, helpers = attempt.opened(), ten.names[2:5]
    left = opened["update"] - attempt.plain(*helpers)["update"]
    assert np.array_equal(left, attempt.plain(*ten.names[:2])["update"]), "what the helpers cannot take off is of two"


def test_a_minimum_of_two_is_not_believed_under_terms_that_say_how_many_may_lie() -> None:
    """Whoever calls the state machines with a smaller number than the terms support gets the terms' number."""
    wrong = Federation(10, minimum=2, tolerated=3, handshake=False)
    with pytest.raises(PeerError, match="4 sites, fewer than the 5"):
        wrong.sum(cohort=wrong.names[:4]).mask("site-00")
    attempt = wrong.sum(cohort=wrong.names[:6], counting=wrong.names[:4])
    attempt.mask()
    assert not any(wrong.parts[s].adds_counts(state, attempt.terms) for s, state in attempt.states.items()), "of four"
    attempt = wrong.sum(cohort=wrong.names[:7], counting=wrong.names[:5])
    attempt.mask()
    assert all(wrong.parts[site].adds_counts(attempt.states[site], attempt.terms) for site in wrong.names[:5])
    for site in attempt.cohort[1:]:
        attempt.total.fold(site, Whole(attempt.sent[site]))
    with pytest.raises(PeerError, match="4 of the survivors have added counts, and the least is 5"):
        attempt.total.close(2)
    with pytest.raises(PeerError, match="4 of the survivors have added counts, and the least is 5"):
        wrong.parts["site-01"].sign(attempt.states["site-01"], attempt.cohort[1:], b"")


@pytest.mark.parametrize("size", [5, 6, 7])
def test_three_liars_of_ten_who_meet_in_one_cohort_do_not_get_two_sets_opened(ten: Federation, size: int) -> None:
    """With five of seven needed, as a cohort of seven alone would ask for, two halves of the honest would open two."""
    attempt = ten.sum(cohort=ten.names[:size])
    attempt.mask()
    liars, honest = attempt.cohort[:3], attempt.cohort[3:]
    sets = [each for each in views(attempt.cohort, ten.minimum) if set(liars) <= set(each)]
    count = 0
    for one, other in itertools.combinations(sets, 2):
        for choice in itertools.product((one, other), repeat=len(honest)):
            shown = {site: each for site, each in zip(honest, choice, strict=True) if site in each}
            if len(set(shown.values())) < 2:
                continue
            needed = attempt.terms.threshold
            assert min(sum(v == s for v in shown.values()) for s in (one, other)) + len(liars) < needed
            count += 1
    assert count or size == 5
    if size == 7:
        assert threshold(7, "malicious-server") == 5 and attempt.terms.threshold == 6
        halves = {liars + honest[:2]: honest[:2], liars + honest[2:]: honest[2:]}
        shown = {site: survivors for survivors, half in halves.items() for site in half}
        with pytest.raises(PeerError, match="at least 6"):
            opened_sets(ten, attempt, shown, set(liars))


@pytest.mark.parametrize("roster", range(2, 41))
def test_by_default_every_cohort_of_every_roster_holds_against_fewer_than_a_third_of_it(roster: int) -> None:
    liars, study = corrupt(roster, "malicious-server"), rules()
    least = least_sites(study, roster)
    assert 3 * liars < roster and liars + 2 == least <= roster
    assert holds_against(study, roster, liars)
    for cohort in range(least, roster + 1):
        needed = threshold(cohort, "malicious-server", tolerated(study, roster))
        assert liars < needed <= cohort and 2 * needed > cohort + liars
    assert threshold(roster, "malicious-server", liars) == threshold(roster, "malicious-server"), "nothing for a whole"


@pytest.mark.parametrize("roster", range(4, 31))
def test_an_attempt_is_dead_when_the_rest_and_all_liars_of_the_roster_are_too_few(roster: int) -> None:
    study = rules()
    liars, least = corrupt(roster, "malicious-server"), least_sites(study, roster)
    for size in {least, (least + roster) // 2, roster}:
        federation = Federation(size, handshake=False, tolerated=tolerated(study, roster))
        terms = Sum(federation).terms
        for promised in range(size + 1):
            given = {site: advert for number, (site, advert) in enumerate(terms.adverts.items()) if number < promised}
            can_sign = size - promised + min(liars, promised)
            assert not terms.dead(given) or can_sign < terms.threshold
        assert terms.enough_to_abandon <= terms.threshold, "enough to open it are enough to give it up"


@pytest.mark.parametrize("roster", range(2, 15))
def test_a_contract_that_a_policy_accepts_lets_false_promises_of_its_liars_end_no_attempt(roster: int) -> None:
    """Whatever the contract says: liars who promise to sign nothing and sign are never enough with those who may."""
    accepted = 0
    for least, told, liars in itertools.product(range(2, roster + 1), (None, "third", 0, 1, 2, 3), range(roster - 1)):
        study = rules().model_copy(update={"min_sites": least, "corrupt_sites": told})
        if not holds_against(study, roster, liars):
            continue
        for size in range(least_sites(study, roster), roster + 1):
            terms = Terms.model_construct(
                adverts=dict.fromkeys(range(size)),
                threat_model="malicious-server",
                corrupt=tolerated(study, roster),
            )
            for promised in range(terms.enough_to_abandon, size + 1):
                assert size - promised + min(liars, promised) < terms.threshold, (least, told, liars, size)
                accepted += 1
    assert accepted


def test_where_one_of_a_smaller_cohort_lies_about_giving_up_a_fourth_is_shown_and_so_no_policy_takes_it() -> None:
    """All of three sign, and the one who lies promises for the next attempt that it has not: the fourth comes then."""
    federation = Federation(4, minimum=3, handshake=False)
    liar, *honest = first = federation.names[:3]
    one = federation.sum(cohort=first)
    opened, told = one.opened(), dict.fromkeys(honest, (1,))
    again = federation.sum(slot=federation.slot(attempt=2), signed=told)
    again.vectors = {**again.vectors, **one.vectors}
    assert one.terms.dead({liar: again.adverts[liar]})
    left = again.opened()["update"] - opened["update"]
    assert np.array_equal(left, again.vectors[federation.names[3]]["update"])
    for rule in ({"schema_version": 1}, {"aggregation": {"min_sites": 3, "corrupt_sites": 0}}):
        study = Study.model_validate({**CONTRACT, "aggregation": {"min_sites": 3}, **rule})
        with pytest.raises(PolicyRefusal, match="does not hold against 1 of its 4 sites"):
            check_corrupt(SitePolicy(budgets={}), study, 4)


def test_a_contract_says_openly_against_how_many_it_holds_and_a_policy_what_it_asks_for() -> None:
    policy, study = SitePolicy(budgets={}), Study.model_validate(CONTRACT)
    few = study.model_copy(update={"aggregation": rules(corrupt_sites=1)})
    assert (least_sites(study.aggregation, 20), least_sites(few.aggregation, 20)) == (8, 3)
    check_corrupt(policy, study, 20)
    with pytest.raises(PolicyRefusal, match=r"6 of its 20 sites .*fewer than a third.*aggregation.corrupt_sites"):
        check_corrupt(policy, few, 20)
    check_corrupt(SitePolicy(budgets={}, corrupt_sites=1), few, 20)
    with pytest.raises(PolicyRefusal, match="2 of its 20 sites helping"):
        check_corrupt(SitePolicy(budgets={}, corrupt_sites=2), few, 20)
    with pytest.raises(PolicyRefusal, match="adds up 8 sites, this site asks for 9"):
        check_sites(SitePolicy(budgets={}, minimum_sites=9), study, 20)
    check_sites(SitePolicy(budgets={}, minimum_sites=8), study, 20)


def test_a_contract_older_than_the_key_means_what_it_meant_and_is_approved_where_that_is_enough() -> None:
    assert tolerated(old(), 10) is None and least_sites(old(), 10) == 2
    assert holds_against(old(), 3, corrupt(3, "malicious-server"))
    assert not holds_against(old(), 10, 3) and holds_against(old(min_sites=10), 10, 3)


def test_where_nobody_cheats_nobody_helps() -> None:
    study = rules(threat_model="honest-but-curious")
    assert least_sites(study, 30) == 2 and tolerated(study, 30) is None
    contract = {**CONTRACT, "aggregation": study.model_dump(mode="json")}
    check_corrupt(SitePolicy(budgets={}), Study.model_validate(contract), 30)


def test_the_digest_of_terms_without_the_number_is_what_it_was(four: Federation) -> None:
    """Sums of older contracts, in evidence and under way, stay verifiable."""
    attempt = four.sum()
    told = attempt.terms.model_dump(mode="json")
    del told["corrupt"]
    assert attempt.terms.digest == canonical_digest({"protocol": "consilium-secagg/1", "terms": told})
    assert attempt.terms_with(corrupt=1).digest != attempt.terms.digest
