"""What a ledger says of one study: approved as the contract has it, charged as approved, and nothing left uncharged."""

from __future__ import annotations

from dataclasses import dataclass, field

from consilium_shared.errors import LedgerError
from consilium_shared.ledger.entry import Approve, Charge, DpSgd, Release, Settle
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.event import event_from_dict
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_from_dict
from consilium_shared.study import Study


@dataclass
class Trace:
    """Entries of one study by round, each the entry's number (and so its line), ascending.

    Attributes:
        charges: before a round's training began.
        updates: when its update was about to leave.
        counts: when its evaluation counts were about to leave.
    """

    charges: dict[int, list[int]] = field(default_factory=dict)
    updates: dict[int, list[int]] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)


def trace(ledger: VerifiedLedger, study: Study) -> Trace:
    """Follow one study through a verified ledger.

    Raises:
        LedgerError: with the line: the approval is not of this contract; the charge is not of the approved plan; an
            update left without a charge of its own before it; or one that left was settled as if it had not run.
    """
    found = Trace()
    plan: Plan | None = None
    unused: dict[int, list[tuple[int, Charge]]] = {}  # by round: the charges for which no update left yet
    paid: dict[int, DpSgd] = {}  # by the line of a charge whose update left: what was charged
    settled: dict[int, tuple[int, int]] = {}  # by the line of a charge: the line that settles it, and the steps
    for entry in ledger.entries:
        body, line = entry.body, entry.seq
        if isinstance(body, Settle):
            settled[body.charge_seq] = line, body.steps
        elif isinstance(body, Approve) and body.study == study.digest:
            plan = _approved_plan(body, study, line)
        elif isinstance(body, Charge) and body.study == study.digest:
            if plan is None or event_from_dict(body.event.model_dump()) != plan.event():
                raise LedgerError("the charged event is not that of the approved plan", line=line)
            found.charges.setdefault(body.round, []).append(line)
            unused.setdefault(body.round, []).append((line, body))
        elif isinstance(body, Release) and body.study == study.digest and body.round is not None:
            if body.message == "update":
                found.updates.setdefault(body.round, []).append(line)
                if not unused.get(body.round):
                    raise LedgerError(
                        f"the update of round {body.round} left without a charge of its own before it", line=line
                    )
                charge_line, charge = unused[body.round].pop()
                if isinstance(charge.event, DpSgd):
                    paid[charge_line] = charge.event
            elif body.message == "counts":
                found.counts.setdefault(body.round, []).append(line)
    for number, event in paid.items():
        line, steps = settled.get(number, (0, event.steps))
        if steps != event.steps:
            raise LedgerError(
                f"the charge in line {number} is settled with {steps} of {event.steps} steps, but its update left",
                line=line,
            )
    return found


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
        ]
        if privacy.noise_multiplier != "auto":
            same.append((plan.noise_multiplier, privacy.noise_multiplier))
    if any(mine != theirs for mine, theirs in same):
        raise LedgerError("what was approved is not what the study's contract says", line=line)
    return plan
