"""Handler of the coordinator's requests: signature first, then policy, then budget, then work, then the ledger.

Answers are idempotent: the same request gets the same bytes, without a second training and without a second charge.
Every answer stands in the ledger (``release``) before it is handed out.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress

from consilium_client.agent.accounts import reported
from consilium_client.agent.received import AnswerHeader, Outgoing, Received, ReleaseMarks
from consilium_client.agent.refusals import CURES, location_of, outgoing, protocol_of, reason_of, sentence
from consilium_client.agent.replay_guard import sequence
from consilium_client.agent.secure_sums import Contributed, SecureSums
from consilium_client.agent.study_service import StudyService
from consilium_client.agent.witness import last_audit, witness
from consilium_client.state.draw_seeds import Use
from consilium_client.state.proposals import Proposal
from consilium_client.state.responses import StoredPayload
from consilium_shared import documents, limits
from consilium_shared.canonical import digest
from consilium_shared.errors import ConsiliumError, PeerError, PolicyRefusal, SignatureError, VersionError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import Approve, Reject, Release
from consilium_shared.privacy.plan import Plan
from consilium_shared.protocol import messages, roster
from consilium_shared.protocol.messages import (
    Advertise,
    ApprovalStatus,
    Close,
    Closing,
    Counts,
    Evaluate,
    Handshake,
    Head,
    Open,
    Payload,
    Propose,
    Refusal,
    Request,
    SumRequest,
    Survivors,
    Train,
    Update,
)
from consilium_shared.protocol.reasons import Reason
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")

NO_BODY: Iterable[bytes] = ()
"""Payload of an answer that has none."""

REMEMBERED = 1000
"""Short answers kept in memory to be given again; beyond, the one not asked for the longest is dropped."""


class RequestHandler:
    """Handler of the coordinator's requests: message in, message out; one at a time."""

    def __init__(self, service: StudyService) -> None:
        self.service = service
        self.sums = SecureSums(service)
        self._given: OrderedDict[tuple[str, str], tuple[Approve | Reject | None, bytes]] = OrderedDict()
        """Digest of a request and outcome to the short answer that was given, and the decision that was in force."""
        self._released = {entry.body.sha256 for entry in service.ledger.entries if isinstance(entry.body, Release)}

    def handle(self, header: bytes, payload: bytes) -> tuple[bytes, Iterable[bytes]]:
        """The signed answer to a message, whatever it is, and its payload in pieces of ``limits.CHUNK_BYTES``.

        Raises nothing that the message can cause.
        """
        started = time.monotonic()
        try:
            request = messages.decode_request(header, self.service.coordinator)
        except SignatureError:
            return self._unread(header, "bad-signature", "the request is not signed by this federation's coordinator")
        except VersionError as error:
            return self._unread(header, "version", str(error))
        except PeerError as error:
            return self._unread(header, "malformed", str(error))
        except Exception as error:
            log.error("defect while reading a message: %s", location_of(error))
            return self._unread(header, "malformed", "the message cannot be read")
        # From here on the sender is the coordinator: every answer, refusals too, is entered in the ledger.
        received, body = Received(request, header, payload), NO_BODY
        try:
            self._check_addressed(request)
            request.payload.check(payload)
            with self.service.leftovers.working:
                answer, body = self._dispatch(received)
        except ConsiliumError as error:
            answer = self._refuse(received, *reason_of(error))
        except Exception as error:
            # The text of a foreign exception may quote data: only its type and place are logged.
            log.error("defect while answering %s: %s", request.kind, location_of(error))
            answer = self._refuse(received, "internal", "the site failed; its log says where")
        finally:
            self.service.activity.wait()
            self.service.leftovers.forget_rejected()
        log.info("%s: answered in %.1f s", self._named(received), time.monotonic() - started)
        return answer, body

    # -- the requests

    def _dispatch(self, received: Received) -> tuple[bytes, Iterable[bytes]]:
        request = received.request
        if isinstance(request, Propose):
            return self._propose(request, received), NO_BODY
        proposal, plan = self._approved(request)
        # Everything below is of an approved study, and of a round whose record was not shown yet.
        header, body, marks = self._header(received), b"", ReleaseMarks()
        answer: messages.Answer
        match request:
            case Train() | Evaluate():
                return self._contribute(proposal, plan, request, received)
            case Close():
                return self._close(proposal, request, received), NO_BODY
            case Handshake():
                self._check_open(request, proposal.study.training.rounds, proposal.study)
                answer, body = self.sums.handshake(proposal, received.payload, header)
            case Advertise():
                self._check_open(request, request.round, proposal.study)
                answer = self.sums.advertise(proposal, request, header)
            case Survivors():
                self._check_open(request, request.round, proposal.study)
                answer = self.sums.sign(proposal, request, received.payload, header)
                marks["attempt"] = request.attempt
            case Open():
                self._check_open(request, request.round, proposal.study)
                answer, body = self.sums.release(proposal, request, received.payload, header)
        given = self._give(received, answer.kind, lambda: answer, body, marks)
        return given, (body,) if body else NO_BODY

    def _propose(self, request: Propose, received: Received) -> bytes:
        study = Study.from_contract(request.contract)
        if study.digest != request.study:
            raise PeerError("the contract is not the one that the digest names")
        document = request.roster_document
        if set(document) != {"body", "signature"} or not isinstance(document["body"], dict):
            raise PolicyRefusal("wrong-roster", "the proposal carries no signed roster")
        signature = documents.signature_bytes(document["signature"])
        documents.verify(document["body"], signature, roster.DOMAIN, self.service.coordinator)
        members = roster.parse_roster(document["body"], self.service.federation)
        me = members.member(self.service.site)
        if members.digest != request.roster or me is None or me.identity != self.service.identity.public.hex():
            raise PolicyRefusal("wrong-roster", "the roster is another one, or lacks this site with its key")
        identities = {member.site: PublicIdentity.from_hex(member.identity) for member in members.members}
        proposal = Proposal(study, members.digest, identities)
        new = self.service.approvals.check_new(proposal)
        try:
            state = self.service.approvals.status(proposal)
        except PolicyRefusal as refusal:
            if refusal.reason_code != "rejected":
                self.service.proposals.put_refused(proposal)
            raise
        if new:
            self.service.proposals.put(proposal)
        return self._give(received, state, lambda: ApprovalStatus(**self._header(received), state=state))

    def _contribute(
        self, proposal: Proposal, plan: Plan, request: Train | Evaluate, received: Received
    ) -> tuple[bytes, Iterable[bytes]]:
        """The stored answer, or that of new work: keep the result, settle, store the answer, enter its release."""
        study, kind = request.study, "update" if isinstance(request, Train) else "counts"
        number = sequence(request.round, request.attempt)
        stored = self._stored(received, number, kind)
        if stored is None:
            self._check_open(request, request.round, proposal.study)
            with self.service.responses.stage(study) as staged:
                made = self.sums.contribute(
                    proposal, plan, request, received.payload, staged, lambda: self._witnessed(proposal, request)
                )
                answer = self._contribution(request, received, Payload(sha256=staged.sha256, size=staged.size), made)
                encoded = messages.encode(answer, self.service.identity, request.protocol)
                stored = encoded, staged.commit(number, kind, received.sha256, encoded)
        else:
            use = Use(request.purpose, request.round, request.payload.sha256)
            self.sums.replay_guard.check_charged(study, [use])
        marks = self.sums.release_marks(proposal, request)
        self._release(Outgoing(study, request.round, kind, stored[0], stored[1].size, marks))
        return stored[0], stored[1].pieces()

    def _contribution(
        self, request: Train | Evaluate, received: Received, payload: Payload, made: Contributed
    ) -> Update | Counts:
        header = self._header(received)
        if isinstance(request, Evaluate):
            return Counts(**header, payload=payload, round=request.round, attempt=request.attempt, epsilon=made.epsilon)
        return Update(
            **header,
            payload=payload,
            round=request.round,
            attempt=request.attempt,
            epsilon=made.epsilon,
            countersignature=made.countersignature,
        )

    def _close(self, proposal: Proposal, request: Close, received: Received) -> bytes:
        """Countersign the last record, report the study's final ε, and delete its secrets."""
        study, recorded = proposal.study, request.recorded
        stored = self._stored(received, recorded.round, "closing")
        if stored is None:
            self._check_open(request, recorded.round, study)
            if not study.may_end(recorded.round):
                raise PolicyRefusal("witness", f"round {recorded.round} is not the study's last")
            countersignature = witness(self.service, proposal, recorded)
            closing = Closing(
                **self._header(received),
                round=recorded.round,
                countersignature=countersignature,
                epsilon=reported(self.service.spending.study_epsilon(study.digest)),
                audit=last_audit(self.service, study),
            )
            encoded = messages.encode(closing, self.service.identity, request.protocol)
            self.service.responses.put(request.study, recorded.round, "closing", received.sha256, encoded, b"")
        else:
            encoded = stored[0]
        self.sums.forget(study)
        self._release(Outgoing(request.study, recorded.round, "closing", encoded, 0, {}))
        return encoded

    def _stored(self, received: Received, number: int, kind: str) -> tuple[bytes, StoredPayload] | None:
        """The answer given to exactly this request; raises PolicyRefusal where a later one was answered since."""
        try:
            return self.service.responses.get(received.request.study, number, kind, received.sha256)
        except PeerError as error:
            raise PolicyRefusal("stale-round", str(error)) from error

    def _witnessed(self, proposal: Proposal, request: Train | Evaluate) -> str | None:
        """Countersignature over the record of the round before; None in the first round and for counts."""
        if isinstance(request, Evaluate):
            return None
        recorded = request.recorded
        if (recorded.round if recorded is not None else 0) != request.round - 1:
            raise PolicyRefusal("witness", f"round {request.round} is asked for without the record of the one before")
        return None if recorded is None else witness(self.service, proposal, recorded)

    # -- checks and bookkeeping

    def _check_open(self, request: Handshake | SumRequest | Close, number: int, study: Study) -> None:
        """Check that a round is one of the study's, and that its record was not shown yet: then nothing more leaves."""
        if number > study.training.rounds:
            raise PolicyRefusal("policy", f"round {number} of a study of {study.training.rounds} rounds")
        with self.service.ledger.exclusive():
            books = self.service.ledger.books
            last, closed = books.last_witnessed(request.study), request.study in books.closed
        if closed and not isinstance(request, Close):
            raise PolicyRefusal("stale-round", "the study is over: its end was countersigned")
        if last and number <= last and not isinstance(request, Close):
            raise PolicyRefusal("stale-round", f"round {number} is over: the record of round {last} was shown")

    def _check_addressed(self, request: Request) -> None:
        if request.federation != self.service.federation:
            raise PolicyRefusal("wrong-federation", "this site belongs to another federation")

    def _approved(self, request: Handshake | SumRequest | Close) -> tuple[Proposal, Plan]:
        """The study and its approved plan."""
        proposal = self.service.proposals.get(request.study)
        if proposal is None:
            raise PolicyRefusal("unknown-study", "no study with this digest was proposed to this site")
        if proposal.roster != request.roster:
            raise PolicyRefusal("wrong-roster", "the study was proposed with another roster")
        return proposal, self.service.approvals.in_force(proposal).plan

    def _header(self, received: Received) -> AnswerHeader:
        return self._header_of(received.request.study, received.sha256)

    def _header_of(self, study: str, request: str) -> AnswerHeader:
        head = self.service.ledger.head
        return AnswerHeader(
            federation=self.service.federation,
            study=study,
            site=self.service.site,
            request=request,
            head=Head(seq=head.seq, sha256=head.sha256),
        )

    def _release(self, answer: Outgoing) -> None:
        """Enter an answer in the ledger, once; only then may it be handed out."""
        sha256 = digest(answer.header)
        if sha256 not in self._released:
            fields = {"study": answer.study, "round": answer.round, "message": answer.kind, "sha256": sha256}
            size = len(answer.header) + answer.payload_bytes
            self.service.ledger.append("release", {**fields, **answer.marks, "bytes": size})
            self._released.add(sha256)

    def _refuse(self, received: Received, reason: Reason, detail: str) -> bytes:
        detail = sentence(detail)  # it may quote the request
        log.info("%s: refused, %s: %s", self._named(received), reason, detail)
        if reason in CURES:
            log.warning("out of this study for now: %s", CURES[reason])
        if reason != "pending" and self._known(received, reason) is None:
            study = received.request.study
            fields = {"study": study, "round": received.round, "reason": reason, "detail": detail}
            self.service.ledger.append("refuse", fields)
        shown = outgoing(reason, detail)
        return self._give(received, reason, lambda: Refusal(**self._header(received), reason=reason, detail=shown))

    def _named(self, received: Received) -> str:
        """Request and its study, for the log."""
        request, name = received.request, None
        if isinstance(request, Propose):
            name = request.contract.get("study")  # as the coordinator writes it, whatever that is
        else:
            with suppress(ConsiliumError):
                known = self.service.proposals.get(request.study)
                name = known and known.study.study
        called = f"{sentence(name)[: limits.NAME_CHARACTERS]} ({request.study[:12]})" if isinstance(name, str) else ""
        number = f" round {received.round}" if received.round else ""
        return f"{request.kind} study {called or request.study[:12]}{number}"

    def _give(
        self,
        received: Received,
        outcome: str,
        make: Callable[[], messages.Answer],
        body: bytes = b"",
        marks: ReleaseMarks | None = None,
    ) -> bytes:
        """Give a short answer: the same bytes, entered in the ledger once, while outcome and decision stay the same.

        Args:
            received: the request.
            outcome: reason of a refusal, state of an approval, or the answer's kind.
            make: makes the answer where it was not given before.
            body: the answer's payload.
            marks: further fields of its ``release`` entry.
        """
        key, known = (received.sha256, outcome), self._known(received, outcome)
        if known is None:
            answer = make()
            known = messages.encode(answer, self.service.identity, received.request.protocol)
            study = received.request.study
            self._release(Outgoing(study, received.round, answer.kind, known, len(body), marks or {}))
            self._given[key] = self.service.spending.decision(study), known
            if len(self._given) > REMEMBERED:
                self._given.popitem(last=False)
        self._given.move_to_end(key)
        return known

    def _known(self, received: Received, outcome: str) -> bytes | None:
        """The answer that was given, unless the study was decided on anew: keys of before a rejection are deleted."""
        decision, known = self._given.get((received.sha256, outcome), (None, None))
        return known if decision is self.service.spending.decision(received.request.study) else None

    def _unread(self, header: bytes, reason: Reason, detail: str) -> tuple[bytes, Iterable[bytes]]:
        """Refusal of a message that is not the coordinator's: no ledger entry, or strangers could fill the disk."""
        log.warning("a message was refused: %s", reason)
        refusal = Refusal(**self._header_of(messages.UNREAD, digest(header)), reason=reason, detail=sentence(detail))
        return messages.encode(refusal, self.service.identity, protocol_of(header)), NO_BODY
