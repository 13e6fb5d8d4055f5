"""Every state and every message: what is not allowed raises, and leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.sums import Federation, Sum, Whole, same

from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SiteState, sealed_bytes
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN

SITE = "site-00"


# -- a site


def reach_site(federation: Federation, stage: str) -> Sum:
    """A sum in which SITE has come so far; the coordinator's end has all that the next steps need."""
    attempt = federation.sum()
    part, fresh = federation.parts[SITE], attempt.states[SITE]
    attempt.mask()
    masked = attempt.states[SITE]
    attempt.close()
    attempt.sign()
    signed = attempt.states[SITE]
    attempt.release(SITE)
    stages = [fresh, masked, signed, attempt.states[SITE], part.abandon(masked)]
    attempt.states[SITE] = next(state for state in stages if state.stage == stage)
    return attempt


SITE_MESSAGES: dict[str, Callable[[Sum, SiteState], Any]] = {
    "mask": lambda s, state: s.federation.parts[SITE].mask(state, s.terms),
    "mask others": lambda s, state: s.federation.parts[SITE].mask(state, s.terms_with(model=digest(b"other"))),
    "sign": lambda s, state: s.federation.parts[SITE].sign(state, s.total.survivors, s.total.sealed_for(SITE)),
    "sign others": lambda s, state: s.federation.parts[SITE].sign(
        state, s.federation.names[:3], s.total.sealed_for(SITE)[: 2 * sealed_bytes(s.terms)]
    ),
    "release": lambda s, state: s.federation.parts[SITE].release(state, s.total.signatures, s.total.sealed_for(SITE)),
    "abandon": lambda s, state: (s.federation.parts[SITE].abandon(state),),
}
LEADS_TO = {
    ("advertised", "mask"): "masked",
    ("advertised", "mask others"): "masked",
    ("advertised", "abandon"): "abandoned",
    ("masked", "mask"): "masked",
    ("masked", "sign"): "signed",
    ("masked", "sign others"): "signed",
    ("masked", "abandon"): "abandoned",
    ("signed", "mask"): "signed",
    ("signed", "sign"): "signed",
    ("signed", "release"): "released",
    ("released", "mask"): "released",
    ("released", "sign"): "released",
    ("released", "release"): "released",
    ("abandoned", "abandon"): "abandoned",
}
"""All else is refused."""
STAGES = ("advertised", "masked", "signed", "released", "abandoned")


@pytest.mark.parametrize("message", SITE_MESSAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_site_does_what_its_state_allows_and_nothing_else(four: Federation, stage: str, message: str) -> None:
    attempt = reach_site(four, stage)
    state = attempt.states[SITE]
    before = state.to_bytes()
    if (stage, message) in LEADS_TO:
        assert SITE_MESSAGES[message](attempt, state)[0].stage == LEADS_TO[stage, message]
    else:
        with pytest.raises(PeerError):
            SITE_MESSAGES[message](attempt, state)
    assert state.to_bytes() == before


@pytest.mark.parametrize(("stage", "message"), LEADS_TO)
def test_a_site_that_is_killed_before_or_after_any_step_sends_the_same_bytes(
    four: Federation, stage: str, message: str
) -> None:
    attempt = reach_site(four, stage)
    state, asked = attempt.states[SITE], SITE_MESSAGES[message]
    first, second = asked(attempt, state), asked(attempt, SiteState.from_bytes(state.to_bytes()))
    assert first == second
    assert SiteState.from_bytes(first[0].to_bytes()) == first[0]
    if (first[0].stage, message) in LEADS_TO:
        assert asked(attempt, SiteState.from_bytes(first[0].to_bytes())) == first


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_does_not_print_its_seed(four: Federation, stage: str) -> None:
    state = reach_site(four, stage).states[SITE]
    assert state.seed not in repr(state) + str(state) and "hidden" in repr(state)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "change",
    [
        {"stage": "masked", "terms": None},
        {"stage": "advertised", "survivors": ["site-00"]},
        {"stage": "abandoned", "survivors": ["site-00"]},
        {"stage": "signed", "survivors": None},
        {"stage": "released", "terms": None},
        {"stage": "done"},
        {"seed": "0"},
        {"more": 1},
    ],
)
def test_a_state_that_contradicts_itself_is_damaged(four: Federation, stage: str, change: dict[str, Any]) -> None:
    state = reach_site(four, stage).states[SITE]
    with pytest.raises(IntegrityError):
        SiteState.from_bytes(canonical_bytes({**state.model_dump(mode="json"), **change}))


# -- the coordinator

PHASES = ("taking", "closed", "signed", "shared", "opened")


def reach_total(federation: Federation, phase: str) -> Sum:
    """A sum that misses the last site, so far."""
    attempt = federation.sum()
    attempt.mask()
    attempt.fold(*federation.names[:3])
    if phase == "taking":
        return attempt
    attempt.total.close(2)
    sealed = {site: attempt.total.sealed_for(site) for site in attempt.total.survivors}
    if phase == "closed":
        return attempt
    attempt.sign()
    if phase == "signed":
        return attempt
    attempt.release()
    assert sealed == {site: attempt.total.sealed_for(site) for site in attempt.total.survivors}
    if phase == "opened":
        attempt.total.open()
    return attempt


def shares_of(attempt: Sum, site: str) -> bytes:
    survivors = 3 if attempt.total._closed else len(attempt.total.survivors)
    return attempt.total._shares.get(site, bytes(32 * survivors * 2))


def signature_of(attempt: Sum, site: str) -> bytes:
    signed = attempt.terms.survivors_signed(attempt.total.survivors)
    return attempt.federation.identities[site].sign(SURVIVORS_DOMAIN, signed)


TOTAL_MESSAGES: dict[str, Callable[[Sum], Any]] = {
    "fold": lambda s: s.total.fold("site-03", Whole(s.sent["site-03"])),
    "fold again": lambda s: s.total.fold(SITE, Whole(s.sent[SITE])),
    "fold a stranger": lambda s: s.total.fold("site-99", Whole(s.sent["site-03"])),
    "fold too little": lambda s: s.total.fold("site-03", Whole(s.sent["site-03"][:-1])),
    "fold too much": lambda s: s.total.fold("site-03", Whole(s.sent["site-03"] + b"x")),
    "fold nothing": lambda s: s.total.fold("site-03", Whole(b"")),
    "close": lambda s: s.total.close(2),
    "close with more than there are": lambda s: s.total.close(4),
    "sealed": lambda s: s.total.sealed_for(SITE),
    "sealed for the gone": lambda s: s.total.sealed_for("site-03"),
    "sealed for a stranger": lambda s: s.total.sealed_for("site-99"),
    "sign": lambda s: s.total.sign(SITE, signature_of(s, SITE)),
    "sign as another": lambda s: s.total.sign(SITE, signature_of(s, "site-01")),
    "sign as the gone": lambda s: s.total.sign("site-03", signature_of(s, "site-03")),
    "sign too short": lambda s: s.total.sign(SITE, signature_of(s, SITE)[:-1]),
    "share": lambda s: s.total.share(SITE, shares_of(s, SITE)),
    "share as the gone": lambda s: s.total.share("site-03", shares_of(s, SITE)),
    "share too little": lambda s: s.total.share(SITE, shares_of(s, SITE)[:-32]),
    "share too much": lambda s: s.total.share(SITE, shares_of(s, SITE) + bytes(32)),
    "open": lambda s: s.total.open(),
}
ALLOWED = {
    "taking": {"fold", "close"},
    "closed": {"close", "sealed", "sign"},
    "signed": {"close", "sealed", "sign", "share"},
    "shared": {"close", "sealed", "sign", "share", "open"},
    "opened": {"close", "sealed", "sign", "share"},
}
"""All else is refused. What may be asked again changes nothing the second time."""


def everything(attempt: Sum) -> dict[str, Any]:
    held = {name: value for name, value in vars(attempt.total).items() if name not in ("terms", "_identities")}
    return copy.deepcopy({**held, "_totals": {name: each.tobytes() for name, each in attempt.total._totals.items()}})


@pytest.mark.parametrize("message", TOTAL_MESSAGES)
@pytest.mark.parametrize("phase", PHASES)
def test_the_coordinators_end_takes_what_its_phase_allows_and_nothing_else(
    four: Federation, phase: str, message: str
) -> None:
    attempt = reach_total(four, phase)
    before = everything(attempt)
    if message in ALLOWED[phase]:
        TOTAL_MESSAGES[message](attempt)
        return
    with pytest.raises(PeerError):
        TOTAL_MESSAGES[message](attempt)
    assert everything(attempt) == before


def test_after_a_restart_only_the_closed_sets_vectors_are_taken_and_the_sum_is_the_same(four: Federation) -> None:
    attempt = reach_total(four, "shared")
    again = ServerSum(attempt.terms, four.public, attempt.total.survivors)
    assert again.missing() == four.names[:3]
    with pytest.raises(PeerError, match="not in the cohort"):
        again.fold("site-03", Whole(attempt.sent["site-03"]))
    for site in four.names[:3]:
        again.fold(site, Whole(attempt.sent[site]))
    assert again.missing() == () and again.close(2) == attempt.total.survivors
    for site, signature in attempt.total.signatures.items():
        again.sign(site, signature)
    for site in attempt.total.sharers:
        again.share(site, attempt.total._shares[site])
    assert same(again.open(), attempt.total.open())
