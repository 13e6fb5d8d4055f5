"""This site's part in secure sums: which keys it gives, under which terms it masks, what it signs, what it releases.

    advertise ─► train / evaluate ─► survivors ─► open        one sum (``secagg.site``); the next one's key rides back
    handshake                                                 once with every other site of the study

What was decided is on the disk before the answer leaves. The same request gets the same answer.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from consilium_client import work
from consilium_client.answers import Staged
from consilium_client.desk import Desk
from consilium_client.masking import Masks, masked
from consilium_client.proposals import Proposal
from consilium_client.results import About, Result
from consilium_client.sum_store import Peer, Session
from consilium_shared import limits, messages
from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import IntegrityError, PeerError, PolicyRefusal
from consilium_shared.ledger.entry import Charge, Release
from consilium_shared.messages import (
    Advertise,
    Advertised,
    Counts,
    Evaluate,
    Handshake,
    Handshaken,
    Open,
    Payload,
    Shares,
    Signed,
    SumRequest,
    Survivors,
    Train,
    Update,
)
from consilium_shared.privacy.plan import NonPrivatePlan, Plan
from consilium_shared.secagg.handshake import Bundle, SessionKeys, decode_bundles, encode_encapsulated
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.site import SitePart, SiteState
from consilium_shared.secagg.terms import Advert, Slot, Terms
from consilium_shared.study import Study
from consilium_shared.summand import segments

log = logging.getLogger("consilium.agent")

Common = dict[str, Any]
"""What every answer carries (``messages._Answer``) but its payload."""


class Sums:
    """One at a time: the agent answers one request after the other."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.store = desk.sums

    def advertise(self, proposal: Proposal, request: Advertise, common: Common) -> Advertised:
        """A key for a sum; what was sent in earlier attempts at it is given up where no set of survivors was signed."""
        advert = self._advert(proposal, request.slot)
        if advert is None:
            raise PolicyRefusal("sum", "this site's keys for this attempt are spent")
        session, keys = self._session(proposal)
        known = {site: _digest(peer.bundle) for site, peer in session.peers.items() if peer.secret is not None}
        return Advertised(**common, **_of(request), advert=advert, bundle=keys.bundle, known=known)

    def handshake(
        self, proposal: Proposal, request: Handshake, payload: bytes, common: Common
    ) -> tuple[Handshaken, bytes]:
        """Agree with each named site whose name is the higher one; remember the keys of the others."""
        session, keys = self._session(proposal)
        peers = dict(session.peers)
        asked = decode_bundles(payload)
        for site, bundle in asked.items():
            if site == self.desk.site:
                continue
            public = proposal.identities.get(site)
            if public is None:
                raise PolicyRefusal("wrong-roster", f"{site} is not in the study's roster")
            if site in peers and peers[site].bundle == bundle:
                continue
            if site > self.desk.site:
                sent, secret = keys.encapsulate(site, bundle, public)
                peers[site] = Peer(bundle=bundle, secret=secret.hex(), sent=sent)
            else:
                bundle.verify(proposal.study.digest, proposal.roster, site, public)
                peers[site] = Peer(bundle=bundle)
        if peers != session.peers:
            self.store.put_session(proposal.study.digest, session.model_copy(update={"peers": peers}))
        sent_to = {site: peer.sent for site, peer in peers.items() if site in asked and peer.sent is not None}
        body = encode_encapsulated(sent_to)
        return Handshaken(**common, payload=Payload.of(body)), body

    def contribute(
        self,
        proposal: Proposal,
        plan: Plan,
        request: Train | Evaluate,
        model: bytes,
        staged: Staged,
        prepare: Callable[[], dict[str, Any]],
    ) -> Callable[[Common], messages.Answer]:
        """Agree to the terms, work or take the result that is kept, and write it masked.

        Args:
            staged: what is written there leaves.
            prepare: called once all that can be refused was; gives further fields of the answer.

        Returns:
            What makes the answer.
        """
        study = proposal.study
        if isinstance(request, Evaluate):
            self._check_evaluated(study, request.round)
        state = self.store.get(request.slot)
        if state is None:
            raise PolicyRefusal("sum", "this site has advertised no key for this sum")
        self._accept_secrets(proposal, request)
        part, terms = self._part(proposal), _terms(study, request)
        with _refused_as_sum():
            state, contribution = part.mask(state, terms)
        kept = self._kept(study, request, state, terms)
        if kept is None:
            self._check_work(proposal, plan, request, state)
        else:
            self.check_charged(study, kept.about)
        work.check(self.desk, study, plan, model)
        more = prepare()
        self.store.put(state)
        counts = self._adds_counts(part, terms)
        with Masks(contribution, self.store.folder / study.digest) as masks:
            if kept is not None:
                self._settle(study, plan, kept)
            elif isinstance(request, Train):
                kept = work.train(self.desk, proposal, plan, request, model, counts=counts)
            else:
                kept = work.evaluate(self.desk, proposal, plan, request, model)
            self._bind(proposal, request, part, state, kept)
            for piece in masked(kept, study, contribution, masks, counts=counts):
                staged.write(piece)
        self.store.forget_rounds_before(study.digest, request.round)
        about = {"round": request.round, "attempt": request.attempt, "epsilon": kept.about.epsilon, **more}
        kind = Update if isinstance(request, Train) else Counts
        return lambda common: kind(**common, **about)

    def said_of(self, proposal: Proposal, request: Train | Evaluate) -> dict[str, bool]:
        """What the ledger says of the release of an answer, besides its digest: with counts, or not the first time."""
        kept, state = self.desk.results.about(request.study, request.purpose), self.store.get(request.slot)
        if kept is None or kept.round != request.round or state is None or state.terms is None:
            return {}  # the sum was opened: the entry is there
        rides = request.purpose == "training" and kept.counts > 0 and kept.counted
        rides = rides and self._adds_counts(self._part(proposal), state.terms)
        again = kept.attempt != request.attempt and self._left(request)
        return {**({"counts": True} if rides else {}), **({"again": True} if again else {})}

    def _left(self, request: Train | Evaluate) -> bool:
        """Whether anything left on the last charge for this round: a crash may have come between the two."""
        place, kind = (request.study, request.round), "update" if isinstance(request, Train) else "counts"
        for entry in reversed(self.desk.ledger.entries):
            body = entry.body
            if isinstance(body, Release) and (body.study, body.round, body.message) == (*place, kind):
                return True
            if isinstance(body, Charge) and (body.study, body.round, body.purpose) == (*place, request.purpose):
                return False
        return False

    def sign(self, proposal: Proposal, request: Survivors, sealed: bytes, common: Common) -> Signed:
        """Sign a set of survivors, once in an attempt."""
        state = self._state(request)
        with _refused_as_sum():
            state, signature = self._part(proposal).sign(state, request.survivors, sealed)
        self.store.put(state)
        return Signed(**common, **_of(request), signature=signature.hex())

    def release(self, proposal: Proposal, request: Open, sealed: bytes, common: Common) -> tuple[Shares, bytes]:
        """The shares that open the sum, and the key for the next one. The result serves no other attempt."""
        state = self._state(request)
        signatures = {site: bytes.fromhex(signature) for site, signature in request.signatures.items()}
        with _refused_as_sum():
            state, shares = self._part(proposal).release(state, signatures, sealed)
        self.store.put(state)
        self.desk.results.drop(proposal.study.digest, request.of)
        following = self._following(proposal.study, request.slot)
        advert = None if following is None else self._advert(proposal, following)
        return Shares(**common, **_of(request), payload=Payload.of(shares), next=advert), shares

    def forget(self, study: Study) -> None:
        """The study is over: its secrets and results are deleted."""
        self.store.forget(study.digest)
        self.desk.results.forget(study.digest)

    # -- keys

    def _part(self, proposal: Proposal) -> SitePart:
        minimum = max(proposal.study.aggregation.min_sites, self.desk.config.policy.minimum_sites)
        shared = self.store.session(proposal.study.digest).secrets
        return SitePart(self.desk.identity, proposal.identities, minimum, shared)

    def _session(self, proposal: Proposal) -> tuple[Session, SessionKeys]:
        session = self.store.session(proposal.study.digest)
        about = (proposal.study.digest, proposal.roster, self.desk.site, self.desk.identity)
        return session, SessionKeys(bytes.fromhex(session.seed), *about)

    def _accept_secrets(self, proposal: Proposal, request: Train | Evaluate) -> None:
        if not request.encapsulated:
            return
        session, keys = self._session(proposal)
        peers = dict(session.peers)
        for site, sent in request.encapsulated.items():
            if site not in peers or site not in proposal.identities:
                raise PolicyRefusal("sum", f"a secret from {site}, whose keys were never shown")
            bundle = peers[site].bundle
            with _refused_as_sum():
                secret = keys.decapsulate(site, bundle, sent, proposal.identities[site])
            peers[site] = Peer(bundle=bundle, secret=secret.hex())
        self.store.put_session(proposal.study.digest, session.model_copy(update={"peers": peers}))

    def _advert(self, proposal: Proposal, slot: Slot) -> Advert | None:
        """The advertisement for a slot: fresh, or once more; None where its keys have been used."""
        if slot.purpose == "evaluation":
            self._check_evaluated(proposal.study, slot.round)
        part, state = self._part(proposal), self.store.get(slot)
        if state is None:
            before = self.store.attempts(slot)
            if any(each.slot.attempt > slot.attempt for each in before):
                raise PolicyRefusal("stale-round", f"a later attempt at round {slot.round} is under way")
            for each in before:
                if each.stage in ("advertised", "masked"):
                    self.store.put(part.abandon(each))
            signed = tuple(each.slot.attempt for each in before if each.stage in ("signed", "released"))
            counts = self.desk.config.policy.allow_evaluation_counts
            seed = secrets.token_bytes(KEY_BYTES)
            state, _ = part.advertise(slot, self.desk.site, seed, signed=signed, counts=counts)
            self.store.put(state)
        return part.advert(state) if state.stage in ("advertised", "masked") else None

    def _following(self, study: Study, slot: Slot) -> Slot | None:
        """The sum that comes next, at its first attempt; None after the last, or where this site takes no part."""
        if slot.purpose == "evaluation":
            return None
        if slot.round < study.training.rounds:
            return slot.model_copy(update={"round": slot.round + 1, "attempt": 1})
        allowed = self.desk.config.policy.allow_evaluation_counts and slot.round in study.evaluated_rounds
        return slot.model_copy(update={"purpose": "evaluation", "attempt": 1}) if allowed else None

    def _state(self, request: SumRequest) -> SiteState:
        state = self.store.get(request.slot)
        if state is None:
            raise PolicyRefusal("sum", "this site takes no part in this sum")
        return state

    # -- results

    def _kept(self, study: Study, request: Train | Evaluate, state: SiteState, terms: Terms) -> Result | None:
        """The result that is kept for this round, if it may leave under these terms; None where it is to be made.

        It may have left before, in an attempt that was given up. It leaves again only when it is certain that nobody
        ever opens that one (``Terms.dead``). Else one update could be seen in two sums, whose difference shows others.

        Raises:
            PolicyRefusal: this round was worked on from another model.
        """
        kept = self.desk.results.get(study.digest, request.purpose, request.round)
        if kept is None:
            return None
        if kept.about.model != request.payload.sha256:
            raise PolicyRefusal("stale-round", f"round {request.round} was worked on from another model")
        if kept.about.attempt == request.attempt:
            return kept
        states = {each.slot.attempt: each for each in self.store.attempts(request.slot)}
        used = [states.get(kept.about.attempt), *(states[n] for n in states if kept.about.attempt < n)]
        for earlier in used:
            if earlier is None:
                return None  # its state is lost, and with it the proof
            unlike_this = earlier.slot.attempt < request.attempt and earlier.terms is not None
            if unlike_this and earlier.terms is not None and not earlier.terms.dead(terms.adverts):
                return None
        return kept

    def _check_work(self, proposal: Proposal, plan: Plan, request: Train | Evaluate, state: SiteState) -> None:
        """Whether the round may be worked on, anew where it was before.

        Without privacy one model is worked on once: two sums of the same numbers, over other sites, would show whose
        are whose. With privacy each time has noise and a charge of its own.

        Raises:
            PolicyRefusal: not under these keys, or not for this model.
        """
        if state.result is not None:
            raise PolicyRefusal("sum", "what these keys mask is gone")
        where = self.store.session(proposal.study.digest).seen.get(_what(request))
        if where in (None, place(request.round, request.attempt)):
            return
        if isinstance(plan, NonPrivatePlan):
            raise PolicyRefusal("sum", "this model was worked on, and that sum may still be opened, or was")
        log.warning("round %d is worked on anew: an earlier attempt may still be opened, or was", request.round)

    def _bind(
        self, proposal: Proposal, request: Train | Evaluate, part: SitePart, state: SiteState, kept: Result
    ) -> None:
        """Before the first masked byte: what is masked where."""
        with _refused_as_sum():
            self.store.put(part.bind(state, kept.sha256))
        session = self.store.session(proposal.study.digest)
        seen = {**session.seen, _what(request): place(request.round, request.attempt)}
        self.store.put_session(proposal.study.digest, session.model_copy(update={"seen": seen}))

    def _adds_counts(self, part: SitePart, terms: Terms) -> bool:
        """Whether this site's counts leave under these terms."""
        return self.desk.config.policy.allow_evaluation_counts and part.adds_counts(terms, terms.cohort)

    def check_charged(self, study: Study, about: About) -> None:
        """Raises IntegrityError where the ledger has no charge for a result that is kept."""
        number, purposes = about.round, [(about.round, about.purpose)]
        if about.purpose == "training" and about.counts and about.counted:
            purposes.append((number - 1, "evaluation"))
        for charged, purpose in purposes:
            if not self.desk.spending.attempts(study.digest, charged, purpose):
                raise IntegrityError(
                    f"the ledger has no {purpose} charge for what was worked on in round {charged}: an older ledger "
                    f"was put back. Move {self.desk.results.folder} and {self.desk.answers.folder} away; the "
                    "round's next attempt is then worked on and charged anew"
                )

    def _settle(self, study: Study, plan: Plan, kept: Result) -> None:
        about = kept.about
        if about.purpose == "training":
            self.desk.settle_kept(study, about.round, about.model, plan, "training")
        if about.counts and about.counted:
            number = about.round - 1 if about.purpose == "training" else about.round
            self.desk.settle_kept(study, number, about.model, plan, "evaluation")

    def _check_evaluated(self, study: Study, number: int) -> None:
        """Counts in a sum of their own leave after the last round alone, of the model that it gave.

        Otherwise a coordinator could ask with models of its own making, before any training and as often as it likes,
        and read the held-back patients' values from the counts.
        """
        if not self.desk.config.policy.allow_evaluation_counts:
            raise PolicyRefusal("policy", "this site lets no evaluation counts leave")
        if number != study.training.rounds or number not in study.evaluated_rounds:
            raise PolicyRefusal("policy", f"round {number} is none after which the study evaluates in a sum of its own")
        last = self.desk.answers.latest(study.digest, "update")
        if last is None or round_of(last) != number:
            raise PolicyRefusal("policy", f"round {number} is not the last that this site trained")


def _of(request: Advertise | Survivors | Open) -> dict[str, Any]:
    return {"round": request.round, "attempt": request.attempt, "of": request.of}


def _what(request: Train | Evaluate) -> str:
    return canonical_digest([request.purpose, request.payload.sha256])


def place(number: int, attempt: int) -> int:
    """Where an answer stands among a study's: rises from attempt to attempt, and from round to round."""
    return number * (limits.ATTEMPTS + 1) + attempt


def round_of(where: int) -> int:
    """The round of a ``place``."""
    return where // (limits.ATTEMPTS + 1)


def _terms(study: Study, request: Train | Evaluate) -> Terms:
    from consilium_shared.models.vector import width

    try:
        return Terms(
            slot=request.slot,
            model=request.payload.sha256,
            segments=segments(study, request.purpose, request.round, width(study)),
            threat_model=study.aggregation.threat_model,
            adverts=request.adverts,
        )
    except ValidationError as error:
        raise PeerError(f"the cohort: {error.errors()[0]['msg']}") from error


def _digest(bundle: Bundle) -> str:
    return canonical_digest(bundle.model_dump(mode="json"))


@contextmanager
def _refused_as_sum() -> Iterator[None]:
    """What the protocol's state machine refuses is refused with the reason ``sum``."""
    try:
        yield
    except PeerError as error:
        raise PolicyRefusal("sum", str(error)) from error
