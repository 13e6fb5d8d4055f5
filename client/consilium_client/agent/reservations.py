"""Reservations of approved studies on an asset: from the approval until they are charged, or never can be.

An approval reserves the cost of the whole study, so that no study approved later can make it run out of budget. A
reservation ends without a charge for rounds in which the site took no part, once the record of such a round was
witnessed; and for all that is left, once the last record was witnessed or the approval is withdrawn. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from consilium_shared.ledger.chain import Books
from consilium_shared.ledger.entry import Approve, Purpose
from consilium_shared.privacy.event import Event
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_from_dict


@dataclass(frozen=True)
class Reserved:
    """Reservation of one approved study.

    Attributes:
        study: its digest.
        name: its name.
        events: what it may still be charged for, at least one event.
    """

    study: str
    name: str
    events: tuple[Event, ...]


def uses_left(books: Books, study: str, plan: PrivacyPlan, purpose: Purpose) -> int:
    """Number of further charges for that purpose that the plan pays for.

    A second charge for the same round, after a failure, uses up one that the plan has for a later round: so all charges
    of a study together never cost more than was reserved for it.
    """
    over = books.last_witnessed(study)  # rounds up to this one take no further charge
    if over >= plan.rounds or study in books.closed:
        return 0
    # What was settled with nothing run cost nothing.
    charged = [
        each.body.round
        for each in books.charges.values()
        if (each.body.study, each.body.purpose) == (study, purpose) and each.settled != 0
    ]
    if purpose == "evaluation":
        return max(0, plan.evaluations - len(charged))
    missed = set(range(1, over + 1)) - set(charged)
    return max(0, plan.rounds - len(missed) - len(charged))


def left(books: Books, study: str, plan: Plan) -> tuple[Event, ...]:
    """Events that a study may still be charged for under its plan, approved or about to be."""
    if not isinstance(plan, PrivacyPlan):
        over = books.last_witnessed(study) >= plan.rounds or study in books.closed
        return () if over else (plan.event(),)
    found: list[Event] = []
    if rounds := uses_left(books, study, plan, "training"):
        found.append(plan.event(rounds))
    evaluation, count = plan.evaluation_event(), plan.count_event()
    if evaluation is not None:
        found += [evaluation] * uses_left(books, study, plan, "evaluation")
    if count is not None and plan.patients not in books.counted.get(study, ()):
        found.append(count)
    return tuple(found)


def reserved(books: Books, asset: str) -> tuple[Reserved, ...]:
    """Reservations of an asset, in the order of the decisions; studies that take no more are left out."""
    found = []
    for study, decision in books.decisions.items():
        if isinstance(decision, Approve) and decision.asset == asset:
            events = left(books, study, plan_from_dict(decision.plan.model_dump()))
            if events:
                found.append(Reserved(study, decision.name, events))
    return tuple(found)
