"""What the coordinator and colluding sites see together is the same for any updates of the others with the same sum."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from tests.support.sums import SEGMENTS, Federation, Sum, masked, same, words

from consilium_shared.errors import PeerError
from consilium_shared.secagg import prg, ring, shamir
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.terms import ADVERT_DOMAIN, Segment

ONE, OTHER = "site-00", "site-01"


def uniform_between(attempt: Sum) -> dict[str, Any]:
    """The mask between the two sites, by segment: to whoever lacks its key, uniform integers."""
    keys = attempt.federation.parts[ONE].mask(attempt.states[ONE], attempt.terms)[1]
    found = {}
    for segment in attempt.terms.segments:
        found[segment.name] = np.zeros(segment.length, ring.DTYPES[segment.bits])
        prg.apply(found[segment.name], keys.mask_keys(segment)[0][1:2], [])
    return found


def view(attempt: Sum, between: dict[str, Any], survivors: tuple[str, ...], liars: tuple[str, ...]) -> list[Any]:
    """All that the coordinator and the liars have at the end, with that mask between the two sites."""
    right = uniform_between(attempt)
    attempt.mask()
    for site, sign in ((ONE, np.add), (OTHER, np.subtract)):
        vector = {name: sign(attempt.vectors[site][name], between[name] - right[name]) for name in between}
        contribution = attempt.federation.parts[site].mask(attempt.states[site], attempt.terms)[1]
        attempt.sent[site] = masked(contribution, vector)
    attempt.close(*survivors)
    attempt.sign()
    attempt.release()
    shares = dict(attempt.total._shares)
    inside = [(attempt.states[site].to_bytes(), attempt.federation.secrets[site]) for site in liars]
    seeds = attempt.total._seeds()
    total = {name: each.tobytes() for name, each in attempt.total.open().items()}
    own = [{name: each.tobytes() for name, each in attempt.vectors[site].items()} for site in liars]
    return [attempt.terms, attempt.sent, attempt.total.signatures, shares, inside, seeds, total, own]


@pytest.mark.parametrize("gone", [(), ("site-02",), ("site-06",), ("site-02", "site-05")])
def test_two_updates_with_the_same_sum_give_the_same_view(seven: Federation, gone: tuple[str, ...]) -> None:
    """Every byte: what was sent, signed and shared, the liars' own states, the seeds that were opened, and the sum.

    To each view of the first updates belongs exactly one value of the mask between the two sites with which the second
    updates give it. That mask is uniform to everyone who lacks its key, so neither updates are the likelier ones.
    """
    survivors = tuple(site for site in seven.names if site not in gone)
    first = seven.sum()
    moved: dict[str, Any] = {segment.name: words(segment, "moved") for segment in SEGMENTS}
    second = seven.sum(vectors=dict(first.vectors))
    second.vectors[ONE] = {name: first.vectors[ONE][name] + moved[name] for name in moved}
    second.vectors[OTHER] = {name: first.vectors[OTHER][name] - moved[name] for name in moved}
    between = uniform_between(first)
    fitting = {name: between[name] - moved[name] for name in moved}
    liars = seven.names[5:]
    assert view(first, between, survivors, liars) == view(second, fitting, survivors, liars)
    again = (seven.sum(), seven.sum(vectors=second.vectors))
    assert view(again[0], between, survivors, liars) != view(again[1], between, survivors, liars)


def known_seeds(attempt: Sum, liars: tuple[str, ...]) -> set[bytes]:
    """The seeds that the coordinator opened, and those that the liars have themselves."""
    found = {seed for seeds in attempt.total._seeds().values() for seed in seeds}
    for site in liars:
        contribution = attempt.federation.parts[site].mask(attempt.states[site], attempt.terms)[1]
        found |= {*contribution._plus, *contribution._minus}
    return found


@pytest.mark.parametrize("gone", [(), ("site-06",), ("site-02", "site-05"), ("site-02", "site-03")])
def test_the_seeds_that_come_out_are_the_survivors_own_and_those_with_the_gone_and_the_liars(
    seven: Federation, gone: tuple[str, ...]
) -> None:
    attempt, liars = seven.sum(), seven.names[5:]
    survivors = tuple(site for site in seven.names if site not in gone)
    attempt.close(*survivors)
    attempt.sign()
    attempt.release()
    known = known_seeds(attempt, liars)
    for one, other in itertools.combinations_with_replacement(seven.names, 2):
        contribution = seven.parts[one].mask(attempt.states[one], attempt.terms)[1]
        seed = contribution._plus[attempt.terms.cohort[attempt.terms.point(one) - 1 :].index(other)]
        honest = not {one, other} & set(liars)
        hidden = honest and (one in gone if one == other else (one in gone) == (other in gone))
        assert (seed not in known) == hidden, (one, other)


def test_the_shares_that_colluding_sites_hold_fit_every_seed_of_the_others(seven: Federation) -> None:
    """One share fewer than the threshold: for each byte of the missing share there is one byte of the seed."""
    attempt = seven.sum()
    attempt.close()
    part, state = seven.parts[ONE], attempt.states[ONE]
    seeds = part._seeds(state, attempt.terms, part._agreed(state, attempt.terms))
    shares = part._shares(state, attempt.terms, seeds)
    held = {point: shares[point] for point in list(shares)[3:]}
    assert len(held) == attempt.terms.threshold - 1
    length = KEY_BYTES * len(seven.names)
    secrets = [shamir.combine({**held, 1: bytes([value]) * length}) for value in range(256)]
    assert all({secret[at] for secret in secrets} == set(range(256)) for at in range(length))
    assert shamir.combine({**held, 1: shares[1]}) == b"".join(seeds.values())


def test_shares_of_two_owners_of_one_seed_do_not_help_each_other(seven: Federation) -> None:
    """Both ends of a pair share its seed, with polynomials that have nothing else in common."""
    attempt = seven.sum()
    attempt.close()
    found = {}
    for owner, peer in ((ONE, OTHER), (OTHER, ONE)):
        part, state, terms = seven.parts[owner], attempt.states[owner], attempt.terms
        shares = part._shares(state, terms, part._seeds(state, terms, part._agreed(state, terms)))
        at = KEY_BYTES * terms.cohort.index(peer)
        found[owner] = [share[at : at + KEY_BYTES] for share in shares.values()]
    assert not set(found[ONE]) & set(found[OTHER])
    mixed = {point: (found[ONE] if point < 3 else found[OTHER])[point - 1] for point in range(1, 6)}
    whole = {point: found[ONE][point - 1] for point in range(1, 6)}
    assert shamir.combine(mixed) != shamir.combine(whole)
    differences = bytes(a ^ b for a, b in zip(found[ONE][0], found[OTHER][0], strict=True))
    assert len(set(differences)) > 8, "nor do the polynomials differ by a constant"


def test_a_masked_vector_has_nothing_of_the_update(four: Federation) -> None:
    """Two updates under the same keys differ by exactly the updates' difference; under fresh keys by noise."""
    attempt = four.sum()
    attempt.mask()
    later = four.sum(slot=four.slot(round=2), vectors=attempt.vectors)
    later.mask()
    size = attempt.terms.segments[0].bytes
    one, other = (np.frombuffer(each.sent[ONE][:size], np.uint32) for each in (attempt, later))
    assert not np.any(one == other)
    assert not np.any(one == attempt.vectors[ONE]["update"])


def test_every_word_of_a_long_vector_of_zeros_is_masked(four: Federation) -> None:
    long = (Segment(name="update", bits=32, length=200_000), Segment(name="counts", bits=64, length=2))
    zeros = {site: {each.name: np.zeros(each.length, ring.DTYPES[each.bits]) for each in long} for site in four.names}
    attempt = four.sum(segments=long, vectors=zeros)
    attempt.mask(ONE)
    octets = np.frombuffer(attempt.sent[ONE][: long[0].bytes], np.uint8)
    counts = np.bincount(octets, minlength=256)
    expected = octets.size / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 400, "χ² of 255 degrees: above 400 once in 10^8"
    assert same(attempt.opened(*four.names[1:]), attempt.plain(*four.names[1:]))


def test_a_liar_cannot_speak_for_an_honest_site(four: Federation) -> None:
    """A signature of its own under another's name is none."""
    attempt = four.sum()
    attempt.close()
    part, sealed = four.parts["site-03"], attempt.total.sealed_for("site-03")
    signature = part.sign(attempt.states["site-03"], attempt.total.survivors, sealed)[1]
    with pytest.raises(PeerError, match="does not verify"):
        attempt.total.sign("site-02", signature)
    with pytest.raises(PeerError, match="does not verify"):
        attempt.total.sign("site-03", four.identities["site-03"].sign(ADVERT_DOMAIN, b""))
    assert attempt.total.signatures == {}
