"""One update is never in two sums that are both opened: their difference would show other sites' updates."""

from __future__ import annotations

import pytest
from tests.support.sums import Federation, Sum, Whole, same

from consilium_shared.errors import PeerError
from consilium_shared.secagg.site import SiteState
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, corrupt, threshold


def second_attempt(first: Sum, *abandoning: str) -> Sum:
    """The next attempt, for which these sites say that they have given up the first."""
    for site in abandoning:
        first.states[site] = first.federation.parts[site].abandon(first.states[site])
    others = {site: (1,) for site in first.cohort if site not in abandoning}
    return first.federation.sum(slot=first.federation.slot(attempt=2), vectors=first.vectors, signed=others)


def test_an_attempt_that_too_few_answered_is_repeated_with_the_same_update(four: Federation) -> None:
    first = four.sum()
    first.mask()
    with pytest.raises(PeerError, match="at least 3 are needed"):
        first.close(*four.names[:2])
    second = second_attempt(first, *four.names)
    assert first.terms.dead(second.terms.adverts)
    assert same(second.opened(), second.plain())


def test_who_has_abandoned_an_attempt_signs_nothing_there_and_agrees_to_nothing(four: Federation) -> None:
    first = four.sum()
    first.mask()
    first.close()
    second_attempt(first, "site-00")
    part, state = four.parts["site-00"], first.states["site-00"]
    for again in (state, SiteState.from_bytes(state.to_bytes())):
        with pytest.raises(PeerError, match="abandoned"):
            part.sign(again, first.total.survivors, first.total.sealed_for("site-00"))
        with pytest.raises(PeerError, match="abandoned"):
            part.mask(again, first.terms)
        with pytest.raises(PeerError, match="abandoned"):
            part.release(again, {}, first.total.sealed_for("site-00"))


def test_an_attempt_of_which_a_set_was_signed_is_not_abandoned(four: Federation) -> None:
    first = four.sum()
    first.close()
    first.sign()
    for stage in ("signed", "released"):
        assert first.states["site-00"].stage == stage
        with pytest.raises(PeerError, match="has signed"):
            four.parts["site-00"].abandon(first.states["site-00"])
        first.release()


def test_the_masks_of_two_attempts_have_nothing_in_common(four: Federation) -> None:
    first = four.sum()
    second = second_attempt(first, *four.names)
    keys = []
    for attempt in (first, second):
        kept = attempt.states["site-01"]
        part, secret = four.parts["site-01"], bytes.fromhex(kept.seed)
        again, _ = part.advertise(attempt.slot, "site-01", secret, signed=kept.signed, counts=kept.counts)
        attempt.states["site-01"] = again
        contribution = four.parts["site-01"].mask(attempt.states["site-01"], attempt.terms)[1]
        keys.append({key for each in attempt.terms.segments for side in contribution.mask_keys(each) for key in side})
    assert len(keys[0]) == len(keys[1]) == 8 and not keys[0] & keys[1]


@pytest.mark.parametrize("sites", range(2, 41))
@pytest.mark.parametrize("threat_model", ["malicious-server", "honest-but-curious"])
def test_a_dead_attempt_has_too_few_left_who_sign(sites: int, threat_model: str) -> None:
    """However many of those who say that they have given up are lying; and one statement fewer would not do."""
    federation = Federation(sites, threat_model, handshake=False)  # type: ignore[arg-type]
    attempt = federation.sum()
    liars, needed = corrupt(sites, threat_model), threshold(sites, threat_model)  # type: ignore[arg-type]
    most = 0
    for abandoning in range(sites + 1):
        given = {
            site: advert.model_copy(update={"signed": () if number < abandoning else (1,)})
            for number, (site, advert) in enumerate(attempt.adverts.items())
        }
        can_sign = sites - abandoning + min(liars, abandoning)
        if attempt.terms.dead(given):
            assert can_sign < needed
            most += 1
        else:
            assert can_sign >= needed or abandoning < liars
    assert most >= 1, "when all have given up it is dead"


def test_only_the_attempt_itself_is_given_up_and_only_by_those_who_were_in_it(four: Federation) -> None:
    first = four.sum(cohort=four.names[:3])
    second = four.sum(slot=four.slot(attempt=2))
    told = second.adverts
    assert first.terms.threshold == 3 and first.terms.dead({"site-00": told["site-00"]})
    assert not first.terms.dead({"site-03": told["site-03"]})
    assert first.terms.dead({site: advert.model_copy(update={"signed": (2,)}) for site, advert in told.items()})
    assert not first.terms.dead({site: advert.model_copy(update={"signed": (1,)}) for site, advert in told.items()})


def test_while_enough_may_still_sign_the_first_attempt_can_be_opened_and_so_it_is_not_dead(four: Federation) -> None:
    """Two give up, one of them a liar: the other two and the liar open the first attempt after all."""
    first = four.sum()
    first.mask()
    second = second_attempt(first, "site-00")
    liar = second.adverts["site-03"].model_copy(update={"signed": ()})
    claims = {**second.adverts, "site-03": liar}
    assert not first.terms.dead(claims)
    first.close()
    first.sign(*four.names[1:])
    first.release(*four.names[1:])
    assert same(first.total.open(), first.plain())
    assert first.terms.dead({**claims, "site-01": liar}), "with one more honest site that could not have been"


def test_a_dead_attempt_cannot_be_opened_by_the_coordinator_the_liars_and_all_who_have_not_given_up(
    seven: Federation,
) -> None:
    first = seven.sum()
    first.mask()
    second = second_attempt(first, *seven.names[:4])
    given = {
        site: advert.model_copy(update={"signed": ()}) if site in seven.names[5:] else advert
        for site, advert in second.adverts.items()
    }
    assert not first.terms.dead(second.adverts) and first.terms.dead(given)
    for site in seven.names:
        first.total.fold(site, Whole(first.sent[site]))
    survivors = first.total.close(2)
    first.sign(seven.names[4])
    for site in seven.names[5:]:  # they have promised not to
        signature = seven.identities[site].sign(SURVIVORS_DOMAIN, first.terms.survivors_signed(survivors))
        first.total.sign(site, signature)
    with pytest.raises(PeerError, match=r"3 signatures .* 5 are needed"):
        first.release(seven.names[4])
    with pytest.raises(PeerError, match="not signed by enough"):
        first.total.share(seven.names[5], b"")
