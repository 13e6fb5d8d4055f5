"""Nobody's evaluation counts are opened alone, whoever else is in the sum and whoever goes away."""

from __future__ import annotations

import itertools

import pytest
from tests.support.sums import Federation, Sum, same

from consilium_shared.errors import PeerError
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN


def shown(attempt: Sum, *survivors: str) -> None:
    """A coordinator that closes whatever set it likes."""
    attempt.fold(*survivors)
    attempt.total._closed = True


def test_no_site_signs_a_set_with_one_sites_counts_whether_or_not_it_adds_some_itself(seven: Federation) -> None:
    attempt = seven.sum(counting=seven.names[:2])
    shown(attempt, *(site for site in seven.names if site != "site-01"))
    for site in attempt.total.survivors:
        with pytest.raises(PeerError, match="1 of the survivors have added counts"):
            attempt.sign(site)
    assert not attempt.total.signatures


def test_the_coordinator_does_not_close_a_set_that_no_honest_site_signs(seven: Federation) -> None:
    attempt = seven.sum(counting=seven.names[:2])
    with pytest.raises(PeerError, match="1 of the survivors have added counts"):
        attempt.close(*seven.names[1:])
    assert same(attempt.opened("site-00"), attempt.plain()), "it takes the other one's vector still"


def test_where_all_who_offered_counts_are_gone_the_sum_is_opened_without_any(seven: Federation) -> None:
    attempt = seven.sum(counting=seven.names[:2])
    opened = attempt.opened(*seven.names[2:])
    assert not opened["counts"].any() and same(opened, attempt.plain(*seven.names[2:]))


def test_where_too_few_of_a_cohort_offer_counts_nobody_adds_any_and_anybody_may_go(seven: Federation) -> None:
    attempt = seven.sum(counting=("site-03",))
    assert not attempt.vectors["site-03"]["counts"].any()
    opened = attempt.opened(*seven.names[:5])
    assert not opened["counts"].any() and opened["update"].any()


def test_whoever_offers_counts_and_whoever_survives_an_opened_sum_has_none_or_those_of_enough(four: Federation) -> None:
    """Every choice of both, with a liar among the survivors who signs and releases all that it is asked for."""
    found = set()
    for size in range(5):
        for counting in itertools.combinations(four.names, size):
            for survivors in (four.names, *itertools.combinations(four.names, 3)):
                attempt = four.sum(counting=counting)
                shown(attempt, *survivors)
                liar = survivors[-1]
                signed = attempt.terms.survivors_signed(survivors)
                attempt.total.sign(liar, four.identities[liar].sign(SURVIVORS_DOMAIN, signed))
                adding = [site for site in survivors if attempt.vectors[site]["counts"].any()]
                try:
                    attempt.sign(*survivors[:-1])
                except PeerError:
                    assert len(adding) == 1
                    continue
                assert len(adding) != 1
                found.add(len(adding))
    assert found == {0, 2, 3, 4}


def test_masks_are_bound_to_the_result_and_to_whether_its_counts_are_under_them(four: Federation) -> None:
    attempt = four.sum()
    attempt.mask()
    part, state = four.parts["site-00"], attempt.states["site-00"]
    bound = part.bind(state, "a" * 64, counted=True)
    assert part.bind(bound, "a" * 64, counted=True) == bound
    for result, counted in (("a" * 64, False), ("b" * 64, True)):
        with pytest.raises(PeerError, match="another result"):
            part.bind(bound, result, counted=counted)


def test_what_masks_of_an_older_version_hide_is_not_guessed(four: Federation) -> None:
    """Such a state names the result alone, and is read all the same."""
    attempt = four.sum()
    attempt.mask()
    state = attempt.states["site-00"]
    old = state.model_validate({**state.model_dump(), "result": "a" * 64})
    assert type(old).from_bytes(old.to_bytes().replace(b'"counted":null,', b"")) == old
    for counted in (False, True):
        with pytest.raises(PeerError, match="other counts"):
            four.parts["site-00"].bind(old, "a" * 64, counted=counted)
