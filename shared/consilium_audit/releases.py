"""A ledger's entries of one study: approved as the contract has it, charged as approved, counts where it asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from consilium_shared.errors import BudgetRefused, ConfigurationError, LedgerError
from consilium_shared.ledger.entry import Approve, Audit, Charge, Purpose, Release
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.event import Event, event_from_dict
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_from_dict, plan_of
from consilium_shared.study import Study

TOLERANCE = 0.002
"""In noise multipliers, which are calibrated in thousandths: on another machine that may end a step beside."""


@dataclass
class Trace:
    """Entries of one study, by the entry's number (and so its line), ascending.

    Attributes:
        charges: by round: before its training began.
        released: by kind of message and its header's SHA-256: the line that says that it is about to leave.
        audits: line to the outcome of an audit with canaries.
    """

    charges: dict[int, list[int]] = field(default_factory=dict)
    released: dict[tuple[str, str], int] = field(default_factory=dict)
    audits: dict[int, Audit] = field(default_factory=dict)

    def audit(self, until: int) -> tuple[int, int, int] | None:
        """Canaries, guesses and correct ones of the last audit up to that line, or None."""
        found = [body for line, body in self.audits.items() if line <= until]
        return (found[-1].canaries, found[-1].guesses, found[-1].correct) if found else None


def trace(ledger: VerifiedLedger, study: Study, roster: str) -> Trace:
    """Follow one study through a verified ledger; ``roster``: digest of the one that the evidence has.

    Raises:
        LedgerError: with the line: the approved plan or roster is not that of the evidence; the charge is not of
            the approved plan; or counts left of a round that is not evaluated, or by themselves before the last round
            was over. Whether what left was paid for, ``payments.py`` says.
    """
    found = Trace()
    plan: Plan | None = None
    for entry in ledger.entries:
        body, line = entry.body, entry.seq
        if getattr(body, "study", None) != study.digest:
            continue
        if isinstance(body, Approve):
            if body.roster != roster:
                raise LedgerError("what was approved is another roster: other hospitals, or other keys", line=line)
            plan = _approved_plan(body, study, line)
        elif isinstance(body, Charge):
            if plan is None or event_from_dict(body.event.model_dump()) != _planned(plan, body.purpose):
                raise LedgerError("the charged event is not that of the approved plan", line=line)
            if body.purpose == "training":
                found.charges.setdefault(body.round, []).append(line)
        elif isinstance(body, Release):
            found.released[body.message, body.sha256] = line
            _check_counts(body, study, line)
        elif isinstance(body, Audit):
            found.audits[line] = body
    return found


def _planned(plan: Plan, purpose: Purpose) -> Event | None:
    if purpose == "training":
        return plan.event()
    return plan.count_event() if purpose == "count" else plan.evaluation_event()


def _check_counts(body: Release, study: Study, line: int) -> None:
    """Raises LedgerError when counts are about to leave that the contract does not ask for then."""
    number = body.round or 0
    if body.message == "counts" and not study.may_end(number):
        why = "after which none leave in a sum of their own"
        raise LedgerError(f"counts of round {number} left by themselves, {why}", line=line)
    counted = number if body.message == "counts" else number - 1 if body.message == "update" and body.counts else None
    last = body.message == "counts" and bool(study.evaluated_rounds)
    if counted is not None and not last and counted not in study.evaluated_rounds:
        raise LedgerError(f"counts of round {counted} left, after which the study does not evaluate", line=line)


def _approved_plan(body: Approve, study: Study, line: int) -> Plan:
    """The plan of an approval; raises LedgerError when it is not the one that this contract asks for.

    Of everything in it only the noised number of patients is the site's own word; the rest follows from that.
    """
    plan = plan_from_dict(body.plan.model_dump())
    private = isinstance(plan, PrivacyPlan)
    patients = plan.patients if isinstance(plan, PrivacyPlan) else None
    named = (body.name, body.asset, body.epsilon) == (study.study, study.data.asset, study.privacy.epsilon)
    counted = private and study.privacy.sums is None
    if not named or private != (study.privacy.mode == "dp") or counted != (patients is not None):
        raise LedgerError("what was approved is not what the study's contract says", line=line)
    try:
        asked = plan_of(study, patients or 0).to_dict()
    except (ConfigurationError, BudgetRefused) as error:
        why = f"the contract allows no plan for the approved number of patients: {error}"
        raise LedgerError(why, line=line) from error
    calibrated = {"evaluation_noise", *({"noise_multiplier"} if study.privacy.noise_multiplier == "auto" else ())}
    approved: dict[str, Any] = plan.to_dict()
    for name in {**approved, **asked}:
        mine, wanted = approved.get(name), asked.get(name)
        enough = name in calibrated and mine is not None and wanted is not None and mine >= wanted - TOLERANCE
        if mine != wanted and not enough:
            why = f"the approved plan's {name} is {mine}, and the study's contract asks for {wanted}"
            raise LedgerError(f"what was approved is not what the study's contract says: {why}", line=line)
    return plan
