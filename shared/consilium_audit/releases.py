"""What a ledger says of one study: approved as the contract has it, charged as approved, and nothing left uncharged."""

from __future__ import annotations

from dataclasses import dataclass, field

from consilium_shared.errors import LedgerError
from consilium_shared.ledger.entry import Approve, Audit, Charge, DpSgd, NonPrivate, Purpose, Release, Settle
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.event import Event, event_from_dict
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_from_dict
from consilium_shared.study import Study


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


@dataclass
class _Charges:
    """The charges of a study while its ledger is followed."""

    unused: dict[tuple[Purpose, int], list[tuple[int, Charge]]] = field(default_factory=dict)
    """Those for which nothing left yet, by purpose and round."""
    used: dict[int, Charge] = field(default_factory=dict)
    """By line: those for which something left, so that they cannot be given back."""

    def use(self, purpose: Purpose, number: int) -> bool:
        """Take the last unused charge; False when there is none."""
        found = self.unused.get((purpose, number))
        if not found:
            return False
        line, charge = found.pop()
        self.used[line] = charge
        return True

    def has_used(self, purpose: Purpose) -> bool:
        return any(charge.purpose == purpose for charge in self.used.values())


def trace(ledger: VerifiedLedger, study: Study) -> Trace:
    """Follow one study through a verified ledger.

    Raises:
        LedgerError: with the line: the approval is not of this contract; the charge is not of the approved plan; an
            update, evaluation counts or the number of patients left without a charge of their own before; or what left
            was settled as if it had not run.
    """
    found, charges = Trace(), _Charges()
    plan: Plan | None = None
    settled: dict[int, tuple[int, int]] = {}  # by the line of a charge: the line that settles it, and the steps
    for entry in ledger.entries:
        body, line = entry.body, entry.seq
        if isinstance(body, Settle):
            settled[body.charge_seq] = line, body.steps
        elif getattr(body, "study", None) != study.digest:
            continue
        elif isinstance(body, Approve):
            plan = _approved_plan(body, study, line)
        elif isinstance(body, Charge):
            if plan is None or event_from_dict(body.event.model_dump()) != _planned(plan, body.purpose):
                raise LedgerError("the charged event is not that of the approved plan", line=line)
            charges.unused.setdefault((body.purpose, body.round), []).append((line, body))
            if body.purpose == "training":
                found.charges.setdefault(body.round, []).append(line)
        elif isinstance(body, Release):
            found.released[body.message, body.sha256] = line
            _check_paid(body, plan, charges, line)
        elif isinstance(body, Audit):
            found.audits[line] = body
    for number, charge in charges.used.items():
        if isinstance(charge.event, NonPrivate):
            continue
        charged = charge.event.steps if isinstance(charge.event, DpSgd) else 1
        line, steps = settled.get(number, (0, charged))
        if steps != charged:
            raise LedgerError(
                f"the charge in line {number} is settled with {steps} of {charged} steps, but what it paid for left",
                line=line,
            )
    return found


def _planned(plan: Plan, purpose: Purpose) -> Event | None:
    if purpose == "training":
        return plan.event()
    return plan.count_event() if purpose == "count" else plan.evaluation_event()


def _check_paid(body: Release, plan: Plan | None, charges: _Charges, line: int) -> None:
    """Raises LedgerError when an update or evaluation counts are about to leave without what pays for them."""
    private = plan if isinstance(plan, PrivacyPlan) else None
    noised = private is not None and private.evaluation_noise is not None
    number = body.round or 0
    if body.message == "update":
        if not charges.use("training", number):
            raise LedgerError(f"the update of round {number} left without a charge of its own before it", line=line)
        counted = private is None or private.count_noise is None or charges.has_used("count")
        if not counted and not charges.use("count", 0):
            raise LedgerError(f"the update of round {number} left before the number of patients was charged", line=line)
    elif body.message == "counts" and noised and not charges.use("evaluation", number):
        raise LedgerError(f"the counts of round {number} left without a charge of their own before them", line=line)


def _approved_plan(body: Approve, study: Study, line: int) -> Plan:
    """The plan of an approval; raises LedgerError when it is not one for this contract."""
    plan, training, privacy = plan_from_dict(body.plan.model_dump()), study.training, study.privacy
    same = [
        (body.name, study.study),
        (body.asset, study.data.asset),
        (plan.rounds, training.rounds),
        (plan.steps_per_round, training.steps_per_round),
        (isinstance(plan, PrivacyPlan), privacy.mode == "dp"),
        (body.epsilon, privacy.epsilon),
    ]
    if isinstance(plan, PrivacyPlan):
        same += [
            (plan.epsilon, privacy.epsilon),
            (plan.delta, privacy.delta),
            (plan.clipping_norm, privacy.clipping_norm),
            (plan.records_per_patient, training.records_per_patient),
            (plan.count_noise or privacy.count_noise, privacy.count_noise),
            (max(plan.evaluations, len(study.evaluated_rounds)), len(study.evaluated_rounds)),
        ]
        if privacy.noise_multiplier != "auto":
            same.append((plan.noise_multiplier, privacy.noise_multiplier))
    if any(mine != theirs for mine, theirs in same):
        raise LedgerError("what was approved is not what the study's contract says", line=line)
    return plan
