"""A coordinator that swaps keys, mixes sums or shrinks the cohort gets no agreement, or masks that do not cancel."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.sums import SEGMENTS, Federation, Sum, same, seed

from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import Identity
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.site import commitment, trailer_bytes
from consilium_shared.secagg.terms import Advert, Segment, Terms


def refused(attempt: Sum, site: str, terms: Terms, reason: str) -> None:
    """The site does not agree to these terms."""
    with pytest.raises(PeerError, match=reason):
        attempt.federation.parts[site].mask(attempt.states[site], terms)


# -- whose keys


def test_a_key_in_place_of_another_sites_is_refused(four: Federation) -> None:
    attempt = four.sum()
    mine = four.part("site-03").advertise(attempt.slot, "site-03", seed("mine"))[1]
    forged = Advert.sign(attempt.slot, "site-01", bytes.fromhex(mine.key), Identity.generate())
    copied = attempt.adverts["site-01"].model_copy(update={"key": mine.key})
    for each in (forged, copied):
        refused(attempt, "site-00", attempt.terms_with(adverts={**attempt.adverts, "site-01": each}), "verify")


def test_another_key_in_place_of_the_sites_own_is_refused_even_with_its_own_signature(four: Federation) -> None:
    attempt = four.sum()
    own = four.part("site-01").advertise(attempt.slot, "site-01", seed("other"))[1]
    refused(attempt, "site-01", attempt.terms_with(adverts={**attempt.adverts, "site-01": own}), "as it was sent")


def test_a_site_that_the_roster_does_not_name_is_refused(four: Federation) -> None:
    attempt, stranger = four.sum(), Identity.generate()
    advert = Advert.sign(attempt.slot, "site-99", seed("stranger"), stranger)
    refused(attempt, "site-00", attempt.terms_with(adverts={**attempt.adverts, "site-99": advert}), "not in the roster")


def test_one_sites_advertisement_under_another_name_is_refused(four: Federation) -> None:
    attempt = four.sum()
    swapped = {**attempt.adverts, "site-01": attempt.adverts["site-02"], "site-02": attempt.adverts["site-01"]}
    refused(attempt, "site-00", attempt.terms_with(adverts=swapped), "verify")


def test_one_key_for_two_sites_is_refused(four: Federation) -> None:
    attempt = four.sum()
    with pytest.raises(ValueError, match="the same key"):
        attempt.terms_with(adverts={**attempt.adverts, "site-01": attempt.adverts["site-02"]})


def test_an_advertisement_that_is_said_to_abandon_more_than_was_signed_is_refused(four: Federation) -> None:
    attempt = four.sum()
    more = attempt.adverts["site-01"].model_copy(update={"signed": (1,)})
    refused(attempt, "site-00", attempt.terms_with(adverts={**attempt.adverts, "site-01": more}), "verify")


@pytest.mark.parametrize("point", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
def test_a_key_that_would_make_the_agreement_known_to_everybody_is_refused(four: Federation, point: int) -> None:
    """Points of low order (RFC 7748, section 6.1; Bernstein 2006, section 3): the result is always zero."""
    attempt = four.sum()
    advert = Advert.sign(attempt.slot, "site-03", point.to_bytes(32, "little"), four.identities["site-03"])
    refused(attempt, "site-00", attempt.terms_with(adverts={**attempt.adverts, "site-03": advert}), "of no use")


def test_a_cohort_out_of_order_is_refused(four: Federation) -> None:
    attempt = four.sum()
    with pytest.raises(ValueError, match="sorted"):
        attempt.terms_with(adverts=dict(reversed(attempt.adverts.items())))


def test_a_site_without_a_handshake_is_in_no_cohort(four: Federation) -> None:
    attempt = four.sum()
    without = {peer: secret for peer, secret in four.secrets["site-00"].items() if peer != "site-02"}
    with pytest.raises(PeerError, match="no handshake with site-02"):
        four.part("site-00", secrets=without).mask(attempt.states["site-00"], attempt.terms)


def test_nobody_who_lacks_a_pairs_secret_has_its_masks_although_it_has_the_keys_of_the_sum(four: Federation) -> None:
    """Who breaks X25519 one day, and recorded everything, still lacks what ML-KEM gave."""
    attempt = four.sum()
    found = {}
    for secret in (four.secrets["site-00"]["site-01"], seed("guess")):
        part = four.part("site-00", secrets={**four.secrets["site-00"], "site-01": secret})
        found[secret] = part.mask(attempt.states["site-00"], attempt.terms)[1].mask_keys(SEGMENTS[0])[0]
    right, wrong = found.values()
    assert [one == other for one, other in zip(right, wrong, strict=True)] == [True, False, True, True]


# -- which sum


@pytest.mark.parametrize(
    "change",
    [
        {"federation": digest(b"other")},
        {"study": digest(b"other")},
        {"roster": digest(b"other")},
        {"purpose": "evaluation"},
        {"round": 2},
        {"attempt": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_keys_of_one_sum_serve_no_other(four: Federation, change: dict[str, Any]) -> None:
    attempt, other = four.sum(), four.sum(slot=four.slot(**change))
    refused(attempt, "site-00", other.terms, "another slot")
    mixed = {**attempt.adverts, "site-01": other.adverts["site-01"]}
    refused(attempt, "site-00", attempt.terms_with(adverts=mixed), "verify")
    spread = other.terms_with(adverts=attempt.adverts)
    refused(other, "site-00", spread, "as it was sent")


@pytest.mark.parametrize(
    "change",
    [
        {"model": digest(b"other")},
        {"segments": (Segment(name="update", bits=32, length=7), SEGMENTS[1])},
        {"segments": (Segment(name="update", bits=16, length=6), SEGMENTS[1])},
        {"segments": (Segment(name="weight", bits=32, length=6), SEGMENTS[1])},
        {"segments": SEGMENTS[::-1]},
        {"segments": SEGMENTS[:1]},
        {"threat_model": "honest-but-curious"},
    ],
)
def test_a_sum_that_was_agreed_to_is_not_changed_afterwards(four: Federation, change: dict[str, Any]) -> None:
    attempt = four.sum()
    attempt.mask("site-00")
    refused(attempt, "site-00", attempt.terms_with(**change), "used for another sum")


@pytest.mark.parametrize(
    "change",
    [
        {"model": digest(b"other")},
        {"segments": (*SEGMENTS, Segment(name="more", bits=16, length=1))},
        {"threat_model": "honest-but-curious"},
    ],
)
def test_sites_that_are_told_different_things_share_no_mask_and_no_share(
    four: Federation, change: dict[str, Any]
) -> None:
    """Pasquini et al. 2022: of different models the sum would show one site's update. Here nothing cancels."""
    attempt = four.sum()
    attempt.mask("site-00", "site-01", "site-02")
    other, told = attempt.terms_with(**change), {}
    for site, terms in (("site-02", attempt.terms), ("site-03", other)):
        contribution = four.parts[site].mask(attempt.states[site], terms)[1]
        seeds = {*contribution._plus, *contribution._minus}
        told[site] = seeds.union(*(side for each in SEGMENTS for side in contribution.mask_keys(each)))
    assert not told["site-02"] & told["site-03"]
    attempt.states["site-03"], contribution = four.parts["site-03"].mask(attempt.states["site-03"], other)
    fitting = bytes(attempt.terms.masked_bytes) + contribution.trailer[-trailer_bytes(attempt.terms) :]
    attempt.sent["site-03"] = fitting
    attempt.close()
    with pytest.raises(PeerError, match="altered"):
        attempt.sign("site-00")


def test_two_models_leave_noise_in_the_sum_even_if_every_share_were_given(four: Federation) -> None:
    """The masks of one pair under two models differ in every word, so their sum is no zero."""
    attempt = four.sum()
    low = four.parts["site-00"].mask(attempt.states["site-00"], attempt.terms)[1]
    high = four.parts["site-01"].mask(attempt.states["site-01"], attempt.terms_with(model=digest(b"other")))[1]
    same_model = four.parts["site-01"].mask(attempt.states["site-01"], attempt.terms)[1]
    plus = low.mask_keys(SEGMENTS[0])[0][1]
    assert plus == same_model.mask_keys(SEGMENTS[0])[1][0]
    assert plus != high.mask_keys(SEGMENTS[0])[1][0]


def test_a_sites_own_mask_and_its_shares_are_others_under_other_terms(four: Federation) -> None:
    """A coordinator that got both would have two vectors under one mask, or two polynomials with one coefficient."""
    attempt = four.sum()
    part, state, seen = four.parts["site-00"], attempt.states["site-00"], []
    for terms in (attempt.terms, attempt.terms_with(model=digest(b"other"))):
        seeds = part._seeds(state, terms, part._agreed(state, terms))
        zeros = dict.fromkeys(terms.cohort, bytes(KEY_BYTES))
        seen.append({*seeds.values(), *part._shares(state, terms, zeros).values()})
        assert len(seen[-1]) == 8
    assert not seen[0] & seen[1]


def test_every_segment_has_masks_of_its_own(four: Federation) -> None:
    attempt = four.sum()
    contribution = four.parts["site-01"].mask(attempt.states["site-01"], attempt.terms)[1]
    found = [key for segment in SEGMENTS for side in contribution.mask_keys(segment) for key in side]
    assert len(set(found)) == len(found) == 8


def test_a_round_that_is_replayed_gets_the_same_bytes_and_nothing_new(four: Federation) -> None:
    attempt = four.sum()
    first, second = attempt.opened(), four.sum()
    before = dict(attempt.sent)
    attempt.mask()
    assert attempt.sent == before
    second.states = attempt.states
    second.close()
    second.sign()
    second.release()
    assert same(second.total.open(), first)


# -- how few


def test_a_cohort_below_the_minimum_is_refused() -> None:
    federation = Federation(5, minimum=4, handshake=False)
    attempt = federation.sum(cohort=federation.names[:3])
    refused(attempt, "site-00", attempt.terms, "fewer than the 4")
    federation.sum(cohort=federation.names[:4]).mask()


def test_a_sum_of_fewer_than_the_minimum_or_the_threshold_is_signed_by_nobody() -> None:
    for minimum, least in ((2, 4), (5, 5)):
        federation = Federation(5, minimum=minimum, handshake=False)
        attempt = federation.sum()
        attempt.fold(*federation.names[: least - 1])
        with pytest.raises(PeerError, match=f"at least {least}"):
            attempt.total.close(minimum)
        attempt.total._closed = True  # a coordinator that does not care
        with pytest.raises(PeerError, match=f"at least {least}"):
            attempt.sign("site-00")
        assert attempt.states["site-00"].stage == "masked"


def test_there_is_no_cohort_of_one(four: Federation) -> None:
    attempt = four.sum()
    with pytest.raises(ValueError, match="at least 2"):
        attempt.terms_with(adverts={"site-00": attempt.adverts["site-00"]})


def test_sites_that_the_coordinator_invents_cannot_stand_around_one_honest_site(four: Federation) -> None:
    attempt = four.sum()
    invented = {site: Identity.generate() for site in four.names[1:]}
    adverts = {site: Advert.sign(attempt.slot, site, seed(site), key) for site, key in invented.items()}
    cohort = {"site-00": attempt.adverts["site-00"], **adverts}
    refused(attempt, "site-00", attempt.terms_with(adverts=cohort), "verify")


def test_a_commitment_is_to_one_seed_of_one_pair_in_one_sum(four: Federation) -> None:
    attempt = four.sum()
    other = attempt.terms_with(model=digest(b"other"))
    right = commitment(attempt.terms, "site-00", "site-01", seed("one"))
    assert commitment(attempt.terms, "site-01", "site-00", seed("one")) == right, "both ends make the same"
    changed = [
        commitment(other, "site-00", "site-01", seed("one")),
        commitment(attempt.terms, "site-00", "site-02", seed("one")),
        commitment(attempt.terms, "site-00", "site-00", seed("one")),
        commitment(attempt.terms, "site-00", "site-01", seed("other")),
    ]
    assert len({right, *changed}) == 5


def test_no_two_parts_of_a_sum_have_one_name(four: Federation) -> None:
    """They would have one mask: a keystream that is used twice shows the difference of what it covers."""
    attempt = four.sum()
    with pytest.raises(ValueError, match="the same name"):
        attempt.terms_with(segments=(SEGMENTS[0], SEGMENTS[0].model_copy(update={"length": 9})))


def test_an_advertisement_is_of_one_site_even_where_two_had_one_identity(four: Federation) -> None:
    attempt = four.sum()
    attempt.adverts["site-01"].verify(attempt.slot, "site-01", four.public["site-01"])
    with pytest.raises(SignatureError):
        attempt.adverts["site-01"].verify(attempt.slot, "site-02", four.public["site-01"])
