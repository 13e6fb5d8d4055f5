"""The coordinator's requests, answered: verified first, then policy, then budget, then work, then the ledger.

Answers are idempotent: the same request gets the same bytes, without a second training and without a second charge.
Every answer stands in the ledger (``release``) before it is handed out.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from consilium_client.answers import StoredPayload
from consilium_client.desk import Desk
from consilium_client.policy import check_contract, check_patients
from consilium_client.proposals import Proposal
from consilium_client.refusals import outgoing, place_of, reason_of, sentence
from consilium_client.spending import told
from consilium_client.witness import last_audit, witness
from consilium_shared import documents, messages, roster
from consilium_shared.canonical import digest
from consilium_shared.errors import (
    ConsiliumError,
    IntegrityError,
    PeerError,
    PolicyRefusal,
    SignatureError,
)
from consilium_shared.ledger.entry import Purpose
from consilium_shared.messages import (
    Close,
    Closing,
    Counts,
    Evaluate,
    Head,
    Payload,
    Propose,
    Refusal,
    Request,
    Standing,
    Train,
    Update,
)
from consilium_shared.metrics import Layout
from consilium_shared.privacy.event import GaussianEvent
from consilium_shared.privacy.plan import NonPrivatePlan, Plan, PrivacyPlan
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")

REMEMBERED = 1000
"""Short answers that are kept to be given again; beyond, the one not asked for the longest is forgotten."""

ANSWERS = {"update": Update, "counts": Counts, "closing": Closing}

ZERO = "0" * 64
"""Stands for federation and study in a refusal of something that could not be read."""


class Requests:
    """Message in, message out; one at a time."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._said: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._released = {entry.body.sha256 for entry in desk.ledger.entries if entry.kind == "release"}  # type: ignore[attr-defined]

    def handle(self, header: bytes, payload: bytes) -> tuple[bytes, Iterable[bytes]]:
        """The signed answer to a message, whatever it is, and its payload in pieces of ``limits.CHUNK_BYTES``.

        Raises nothing that the message can cause.
        """
        started = time.monotonic()
        try:
            request = messages.decode_request(header, self.desk.coordinator)
        except SignatureError:
            return self._unread(header, "bad-signature", "the request is not signed by this federation's coordinator")
        except PeerError as error:
            return self._unread(header, "malformed", str(error))
        except Exception as error:
            log.error("defect while reading a message: %s", place_of(error))
            return self._unread(header, "malformed", "the message cannot be read")
        number = getattr(request, "round", None)
        body: StoredPayload | None = None
        try:
            self._check_addressed(request)
            request.payload.check(payload)
            answer, body = self._dispatch(request, header, payload)
        except ConsiliumError as error:
            answer = self._refuse(request, header, *reason_of(error))
        except Exception as error:
            # The text of a foreign exception may quote data: only its type and place are logged.
            log.error("defect while answering %s: %s", request.kind, place_of(error))
            answer = self._refuse(request, header, "internal", "the site failed; its log says where")
        finally:
            self.desk.activity = {"doing": "waiting"}
        log.info(
            "%s study %s round %s: answered in %.1f s, %d bytes",
            request.kind,
            request.study[:12],
            number,
            time.monotonic() - started,
            len(answer) + (body.size if body else 0),
        )
        return answer, body.pieces() if body else ()

    # -- the requests

    def _dispatch(self, request: Request, header: bytes, payload: bytes) -> tuple[bytes, StoredPayload | None]:
        match request:
            case Propose():
                return self._propose(request, header), None
            case Train():
                return self._once(
                    request,
                    request.round,
                    header,
                    "update",
                    lambda p, plan: self._train(p, plan, request, header, payload),
                )
            case Evaluate():
                return self._once(
                    request,
                    request.round,
                    header,
                    "counts",
                    lambda p, plan: self._count(p, plan, request, header, payload),
                )
            case Close():
                return self._once(
                    request, request.recorded.round, header, "closing", lambda p, _: self._closing(p, request)
                )

    def _propose(self, request: Propose, header: bytes) -> bytes:
        study = Study.from_contract(request.contract)
        if study.digest != request.study:
            raise PeerError("the contract is not the one that the digest names")
        document = request.roster_document
        if set(document) != {"body", "signature"} or not isinstance(document["body"], dict):
            raise PolicyRefusal("wrong-roster", "the proposal carries no signed roster")
        signature = documents.signature_bytes(document["signature"])
        documents.verify(document["body"], signature, roster.DOMAIN, self.desk.coordinator)
        members = roster.parse_roster(document["body"], self.desk.federation)
        me = members.member(self.desk.site)
        if members.digest != request.roster or me is None or me.identity != self.desk.identity.public.hex():
            raise PolicyRefusal("wrong-roster", "the roster is another one, or lacks this site with its key")
        proposal = Proposal(study, members.digest, tuple(member.site for member in members.members))
        new = self.desk.check_new(proposal)
        state = self.desk.standing(proposal)
        if new:  # what the policy forbids is not kept for anybody to decide on
            self.desk.proposals.put(proposal)
        return self._say(header, state, request, None, lambda common: Standing(**common, state=state), "standing")

    def _once(
        self,
        request: Train | Evaluate | Close,
        number: int,
        header: bytes,
        kind: str,
        work: Callable[[Proposal, Plan], tuple[dict[str, Any], bytes, Callable[[], None]]],
    ) -> tuple[bytes, StoredPayload]:
        """The stored answer, or the work's. Stored first, then settled, then released: a crash repeats no more."""
        proposal, plan = self._approved(request)
        try:
            stored = self.desk.answers.get(request.study, number, kind, digest(header))
        except PeerError as error:
            raise PolicyRefusal("stale-round", str(error)) from error
        if stored is None:
            self._check_open(request, number, proposal.study)
            fields, body, settle = work(proposal, plan)
            common = {**self._common(request, header), "payload": Payload.of(body), "round": number}
            answer = messages.encode(ANSWERS[kind](**common, **fields), self.desk.identity)
            stored = answer, self.desk.answers.put(request.study, number, kind, digest(header), answer, body)
            settle()
        elif kind != "closing":
            purpose: Purpose = "training" if kind == "update" else "evaluation"
            if not self.desk.spending.attempts(request.study, number, purpose):
                raise IntegrityError(
                    f"the ledger has no charge for the stored answer to round {number}: an older ledger was put back. "
                    f"Move {self.desk.answers.folder} away; the round is then trained and charged anew"
                )
            self.desk.settle_answered(proposal.study, number, digest(header), plan, purpose)
        self._release(stored[0], stored[1].size, request.study, number, kind)
        return stored

    def _witness_before(self, proposal: Proposal, request: Train) -> str | None:
        """Witness what is shown of the round before; the countersignature, or None in the first round."""
        recorded = request.recorded
        if (recorded.round if recorded is not None else 0) != request.round - 1:
            raise PolicyRefusal("witness", f"round {request.round} is asked for without the record of the one before")
        return None if recorded is None else witness(self.desk, proposal, recorded)

    def _closing(self, proposal: Proposal, request: Close) -> tuple[dict[str, Any], bytes, Callable[[], None]]:
        study, recorded = proposal.study, request.recorded
        if recorded.round != study.training.rounds:
            raise PolicyRefusal("witness", f"round {recorded.round} is not the study's last")
        countersignature = witness(self.desk, proposal, recorded)
        epsilon = told(self.desk.spending.study_epsilon(study.digest))
        audit = last_audit(self.desk, study)
        return {"countersignature": countersignature, "epsilon": epsilon, "audit": audit}, b"", lambda: None

    def _train(
        self, proposal: Proposal, plan: Plan, request: Train, header: bytes, payload: bytes
    ) -> tuple[dict[str, Any], bytes, Callable[[], None]]:
        from consilium_client.training import device
        from consilium_client.training.trainer import check_independence, train

        desk, study = self.desk, proposal.study
        records = desk.records(study)
        self._check_policy(study)
        # Whatever can be refused is refused before it is charged.
        _check_model(payload, study)
        if isinstance(plan, PrivacyPlan):
            check_independence(study)
        where = device.choose(desk.config.device)
        countersignature = self._witness_before(proposal, request)
        reservation, seed = desk.reserve(study, request.round, digest(header), plan, "training")

        def watch(done: int, steps: int) -> None:
            desk.activity = {
                "doing": "training",
                "study": study.study,
                "round": request.round,
                "step": done,
                "steps": steps,
            }

        watch(0, plan.steps_per_round)
        try:
            result = train(
                payload,
                study,
                records,
                plan,
                round=request.round,
                site=desk.site,
                device=where,
                seed=seed,
                on_progress=watch,
            )
        except Exception:
            # What is said of the failure depends on the draw: this draw is over, and its charge stands in full.
            desk.attempts.end(study.digest, "training")
            raise
        weight = _weight(study, plan, result.patients)
        vector = np.append(result.update.astype(np.float64) * weight, weight).astype("<f4")

        def settle() -> None:
            reservation.settle(result.steps)
            desk.attempts.end(study.digest, "training")

        said = {"epsilon": told(reservation.study_epsilon_after), "countersignature": countersignature}
        return said, vector.tobytes(), settle

    def _count(
        self, proposal: Proposal, plan: Plan, request: Evaluate, header: bytes, payload: bytes
    ) -> tuple[dict[str, Any], bytes, Callable[[], None]]:
        from consilium_client.evaluation import evaluate, noised_counts
        from consilium_client.training import device

        desk, study = self.desk, proposal.study
        self._check_evaluated(study, request.round)
        self._check_policy(study)
        _check_model(payload, study)
        records = desk.records(study)
        where = device.choose(desk.config.device)
        reservation, seed = desk.reserve(study, request.round, digest(header), plan, "evaluation")
        desk.activity = {"doing": "evaluating", "study": study.study, "round": request.round}
        try:
            if isinstance(reservation.event, GaussianEvent):
                sigma = reservation.event.noise_multiplier
                counts = noised_counts(payload, study, records, where, noise_multiplier=sigma, seed=seed)
            else:
                counts = evaluate(payload, study, records, where, Layout.of(study))
        except Exception:
            desk.attempts.end(study.digest, "evaluation")
            raise

        def settle() -> None:
            reservation.settle(1)
            desk.attempts.end(study.digest, "evaluation")

        return {"epsilon": told(reservation.study_epsilon_after)}, counts.astype("<i8").tobytes(), settle

    # -- checks and bookkeeping

    def _check_policy(self, study: Study) -> None:
        """The policy of today, which may be stricter than at the approval."""
        patients = self.desk.patients(study)
        check_contract(self.desk.config.policy, study)
        check_patients(self.desk.config.policy, study, patients.train, patients.held_back)

    def _check_evaluated(self, study: Study, number: int) -> None:
        """Counts leave only where the study says so, of a round that was trained here, one model a round.

        Otherwise a coordinator could ask with models of its own making, before any training and as often as it likes,
        and read the held-back patients' values from the counts.
        """
        if not self.desk.config.policy.allow_evaluation_counts:
            raise PolicyRefusal("policy", "this site lets no evaluation counts leave")
        if number not in study.evaluated_rounds:
            raise PolicyRefusal("policy", f"round {number} is none after which the study evaluates")
        if self.desk.answers.latest(study.digest, "update") != number:
            raise PolicyRefusal("policy", f"round {number} is not the last that this site trained")

    def _check_open(self, request: Train | Evaluate | Close, number: int, study: Study) -> None:
        """A round is one of the study's; and once its record was shown to this site, nothing more leaves of it."""
        if number > study.training.rounds:
            raise PolicyRefusal("policy", f"round {number} of a study of {study.training.rounds} rounds")
        with self.desk.ledger.exclusive():
            last = self.desk.ledger.books.last_witnessed(request.study)
        if last and number <= last and not isinstance(request, Close):
            raise PolicyRefusal("stale-round", f"round {number} is over: the record of round {last} was shown")

    def _check_addressed(self, request: Request) -> None:
        if request.federation != self.desk.federation:
            raise PolicyRefusal("wrong-federation", "this site belongs to another federation")

    def _approved(self, request: Train | Evaluate | Close) -> tuple[Proposal, Plan]:
        """The study and its approved plan."""
        proposal = self.desk.proposals.get(request.study)
        if proposal is None:
            raise PolicyRefusal("unknown-study", "no study with this digest was proposed to this site")
        if proposal.roster != request.roster:
            raise PolicyRefusal("wrong-roster", "the study was proposed with another roster")
        return proposal, self.desk.approval(proposal).plan

    def _common(self, request: Request, header: bytes) -> dict[str, Any]:
        head = self.desk.ledger.head
        return {
            "federation": self.desk.federation,
            "study": request.study,
            "site": self.desk.site,
            "request": digest(header),
            "head": Head(seq=head.seq, sha256=head.sha256),
        }

    def _release(self, header: bytes, size: int, study: str, number: int | None, kind: str) -> None:
        """Enter the message in the ledger, once; only then may it be handed out."""
        sha256 = digest(header)
        if sha256 not in self._released:
            fields = {"study": study, "round": number, "message": kind, "sha256": sha256}
            self.desk.ledger.append("release", {**fields, "bytes": len(header) + size})
            self._released.add(sha256)

    def _refuse(self, request: Request, header: bytes, reason: Any, detail: str) -> bytes:
        number = getattr(request, "round", None)
        detail = sentence(detail)  # it may quote the request
        log.info("%s study %s round %s: refused, %s", request.kind, request.study[:12], number, reason)
        if reason != "pending" and (digest(header), reason) not in self._said:
            fields = {"study": request.study, "round": number, "reason": reason, "detail": detail}
            self.desk.ledger.append("refuse", fields)
        return self._say(
            header,
            reason,
            request,
            number,
            lambda common: Refusal(**common, reason=reason, detail=outgoing(reason, detail)),
            "refusal",
        )

    def _say(
        self,
        header: bytes,
        what: str,
        request: Request,
        number: int | None,
        make: Callable[[dict[str, Any]], messages.Answer],
        kind: str,
    ) -> bytes:
        """A short answer. While nothing has changed the same question gets the same bytes, and one ledger entry."""
        known = self._said.get((digest(header), what))
        if known is None:
            known = messages.encode(make(self._common(request, header)), self.desk.identity)
            self._release(known, 0, request.study, number, kind)
            self._said[digest(header), what] = known
            if len(self._said) > REMEMBERED:
                self._said.popitem(last=False)
        self._said.move_to_end((digest(header), what))
        return known

    def _unread(self, header: bytes, reason: Any, detail: str) -> tuple[bytes, Iterable[bytes]]:
        """Answer to what was not written by the coordinator: no ledger entry, or strangers could fill the disk."""
        log.warning("a message was refused: %s", reason)
        head = self.desk.ledger.head
        refusal = Refusal(
            federation=self.desk.federation,
            study=ZERO,
            site=self.desk.site,
            request=digest(header),
            head=Head(seq=head.seq, sha256=head.sha256),
            reason=reason,
            detail=sentence(detail),
        )
        return messages.encode(refusal, self.desk.identity), ()


def _weight(study: Study, plan: Plan, patients: int) -> float:
    """What the update counts for. With privacy the true number of patients stays here."""
    if study.aggregation.weighting == "equal":
        return 1.0
    if isinstance(plan, NonPrivatePlan):
        return float(patients)
    if plan.patients is None:
        raise PolicyRefusal("policy", "the approved plan has no number of patients that may leave; approve it again")
    return float(plan.patients)


def _check_model(payload: bytes, study: Study) -> None:
    """Raises PolicyRefusal unless the bytes are a model of the study."""
    from consilium_shared.models.vector import check

    try:
        check(payload, study)
    except PeerError as error:
        raise PolicyRefusal("model", str(error)) from error
