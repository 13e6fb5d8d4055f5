"""A coordinator that lies about who is in the sum gets shares of one set at most, and of no site both kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.sums import MODEL, Federation, Sum, Whole, same

from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.secagg import shamir
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SiteState, sealed_bytes
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, corrupt, threshold

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
    expected: list[bytes] = []
    kept: list[bytes] = []
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
    sealed: dict[str, dict[tuple[str, ...], bytes]] = {site: {} for site in federation.names}
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
