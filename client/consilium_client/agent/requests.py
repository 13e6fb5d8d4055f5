"""The coordinator's requests, answered: verified first, then policy, then budget, then work, then the ledger.

Answers are idempotent: the same request gets the same bytes, without a second training and without a second charge.
Every answer stands in the ledger (``release``) before it is handed out.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from consilium_client.agent.refusals import CURES, outgoing, place_of, protocol_of, reason_of, sentence
from consilium_client.agent.replay_guard import place
from consilium_client.agent.secure_sums import SecureSums
from consilium_client.agent.spending import told
from consilium_client.agent.study_service import StudyService
from consilium_client.agent.witness import last_audit, witness
from consilium_client.state.proposals import Proposal
from consilium_client.state.responses import StoredPayload
from consilium_shared import documents, limits
from consilium_shared.canonical import digest
from consilium_shared.errors import ConsiliumError, PeerError, PolicyRefusal, SignatureError, VersionError
from consilium_shared.identity import PublicIdentity
from consilium_shared.privacy.plan import Plan
from consilium_shared.protocol import messages, roster
from consilium_shared.protocol.messages import (
    Advertise,
    ApprovalStatus,
    Close,
    Closing,
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
)
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")

REMEMBERED = 1000
"""Short answers that are kept to be given again; beyond, the one not asked for the longest is forgotten."""


class RequestHandler:
    """Message in, message out; one at a time."""

    def __init__(self, service: StudyService) -> None:
        self.service = service
        self.sums = SecureSums(service)
        self._said: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._released = {entry.body.sha256 for entry in service.ledger.entries if entry.kind == "release"}  # type: ignore[attr-defined]

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
            log.error("defect while reading a message: %s", place_of(error))
            return self._unread(header, "malformed", "the message cannot be read")
        body: Iterable[bytes] = ()
        try:
            self._check_addressed(request)
            request.payload.check(payload)
            with self.service.leftovers.working:
                answer, body = self._dispatch(request, header, payload)
        except ConsiliumError as error:
            answer = self._refuse(request, header, *reason_of(error))
        except Exception as error:
            # The text of a foreign exception may quote data: only its type and place are logged.
            log.error("defect while answering %s: %s", request.kind, place_of(error))
            answer = self._refuse(request, header, "internal", "the site failed; its log says where")
        finally:
            self.service.activity = {"doing": "waiting"}
            self.service.leftovers.forget_rejected()
        log.info("%s: answered in %.1f s", self._named(request), time.monotonic() - started)
        return answer, body

    # -- the requests

    def _dispatch(self, request: Request, header: bytes, payload: bytes) -> tuple[bytes, Iterable[bytes]]:
        if isinstance(request, Propose):
            return self._propose(request, header), ()
        proposal, plan = self._approved(request)
        common, body = self._common(request, header), b""
        answer: messages.Answer
        match request:
            case Train() | Evaluate():
                return self._contribute(proposal, plan, request, header, payload)
            case Close():
                return self._close(proposal, request, header)
            case Handshake():
                self._check_open(request, proposal.study.training.rounds, proposal.study)
                answer, body = self.sums.handshake(proposal, request, payload, common)
            case Advertise():
                self._check_open(request, request.round, proposal.study)
                answer = self.sums.advertise(proposal, request, common)
            case Survivors():
                self._check_open(request, request.round, proposal.study)
                answer = self.sums.sign(proposal, request, payload, common)
            case Open():
                self._check_open(request, request.round, proposal.study)
                answer, body = self.sums.release(proposal, request, payload, common)
        number = getattr(request, "round", None)
        said = self._say(header, answer.kind, request, number, lambda _: answer, answer.kind, body)
        return said, (body,) if body else ()

    def _propose(self, request: Propose, header: bytes) -> bytes:
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
        new = self.service.check_new(proposal)
        try:
            state = self.service.approval_status(proposal)
        except PolicyRefusal as refusal:
            if refusal.reason_code != "rejected":
                self.service.proposals.put_refused(proposal)
            raise
        if new:
            self.service.proposals.put(proposal)
        return self._say(header, state, request, None, lambda common: ApprovalStatus(**common, state=state), "standing")

    def _contribute(
        self, proposal: Proposal, plan: Plan, request: Train | Evaluate, header: bytes, payload: bytes
    ) -> tuple[bytes, Iterable[bytes]]:
        """The stored answer, or the work's. Result kept, settled, answer stored, released: a crash repeats no more."""
        study, kind = request.study, "update" if isinstance(request, Train) else "counts"
        where, asked = place(request.round, request.attempt), digest(header)
        stored = self._stored(study, where, kind, asked)
        if stored is None:
            self._check_open(request, request.round, proposal.study)
            with self.service.responses.stage(study) as staged:
                make = self.sums.contribute(
                    proposal, plan, request, payload, staged, lambda: self._witnessed(proposal, request)
                )
                body = Payload(sha256=staged.sha256, size=staged.size)
                about = {**self._common(request, header), "payload": body}
                answer = messages.encode(make(about), self.service.identity, request.protocol)
                stored = answer, staged.commit(where, kind, asked, answer)
        else:
            self.sums.replay_guard.check_charged(study, (request.round, request.purpose))
        said = self.sums.said_of(proposal, request)
        self._release(stored[0], stored[1].size, study, request.round, kind, **said)
        return stored[0], stored[1].pieces()

    def _close(self, proposal: Proposal, request: Close, header: bytes) -> tuple[bytes, Iterable[bytes]]:
        """Witness the last record, and say what the study came to here; its secrets are deleted."""
        study, recorded = proposal.study, request.recorded
        stored = self._stored(request.study, recorded.round, "closing", digest(header))
        if stored is None:
            self._check_open(request, recorded.round, study)
            if recorded.round != study.training.rounds:
                raise PolicyRefusal("witness", f"round {recorded.round} is not the study's last")
            closing = Closing(
                round=recorded.round,
                countersignature=witness(self.service, proposal, recorded),
                epsilon=told(self.service.spending.study_epsilon(study.digest)),
                audit=last_audit(self.service, study),
                **self._common(request, header),
            )
            said = messages.encode(closing, self.service.identity, request.protocol)
            self.service.responses.put(request.study, recorded.round, "closing", digest(header), said, b"")
        else:
            said = stored[0]
        self.sums.forget(study)
        self._release(said, 0, request.study, recorded.round, "closing")
        return said, ()

    def _stored(self, study: str, where: int, kind: str, asked: str) -> tuple[bytes, StoredPayload] | None:
        try:
            return self.service.responses.get(study, where, kind, asked)
        except PeerError as error:
            raise PolicyRefusal("stale-round", str(error)) from error

    def _witnessed(self, proposal: Proposal, request: Train | Evaluate) -> dict[str, Any]:
        """Witness what is shown of the round before; with the countersignature, or None in the first round."""
        if isinstance(request, Evaluate):
            return {}
        recorded = request.recorded
        if (recorded.round if recorded is not None else 0) != request.round - 1:
            raise PolicyRefusal("witness", f"round {request.round} is asked for without the record of the one before")
        return {"countersignature": None if recorded is None else witness(self.service, proposal, recorded)}

    # -- checks and bookkeeping

    def _check_open(self, request: Handshake | SumRequest | Close, number: int, study: Study) -> None:
        """A round is one of the study's; and once its record was shown to this site, nothing more leaves of it."""
        if number > study.training.rounds:
            raise PolicyRefusal("policy", f"round {number} of a study of {study.training.rounds} rounds")
        with self.service.ledger.exclusive():
            last = self.service.ledger.books.last_witnessed(request.study)
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
        return proposal, self.service.approval(proposal).plan

    def _common(self, request: Request, header: bytes) -> dict[str, Any]:
        head = self.service.ledger.head
        return {
            "federation": self.service.federation,
            "study": request.study,
            "site": self.service.site,
            "request": digest(header),
            "head": Head(seq=head.seq, sha256=head.sha256),
        }

    def _release(self, header: bytes, size: int, study: str, number: int | None, kind: str, **more: int) -> None:
        """Enter the message in the ledger, once; only then may it be handed out. ``size``: of its payload."""
        sha256 = digest(header)
        if sha256 not in self._released:
            fields = {"study": study, "round": number, "message": kind, "sha256": sha256, **more}
            self.service.ledger.append("release", {**fields, "bytes": len(header) + size})
            self._released.add(sha256)

    def _refuse(self, request: Request, header: bytes, reason: Any, detail: str) -> bytes:
        number = getattr(request, "round", None)
        detail = sentence(detail)  # it may quote the request
        log.info("%s: refused, %s: %s", self._named(request), reason, detail)
        if reason in CURES:
            log.warning("out of this study for now: %s", CURES[reason])
        if reason != "pending" and (digest(header), reason) not in self._said:
            fields = {"study": request.study, "round": number, "reason": reason, "detail": detail}
            self.service.ledger.append("refuse", fields)
        return self._say(
            header,
            reason,
            request,
            number,
            lambda common: Refusal(**common, reason=reason, detail=outgoing(reason, detail)),
            "refusal",
        )

    def _named(self, request: Request) -> str:
        """Request and its study, for the log."""
        name: object = None
        if isinstance(request, Propose):
            name = request.contract.get("study")  # as the coordinator writes it, whatever that is
        else:
            with suppress(ConsiliumError):
                known = self.service.proposals.get(request.study)
                name = known and known.study.study
        number = getattr(request, "round", None)
        called = f"{sentence(name)[: limits.NAME_CHARACTERS]} ({request.study[:12]})" if isinstance(name, str) else ""
        return f"{request.kind} study {called or request.study[:12]}" + (f" round {number}" if number else "")

    def _say(
        self,
        header: bytes,
        what: str,
        request: Request,
        number: int | None,
        make: Callable[[dict[str, Any]], messages.Answer],
        kind: str,
        body: bytes = b"",
    ) -> bytes:
        """A short answer. While nothing has changed the same question gets the same bytes, and one ledger entry."""
        known = self._said.get((digest(header), what))
        if known is None:
            known = messages.encode(make(self._common(request, header)), self.service.identity, request.protocol)
            more = {"attempt": request.attempt} if isinstance(request, Survivors) and kind == "signed" else {}
            self._release(known, len(body), request.study, number, kind, **more)
            self._said[digest(header), what] = known
            if len(self._said) > REMEMBERED:
                self._said.popitem(last=False)
        self._said.move_to_end((digest(header), what))
        return known

    def _unread(self, header: bytes, reason: Any, detail: str) -> tuple[bytes, Iterable[bytes]]:
        """Answer to what was not written by the coordinator: no ledger entry, or strangers could fill the disk."""
        log.warning("a message was refused: %s", reason)
        head = self.service.ledger.head
        refusal = Refusal(
            federation=self.service.federation,
            study=messages.UNREAD,
            site=self.service.site,
            request=digest(header),
            head=Head(seq=head.seq, sha256=head.sha256),
            reason=reason,
            detail=sentence(detail),
        )
        return messages.encode(refusal, self.service.identity, protocol_of(header)), ()
