"""A coordinator that does not follow the protocol learns no more than the sum, and breaks nothing but its own round."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.attacks.federation import MODEL, SEGMENTS, Federation, Sum, Whole, same, seed

from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import Identity
from consilium_shared.secagg import shamir
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SiteState, sealed_bytes, trailer_bytes
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, Advert, Segment, Terms, corrupt, threshold


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
        told[site] = set(itertools.chain(*contribution.mask_keys(SEGMENTS[0])))
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


# -- who is in the sum


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        (("site-01", "site-02", "site-03"), "said to be gone"),
        (("site-00", "site-01", "site-02", "site-02"), "each once"),
        (("site-00", "site-02", "site-01"), "sorted"),
        (("site-00", "site-01", "site-99"), "within the cohort"),
        (("site-00", "site-01"), "at least 3"),
        ((), "said to be gone"),
    ],
)
def test_a_set_of_survivors_that_is_none_is_not_signed(
    four: Federation, survivors: tuple[str, ...], reason: str
) -> None:
    attempt = four.sum()
    attempt.close()
    sealed = bytes(sealed_bytes(attempt.terms) * len([site for site in survivors if site != "site-00"]))
    with pytest.raises(PeerError, match=reason):
        four.parts["site-00"].sign(attempt.states["site-00"], survivors, sealed)


def test_a_site_signs_one_set_ever(four: Federation) -> None:
    attempt = four.sum()
    attempt.close()
    attempt.sign()
    sealed = attempt.total.sealed_for("site-00")[: 2 * sealed_bytes(attempt.terms)]
    for stage in ("signed", "released"):
        assert attempt.states["site-00"].stage == stage
        with pytest.raises(PeerError, match="another set"):
            four.parts["site-00"].sign(attempt.states["site-00"], four.names[:3], sealed)
        attempt.release()


def test_a_site_does_not_sign_while_a_survivors_shares_are_not_at_hand(four: Federation) -> None:
    attempt = four.sum()
    attempt.close()
    sealed, size = attempt.total.sealed_for("site-00"), sealed_bytes(attempt.terms)
    other = four.sum(slot=four.slot(round=2))
    other.close()
    wrong = [
        sealed[:-1],
        sealed + bytes(1),
        sealed[size:],
        sealed + sealed[:size],
        sealed[size : 2 * size] + sealed[:size] + sealed[2 * size :],
        sealed[:size] * 3,
        attempt.total.sealed_for("site-01"),
        other.total.sealed_for("site-00"),
    ]
    for each in wrong:
        with pytest.raises(PeerError, match=r"sealed shares|altered"):
            four.parts["site-00"].sign(attempt.states["site-00"], attempt.total.survivors, each)
    assert attempt.states["site-00"].stage == "masked"


def test_shares_are_sealed_to_one_direction_of_one_pair(four: Federation) -> None:
    """What site-00 sealed to site-01 is nothing to site-00 when it is sent back as site-01's."""
    attempt = four.sum()
    attempt.close()
    size = sealed_bytes(attempt.terms)
    back = attempt.total._trailers["site-00"][:size]
    assert back == attempt.total.sealed_for("site-01")[:size]
    with pytest.raises(PeerError, match="altered"):
        sealed = back + attempt.total.sealed_for("site-00")[size:]
        four.parts["site-00"].sign(attempt.states["site-00"], four.names, sealed)


# -- what is released


def signatures(attempt: Sum, survivors: tuple[str, ...], *signers: str) -> dict[str, bytes]:
    """What these sites sign when they sign whatever they are asked."""
    keys = attempt.federation.identities
    return {site: keys[site].sign(SURVIVORS_DOMAIN, attempt.terms.survivors_signed(survivors)) for site in signers}


@pytest.fixture
def signed(four: Federation) -> Sum:
    """A sum that misses site-03, signed by everybody in it."""
    attempt = four.sum()
    attempt.close(*four.names[:3])
    attempt.sign()
    return attempt


WRONG_SIGNATURES: dict[str, Callable[[Sum], dict[str, bytes]]] = {
    "none": lambda _: {},
    "one too few": lambda s: dict(list(s.total.signatures.items())[:2]),
    "of another set": lambda s: signatures(s, s.federation.names, *s.total.survivors),
    "of another sum": lambda s: signatures(
        s.federation.sum(slot=s.federation.slot(round=2)), s.total.survivors, *s.total.survivors
    ),
    "one for all": lambda s: dict.fromkeys(s.total.survivors, s.total.signatures["site-00"]),
    "one is forged": lambda s: {**s.total.signatures, "site-01": bytes(64)},
    "of one who is gone": lambda s: {
        **dict(list(s.total.signatures.items())[:2]), **signatures(s, s.total.survivors, "site-03"),
    },
    "of a stranger": lambda s: {
        **dict(list(s.total.signatures.items())[:2]), "site-99": s.total.signatures["site-02"],
    },
    "under another label": lambda s: {
        **s.total.signatures,
        "site-01": s.federation.identities["site-01"].sign(
            "request", s.terms.survivors_signed(s.total.survivors)
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SIGNATURES)
def test_nothing_is_released_without_enough_signatures_over_the_very_same_set(signed: Sum, case: str) -> None:
    part, state = signed.federation.parts["site-00"], signed.states["site-00"]
    with pytest.raises(PeerError):
        part.release(state, WRONG_SIGNATURES[case](signed), signed.total.sealed_for("site-00"))


def test_the_threshold_of_signatures_is_enough_and_one_fewer_is_not(seven: Federation) -> None:
    attempt = seven.sum()
    attempt.close()
    attempt.sign()
    part, state, sealed = seven.parts["site-00"], attempt.states["site-00"], attempt.total.sealed_for("site-00")
    five = dict(list(attempt.total.signatures.items())[:5])
    part.release(state, five, sealed)
    with pytest.raises(PeerError, match="5 are needed"):
        part.release(state, dict(list(five.items())[:4]), sealed)


def test_shares_that_are_asked_for_twice_are_the_same_bytes(signed: Sum) -> None:
    part, sealed = signed.federation.parts["site-00"], signed.total.sealed_for("site-00")
    state, first = part.release(signed.states["site-00"], signed.total.signatures, sealed)
    again, second = part.release(state, signed.total.signatures, sealed)
    restarted = SiteState.from_bytes(again.to_bytes())
    assert first == second == part.release(restarted, signed.total.signatures, sealed)[1]
    assert part.sign(restarted, signed.total.survivors, sealed)[1] == signed.total.signatures["site-00"]


def own_shares(attempt: Sum, owner: str, holder: str) -> dict[str, bytes]:
    """The holder's shares of an owner's seeds, by the site that the owner has the seed with."""
    part, state, terms = attempt.federation.parts[owner], attempt.states[owner], attempt.terms
    shares = part._shares(state, terms, part._seeds(state, terms, part._agreed(state, terms)))
    share = shares[terms.point(holder)]
    return {peer: share[KEY_BYTES * at : KEY_BYTES * (at + 1)] for at, peer in enumerate(terms.cohort)}


def test_of_each_site_either_the_self_masks_shares_are_released_or_the_pairs_and_never_both(signed: Sum) -> None:
    part, sealed = signed.federation.parts["site-01"], signed.total.sealed_for("site-01")
    _, released = part.release(signed.states["site-01"], signed.total.signatures, sealed)
    given = [released[at : at + KEY_BYTES] for at in range(0, len(released), KEY_BYTES)]
    expected, kept = [], []
    for owner in signed.federation.names:
        for peer, share in own_shares(signed, owner, "site-01").items():
            alive = owner in signed.total.survivors
            wanted = alive and (peer == owner or peer not in signed.total.survivors)
            (expected if wanted else kept).append(share)
    assert given == expected
    assert not set(given) & set(kept)
    assert len(kept) == 16 - 6


def test_a_site_that_was_late_is_still_behind_its_self_mask(four: Federation) -> None:
    """The coordinator says that site-03 is gone, opens the sum, and has site-03's vector all the same."""
    attempt = four.sum()
    attempt.mask()
    late = attempt.sent["site-03"]
    attempt.close(*four.names[:3])
    attempt.sign()
    attempt.release()
    total = attempt.total
    pairs = {seed_ for seeds in total._seeds().values() for seed_ in seeds[1:]}
    contribution = four.parts["site-03"].mask(attempt.states["site-03"], attempt.terms)[1]
    plus, minus = contribution._plus, contribution._minus
    assert set(minus) == pairs, "every mask that it has with others is known by now"
    (own,) = plus
    blocks = {each[at : at + KEY_BYTES] for each in total._shares.values() for at in range(0, len(each), KEY_BYTES)}
    of_own = {own_shares(attempt, "site-03", holder)["site-03"] for holder in four.names}
    assert own not in pairs and not blocks & of_own
    assert late[: attempt.terms.masked_bytes] != b"".join(v.tobytes() for v in attempt.vectors["site-03"].values())


def test_shares_of_another_site_are_not_taken_for_its_own(seven: Federation) -> None:
    """At another holder's point they give other seeds, which the commitments show."""
    attempt = seven.sum()
    attempt.close(*seven.names[:5])
    attempt.sign()
    attempt.release()
    shares = attempt.total._shares
    shares["site-00"], shares["site-04"] = shares["site-04"], shares["site-00"]
    with pytest.raises(PeerError, match=f"committed to by: {', '.join(seven.names[:5])}"):
        attempt.total.open()
    shares["site-00"], shares["site-04"] = shares["site-04"], shares["site-00"]
    assert same(attempt.total.open(), attempt.plain(*seven.names[:5]))


def views(names: tuple[str, ...], least: int) -> list[tuple[str, ...]]:
    """Every set of survivors that somebody could be shown."""
    return [each for size in range(least, len(names) + 1) for each in itertools.combinations(names, size)]


def opened_sets(federation: Federation, attempt: Sum, shown: dict[str, tuple[str, ...]], liars: set[str]) -> set[Any]:
    """The sets of survivors for which the coordinator gets any honest site's shares, liars signing everything."""
    sealed = {site: {} for site in federation.names}
    for survivors in set(shown.values()):
        total = ServerSum(attempt.terms, federation.public, survivors)
        for site in survivors:
            total.fold(site, Whole(attempt.sent[site]))
        total._closed = True
        for site in survivors:
            sealed[site][survivors] = total.sealed_for(site)
    given: dict[Any, dict[str, bytes]] = {each: {} for each in shown.values()}
    states = dict(attempt.states)
    for site, survivors in shown.items():
        if site in survivors:
            states[site], given[survivors][site] = federation.parts[site].sign(
                states[site], survivors, sealed[site][survivors]
            )
    for survivors, mine in given.items():
        mine.update(signatures(attempt, survivors, *(liars & set(survivors))))
    opened = set()
    for site, survivors in shown.items():
        for claimed in given.values():
            try:
                federation.parts[site].release(states[site], claimed, sealed[site].get(survivors, b""))
            except PeerError:
                continue
            opened.add(survivors)
    return opened


def test_no_two_sets_of_survivors_are_ever_opened_whatever_each_site_is_shown(four: Federation) -> None:
    """Every way to show two sets to three honest sites, while the fourth signs whatever it is asked."""
    attempt = four.sum()
    attempt.mask()
    honest, count = four.names[:3], 0
    for one, other in itertools.combinations(views(four.names, attempt.terms.threshold), 2):
        for choice in itertools.product((one, other), repeat=3):
            opened = opened_sets(four, attempt, dict(zip(honest, choice, strict=True)), {"site-03"})
            assert len(opened) <= 1
            count += len(opened)
    assert count, "and some are opened, or the test would say nothing"


def test_two_liars_of_seven_do_not_get_two_sets_opened(seven: Federation) -> None:
    attempt = seven.sum()
    attempt.mask()
    honest, liars = seven.names[:5], set(seven.names[5:])
    assert len(liars) == seven.corrupt
    without = [tuple(site for site in seven.names if site != gone) for gone in honest[:2]]
    for first in range(6):
        shown = {site: (without[0] if number < first else without[1]) for number, site in enumerate(honest)}
        assert len(opened_sets(seven, attempt, shown, liars)) <= 1
    agreed = dict.fromkeys(honest[1:], without[0])
    assert opened_sets(seven, attempt, agreed, liars) == {without[0]}


@pytest.mark.parametrize("sites", range(2, 101))
def test_the_honest_sites_cannot_be_split_into_two_halves_that_both_open(sites: int) -> None:
    """2 t > n + n_C (Bonawitz et al. 2017, theorem 6.5), and the liars alone never open anything."""
    needed, liars = threshold(sites, "malicious-server"), corrupt(sites, "malicious-server")
    assert 2 * needed > sites + liars
    assert liars < needed <= sites
    assert 3 * liars < sites <= 3 * liars + 3
    assert 2 * threshold(sites, "honest-but-curious") > sites >= threshold(sites, "honest-but-curious") >= 2
    assert corrupt(sites, "honest-but-curious") == 0


def test_fewer_shares_than_the_threshold_open_nothing(seven: Federation) -> None:
    attempt = seven.sum()
    attempt.close()
    attempt.sign()
    attempt.release(*seven.names[:4])
    with pytest.raises(PeerError, match="5 are needed"):
        attempt.total.open()
    shares = {attempt.terms.point(site): each for site, each in attempt.total._shares.items()}
    assert not attempt.total._as_committed("site-00", [shamir.combine(shares)[:KEY_BYTES]])


def test_the_coordinators_sum_is_the_plain_sum_of_the_survivors_and_not_of_others(seven: Federation) -> None:
    attempt = seven.sum()
    survivors = tuple(site for site in seven.names if site not in ("site-02", "site-05"))
    total = attempt.opened(*survivors)
    assert same(total, attempt.plain(*survivors)) and not same(attempt.plain(), attempt.plain(*survivors))
    assert total["update"].dtype == np.dtype("<u4") and total["counts"].dtype == np.dtype("<u8")
    assert attempt.terms.model == MODEL


def test_a_signature_over_survivors_is_none_over_anything_else(signed: Sum) -> None:
    with pytest.raises(SignatureError):
        signed.federation.public["site-00"].verify(
            "answer", signed.terms.survivors_signed(signed.total.survivors), signed.total.signatures["site-00"]
        )
