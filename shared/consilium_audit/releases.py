"""What a ledger says of one study: approved as the contract has it, charged as approved, and nothing left uncharged."""

from __future__ import annotations

from dataclasses import dataclass, field

from consilium_shared.errors import BudgetRefused, ConfigurationError, LedgerError
from consilium_shared.ledger.entry import Approve, Audit, Charge, DpSgd, NonPrivate, Purpose, Release, Settle
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


@dataclass
class _Charges:
    """The charges of a study while its ledger is followed."""

    unused: dict[tuple[Purpose, int], list[tuple[int, Charge]]] = field(default_factory=dict)
    """Those for which nothing left yet, by purpose and by round; of a count, by the number of patients."""
    used: dict[int, Charge] = field(default_factory=dict)
    """By line: those for which something left, so that they cannot be given back."""
    counted: set[int] = field(default_factory=set)
    """The noised numbers of patients that were paid for and have left in an update."""
    left: dict[tuple[str, int], Release] = field(default_factory=dict)
    """By message and round: what left last with a charge of its own."""

    def use(self, purpose: Purpose, number: int) -> bool:
        """Take the last unused charge; False when there is none."""
        found = self.unused.get((purpose, number))
        if not found:
            return False
        line, charge = found.pop()
        self.used[line] = charge
        return True


def trace(ledger: VerifiedLedger, study: Study, roster: str) -> Trace:
    """Follow one study through a verified ledger; ``roster``: digest of the one that the evidence has.

    Raises:
        LedgerError: with the line: the approved plan or roster is not that of the evidence; the charge is not of
            the approved plan; an update, evaluation counts or the number of patients left without a charge of their own
            before; what is said to be the same once more was not there before; counts left of a round that is not
            evaluated, or by themselves before the last round was over; or what left was settled as if it had not run.
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
            if body.roster != roster:
                raise LedgerError("what was approved is another roster: other hospitals, or other keys", line=line)
            plan = _approved_plan(body, study, line)
        elif isinstance(body, Charge):
            if plan is None or event_from_dict(body.event.model_dump()) != _planned(plan, body.purpose):
                raise LedgerError("the charged event is not that of the approved plan", line=line)
            number = body.round
            if body.purpose == "count" and isinstance(plan, PrivacyPlan):
                number = plan.patients or 0
            charges.unused.setdefault((body.purpose, number), []).append((line, body))
            if body.purpose == "training":
                found.charges.setdefault(body.round, []).append(line)
        elif isinstance(body, Release):
            found.released[body.message, body.sha256] = line
            if body.message in ("update", "counts"):
                _check_contribution(body, study, plan, charges, line)
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


def _check_contribution(body: Release, study: Study, plan: Plan | None, charges: _Charges, line: int) -> None:
    """Raises LedgerError when an update, or counts, are about to leave without what pays for them.

    The same result under other masks needs no second charge: it leaves only where its first sum can never be opened.
    """
    number, place = body.round or 0, (body.message, body.round or 0)
    if body.again:
        first = charges.left.get(place)
        if first is None:
            raise LedgerError(f"the {body.message} of round {number} left again, but not before", line=line)
        if body.counts and not first.counts:  # in the sum before too few of the others added theirs
            _use_evaluation(number - 1, study, charges, line)
            charges.left[place] = body
        return
    if body.message == "update":
        _use_training(number, plan, charges, line)
        if body.counts:
            _use_evaluation(number - 1, study, charges, line)
    elif number != study.training.rounds:
        why = "after which none leave in a sum of their own"
        raise LedgerError(f"counts of round {number} left by themselves, {why}", line=line)
    else:
        _use_evaluation(number, study, charges, line)
    charges.left[place] = body


def _use_training(number: int, plan: Plan | None, charges: _Charges, line: int) -> None:
    if not charges.use("training", number):
        raise LedgerError(f"the update of round {number} left without a charge of its own before it", line=line)
    if isinstance(plan, PrivacyPlan) and plan.patients is not None and plan.patients not in charges.counted:
        if not charges.use("count", plan.patients):
            raise LedgerError(f"the update of round {number} left before the number of patients was charged", line=line)
        charges.counted.add(plan.patients)


def _use_evaluation(number: int, study: Study, charges: _Charges, line: int) -> None:
    """Also without privacy: there a charge costs nothing more, but says that counting was done anew."""
    if number not in study.evaluated_rounds:
        raise LedgerError(f"counts of round {number} left, after which the study does not evaluate", line=line)
    if not charges.use("evaluation", number):
        raise LedgerError(f"the counts of round {number} left without a charge of their own before them", line=line)


def _approved_plan(body: Approve, study: Study, line: int) -> Plan:
    """The plan of an approval; raises LedgerError when it is not the one that this contract asks for.

    Of everything in it only the noised number of patients is the site's own word; the rest follows from that.
    """
    plan = plan_from_dict(body.plan.model_dump())
    private = isinstance(plan, PrivacyPlan)
    patients = plan.patients if isinstance(plan, PrivacyPlan) else None
    named = (body.name, body.asset, body.epsilon) == (study.study, study.data.asset, study.privacy.epsilon)
    if not named or private != (study.privacy.mode == "dp") or private != (patients is not None):
        raise LedgerError("what was approved is not what the study's contract says", line=line)
    try:
        asked = plan_of(study, patients or 0).to_dict()
    except (ConfigurationError, BudgetRefused) as error:
        why = f"the contract allows no plan for the approved number of patients: {error}"
        raise LedgerError(why, line=line) from error
    calibrated = {"evaluation_noise", *({"noise_multiplier"} if study.privacy.noise_multiplier == "auto" else ())}
    for name, mine in plan.to_dict().items():
        enough = name in calibrated and None not in (mine, asked[name]) and mine >= asked[name] - TOLERANCE
        if mine != asked[name] and not enough:
            why = f"the approved plan's {name} is {mine}, and the study's contract asks for {asked[name]}"
            raise LedgerError(f"what was approved is not what the study's contract says: {why}", line=line)
    return plan
