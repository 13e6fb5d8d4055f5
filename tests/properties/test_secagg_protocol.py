"""Whatever happens: the opened sum is the plain sum of exactly the survivors, or nothing is opened."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.sums import Federation, Sum, Whole, same

from consilium_shared.errors import PeerError
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SiteState
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, Segment

SOME = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MODELS = st.sampled_from(["malicious-server", "honest-but-curious"])
SEGMENTS = st.lists(
    st.builds(
        Segment,
        name=st.sampled_from(["update", "integers", "more", "other"]),
        bits=st.sampled_from([16, 32, 64]),
        length=st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda segment: segment.name,
).map(tuple)


@st.composite
def dropouts(draw: st.DrawFn, sites: int) -> list[list[int]]:
    """Who is still there after masking, after signing and after releasing."""
    there, found = list(range(sites)), []
    for _ in range(3):
        gone = draw(st.sets(st.sampled_from(there), max_size=max(0, min(len(there) - 1, 1 + sites // 3))))
        there = [site for site in there if site not in gone]
        found.append(there)
    return found


def restart(attempt: Sum, data: st.DataObject) -> None:
    """Some sites, and sometimes the coordinator, come back from what they had written down."""
    for site in data.draw(st.sets(st.sampled_from(attempt.cohort))):
        attempt.states[site] = SiteState.from_bytes(attempt.states[site].to_bytes())
        attempt.federation.parts[site] = attempt.federation.part(site)
    if data.draw(st.booleans()):
        before = attempt.total
        closed = before.survivors if before._closed else None
        attempt.total = ServerSum(attempt.terms, attempt.federation.public, closed)
        for site in before.survivors:
            attempt.total.fold(site, Whole(attempt.sent[site]))
        if closed is not None:
            assert attempt.total.close(2) == closed
        for site, signature in before.signatures.items():
            attempt.total.sign(site, signature)
        for site in before.sharers:
            attempt.total.share(site, before._shares[site])


@SOME
@given(data=st.data(), sites=st.integers(2, 12), threat_model=MODELS, segments=SEGMENTS)
def test_the_opened_sum_is_that_of_the_survivors_or_nothing_is_opened(
    data: st.DataObject, sites: int, threat_model: Any, segments: tuple[Segment, ...]
) -> None:
    federation = Federation(sites, threat_model, handshake=False)
    attempt = federation.sum(segments=segments)
    masking, signing, releasing = (
        [federation.names[number] for number in there] for there in data.draw(dropouts(sites))
    )
    needed = attempt.terms.threshold
    attempt.mask()  # also those whose vectors never arrive
    for site in data.draw(st.permutations(masking)):
        attempt.fold(site)
        if data.draw(st.integers(0, 4)) == 0:
            restart(attempt, data)
    if len(masking) < needed:
        with pytest.raises(PeerError, match="at least"):
            attempt.total.close(2)
        return
    assert attempt.total.close(2) == tuple(masking)
    restart(attempt, data)
    attempt.sign(*signing)
    restart(attempt, data)
    if len(signing) < needed:
        for site in signing:
            with pytest.raises(PeerError, match="signatures over"):
                attempt.release(site)
        with pytest.raises(PeerError):
            attempt.total.open()
        return
    attempt.release(*releasing)
    restart(attempt, data)
    if len(releasing) < needed:
        with pytest.raises(PeerError, match="are needed"):
            attempt.total.open()
        return
    assert same(attempt.total.open(), attempt.plain(*masking))


@SOME
@given(data=st.data(), sites=st.integers(2, 8))
def test_whatever_is_lost_on_the_way_and_asked_again_gets_the_same_bytes(data: st.DataObject, sites: int) -> None:
    federation = Federation(sites, handshake=False)
    attempt, again = federation.sum(), federation.sum()
    for step in ("mask", "close", "sign", "release"):
        for each in (attempt, again):
            getattr(each, step)()
        restart(again, data)
        if step != "close" and data.draw(st.booleans()):
            getattr(again, step)()
        assert again.sent == attempt.sent and again.states == attempt.states
        assert again.total.signatures == attempt.total.signatures and again.total._shares == attempt.total._shares
    assert same(again.total.open(), attempt.total.open())


@SOME
@given(data=st.data(), sites=st.integers(2, 10), threat_model=MODELS)
def test_an_attempt_that_is_dead_is_never_opened_and_one_that_was_opened_is_never_dead(
    data: st.DataObject, sites: int, threat_model: Any
) -> None:
    """Each site signs the first attempt, or gives it up, or does nothing; the corrupt do both."""
    federation = Federation(sites, threat_model, handshake=False)
    first = federation.sum()
    first.mask()
    corrupt = set(data.draw(st.permutations(federation.names))[: federation.corrupt])
    does = {site: data.draw(st.sampled_from(["sign", "give up", "nothing"])) for site in federation.names}
    first.fold()
    survivors = first.total.close(2)
    given_up = set()
    for site in federation.names:
        if site in corrupt:
            signature = federation.identities[site].sign(SURVIVORS_DOMAIN, first.terms.survivors_signed(survivors))
            first.total.sign(site, signature)
            given_up.add(site)
        elif does[site] == "sign":
            first.sign(site)
        elif does[site] == "give up":
            first.states[site] = federation.parts[site].abandon(first.states[site])
            given_up.add(site)
    signed = {site: (1,) for site in federation.names if site not in given_up}
    second = federation.sum(slot=federation.slot(attempt=2), signed=signed)
    second.terms.check(federation.public)
    dead = first.terms.dead(second.terms.adverts)
    assert dead == (len(given_up) > sites + federation.corrupt - first.terms.threshold)
    late = [site for site in federation.names if site not in corrupt and does[site] == "nothing"]
    for site in late:
        first.sign(site)
    opens = len(first.total.signatures) >= first.terms.threshold
    assert not (dead and opens)
    for site in federation.names:
        if site in corrupt or first.states[site].stage != "signed":
            continue
        if opens:
            first.release(site)
        else:
            with pytest.raises(PeerError, match="are needed"):
                first.release(site)
    assert same(second.opened(), second.plain())
