"""Secure sums, a site's part: advertise keys, mask under agreed terms, sign survivors, release shares.

    advertise ─► train / evaluate ─► survivors ─► open        one sum (``secagg.site``); the next one's key rides back
    handshake                                                 once with every other site of the study

What was decided is on the disk before the answer leaves. The same request gets the same answer.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypedDict

from pydantic import ValidationError

from consilium_client.agent import round_work
from consilium_client.agent.masking import Masks, masked
from consilium_client.agent.pace import Pace
from consilium_client.agent.received import AnswerHeader, ReleaseMarks
from consilium_client.agent.replay_guard import ReplayGuard
from consilium_client.agent.study_service import StudyService
from consilium_client.policy import check_sites
from consilium_client.state.proposals import Proposal
from consilium_client.state.responses import Staged
from consilium_client.state.sum_store import Peer, Session
from consilium_shared.errors import PeerError, PolicyRefusal
from consilium_shared.privacy.plan import Plan
from consilium_shared.protocol.messages import (
    Advertise,
    Advertised,
    Evaluate,
    Handshaken,
    Open,
    Payload,
    Shares,
    Signed,
    SumRequest,
    Survivors,
    Train,
)
from consilium_shared.protocol.summand import segments
from consilium_shared.secagg.handshake import SessionKeys, decode_bundles, encode_encapsulated
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.site import SitePart, SiteState
from consilium_shared.secagg.terms import Advert, Purpose, Slot, Terms, fewest_sites, tolerated
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")


class Contributed(NamedTuple):
    """Outcome of a contribution: what its answer says besides the masked bytes.

    Attributes:
        epsilon: ε of the study as it is reported, or None.
        countersignature: over the record of the round before, or None.
    """

    epsilon: float | None
    countersignature: str | None


class _OfSum(TypedDict):
    """Fields by which an answer names its sum."""

    round: int
    attempt: int
    of: Purpose


class SecureSums:
    """A site's part in secure sums. Not for several threads: the agent answers one request after the other."""

    def __init__(self, service: StudyService) -> None:
        self.service = service
        self.store, self.replay_guard, self.pace = service.sums, ReplayGuard(service), Pace(service)

    def advertise(self, proposal: Proposal, request: Advertise, header: AnswerHeader) -> Advertised:
        """Advertise a key for a sum; earlier attempts in which this site has signed no survivors are abandoned.

        Raises:
            PolicyRefusal, DataError: this site could not train now (``round_work.ready``), or not in time (``Pace``).
            MachineError: this machine cannot compute the study, as it could not before.
        """
        if request.of == "training" and self.store.get(request.slot) is None:
            plan = self.service.approvals.in_force(proposal).plan
            self.pace.check(proposal.study, request.round)
            self.pace.check_forecast(proposal.study, plan, known=True)
            round_work.ready(self.service, proposal.study, plan)
        advert = self._advert(proposal, request.slot)
        if advert is None:
            raise PolicyRefusal("sum", "this site's keys for this attempt are spent")
        session, keys = self._session(proposal)
        known = {site: peer.bundle.digest for site, peer in session.peers.items() if peer.secret is not None}
        return Advertised(**header, **_of(request), advert=advert, bundle=keys.bundle, known=known)

    def handshake(self, proposal: Proposal, payload: bytes, header: AnswerHeader) -> tuple[Handshaken, bytes]:
        """Agree with each named site whose name is the higher one; remember the keys of the others."""
        session, keys = self._session(proposal)
        peers = dict(session.peers)
        asked = decode_bundles(payload)
        for site, bundle in asked.items():
            if site == self.service.site:
                continue
            public = proposal.identities.get(site)
            if public is None:
                raise PolicyRefusal("wrong-roster", f"{site} is not in the study's roster")
            if site in peers and peers[site].bundle == bundle:
                continue
            if site > self.service.site:
                sent, secret = keys.encapsulate(site, bundle, public)
                peers[site] = Peer(bundle=bundle, secret=secret.hex(), sent=sent)
            else:
                bundle.verify(proposal.study.digest, proposal.roster, site, public)
                peers[site] = Peer(bundle=bundle)
        if peers != session.peers:
            self.store.put_session(proposal.study.digest, session.model_copy(update={"peers": peers}))
        sent_to = {site: peer.sent for site, peer in peers.items() if site in asked and peer.sent is not None}
        body = encode_encapsulated(sent_to)
        return Handshaken(**header, payload=Payload.of(body)), body

    def contribute(
        self,
        proposal: Proposal,
        plan: Plan,
        request: Train | Evaluate,
        model: bytes,
        staged: Staged,
        witness: Callable[[], str | None],
    ) -> Contributed:
        """Agree to the terms, work or take the result that is kept, and write it masked.

        Args:
            staged: what is written there leaves.
            witness: called once all that can be refused was, and before a charge; gives the countersignature.
        """
        study = proposal.study
        if isinstance(request, Evaluate):
            self.replay_guard.check_evaluated(study, request.round)
        else:
            self.pace.check(study, request.round)
        state = self.store.get(request.slot)
        if state is None:
            raise PolicyRefusal("sum", "this site has advertised no key for this sum")
        self._accept_secrets(proposal, request)
        check_sites(self.service.config.policy, study, len(proposal.identities))
        part, terms = self._part(proposal), _terms(proposal, request)
        with _refused_as_sum():
            state, contribution = part.mask(state, terms)
        self.replay_guard.check_cohort(study, terms, counted=terms.adds_counts(part.minimum))
        kept, counts = self.replay_guard.kept(study, request, terms), part.adds_counts(state, terms)
        self.replay_guard.check_counts(request, kept, offered=counts)
        if kept is None:
            self.replay_guard.check_work(study, plan, request, state)
        frozen = round_work.check(self.service, study, plan, request, model)
        if kept is None and isinstance(request, Train):
            self.pace.check_forecast(study, plan, known=False)
        self.replay_guard.check_frozen(study, frozen)
        countersignature = witness()
        self.store.put(state)
        with Masks(contribution, self.store.folder / study.digest) as masks:
            if kept is not None:
                self.replay_guard.settle(study, plan, kept)
            elif isinstance(request, Train):
                with self.pace.measured(study, request.round):
                    kept = round_work.train(self.service, proposal, plan, request, model, counts=counts)
            else:
                kept = round_work.evaluate(self.service, proposal, plan, request, model)
            with _refused_as_sum():
                self.store.put(part.bind(state, kept.sha256, counted=counts and kept.about.counted))
            self.replay_guard.note(study, request, frozen)
            for piece in masked(kept, study, contribution, masks, counts=counts):
                staged.write(piece)
        self.store.forget_rounds_before(study.digest, request.round)
        return Contributed(kept.about.epsilon, countersignature)

    def release_marks(self, proposal: Proposal, request: Train | Evaluate) -> ReleaseMarks:
        """Marks of the answer's release in the ledger: that it carries counts, that it left before."""
        kept, state = self.service.results.about(request.study, request.purpose), self.store.get(request.slot)
        if kept is None or kept.round != request.round or state is None or state.terms is None:
            return {}  # the sum was opened: the entry is there
        rides = request.purpose == "training" and kept.counts > 0 and kept.counted
        if state.counted is None:  # an older release's
            rides = rides and self._part(proposal).adds_counts(state, state.terms)
        else:
            rides = rides and state.counted
        again = kept.attempt != request.attempt and self.replay_guard.left(request)
        marks = ReleaseMarks()
        if rides:
            marks["counts"] = True
        if again:
            marks["again"] = True
        return marks

    def sign(self, proposal: Proposal, request: Survivors, sealed: bytes, header: AnswerHeader) -> Signed:
        """Sign a set of survivors, once in an attempt, and only after this site's own answer has left by the ledger.

        A policy that has come to ask for more sites than the study adds up signs nothing: with that number in place of
        the study's it would not see whose counts were added.
        """
        check_sites(self.service.config.policy, proposal.study, len(proposal.identities))
        state, part = self._state(request), self._part(proposal)
        if not self.replay_guard.left(request):
            raise PolicyRefusal("sum", "what this site made has not left yet")
        with _refused_as_sum():
            signed, signature = part.sign(state, request.survivors, sealed)
        if signed.terms is not None and proposal.study.aggregation.same_sites:
            counted = signed.terms.adds_counts(part.minimum)
            about = self.replay_guard.check_together(proposal.study, signed.terms, request.survivors, counted=counted)
            self.store.put_session(proposal.study.digest, about)
        self.store.put(signed)
        return Signed(**header, **_of(request), signature=signature.hex())

    def release(self, proposal: Proposal, request: Open, sealed: bytes, header: AnswerHeader) -> tuple[Shares, bytes]:
        """The shares that open the sum, and the key for the next one. The result serves no other attempt."""
        state = self._state(request)
        signatures = {site: bytes.fromhex(signature) for site, signature in request.signatures.items()}
        with _refused_as_sum():
            state, shares = self._part(proposal).release(state, signatures, sealed)
        self.store.put(state)
        self.service.results.drop(proposal.study.digest, request.of)
        following = self._following(proposal.study, request.slot)
        advert = None if following is None else self._advert(proposal, following)
        return Shares(**header, **_of(request), payload=Payload.of(shares), next=advert), shares

    def forget(self, study: Study) -> None:
        """The study is over: its secrets and results are deleted."""
        self.store.forget(study.digest)
        self.service.results.forget(study.digest)
        self.service.clipping_norms.forget(study.digest)
        self.service.paces.forget(study.digest)

    # -- keys

    def _part(self, proposal: Proposal) -> SitePart:
        least = fewest_sites(proposal.study, proposal.identities)
        minimum = max(least, self.service.config.policy.minimum_sites)
        shared = self.store.session(proposal.study.digest).secrets
        sums = proposal.study.privacy.sums
        honest = 1 if sums is None else sums.honest_sites
        return SitePart(self.service.identity, proposal.identities, minimum, shared, honest)

    def _session(self, proposal: Proposal) -> tuple[Session, SessionKeys]:
        session = self.store.session(proposal.study.digest)
        about = (proposal.study.digest, proposal.roster, self.service.site, self.service.identity)
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
            self.replay_guard.check_evaluated(proposal.study, slot.round)
        part, state = self._part(proposal), self.store.get(slot)
        if state is None:
            before = self.store.attempts(slot)
            if any(each.slot.attempt > slot.attempt for each in before):
                raise PolicyRefusal("stale-round", f"a later attempt at round {slot.round} is under way")
            for each in before:
                if each.stage in ("advertised", "masked"):
                    self.store.put(part.abandon(each))
            signed = {each.slot.attempt for each in before if each.stage in ("signed", "released")}
            signed |= self.replay_guard.signed_attempts(slot) - {
                each.slot.attempt for each in before
            }  # their state is lost
            told = tuple(sorted(number for number in signed if number < slot.attempt))
            counts, seed = self.replay_guard.counts_given(proposal.study, slot), secrets.token_bytes(KEY_BYTES)
            state, _ = part.advertise(slot, self.service.site, seed, signed=told, counts=counts)
            self.store.put(state)
        return part.advert(state) if state.stage in ("advertised", "masked") else None

    def _following(self, study: Study, slot: Slot) -> Slot | None:
        """The sum that comes next, at its first attempt; None after the last, or where this site takes no part."""
        if slot.purpose == "evaluation":
            return None
        if slot.round < study.training.rounds:
            return slot.model_copy(update={"round": slot.round + 1, "attempt": 1})
        allowed = self.service.config.policy.allow_evaluation_counts and slot.round in study.evaluated_rounds
        return slot.model_copy(update={"purpose": "evaluation", "attempt": 1}) if allowed else None

    def _state(self, request: SumRequest) -> SiteState:
        state = self.store.get(request.slot)
        if state is None:
            raise PolicyRefusal("sum", "this site takes no part in this sum")
        return state


def _of(request: Advertise | Survivors | Open) -> _OfSum:
    return _OfSum(round=request.round, attempt=request.attempt, of=request.of)


def _terms(proposal: Proposal, request: Train | Evaluate) -> Terms:
    from consilium_shared.models.vector import width

    study = proposal.study
    try:
        return Terms(
            slot=request.slot,
            model=request.payload.sha256,
            segments=segments(study, request.purpose, request.round, width(study)),
            threat_model=study.aggregation.threat_model,
            adverts=request.adverts,
            corrupt=tolerated(study.aggregation, len(proposal.identities)),
        )
    except ValidationError as error:
        raise PeerError(f"the cohort: {error.errors()[0]['msg']}") from error


@contextmanager
def _refused_as_sum() -> Iterator[None]:
    """Turn errors of the protocol's state machine into refusals with the reason ``sum``."""
    try:
        yield
    except PeerError as error:
        raise PolicyRefusal("sum", str(error)) from error
