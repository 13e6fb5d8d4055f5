"""Growth of ε: by round of a study, and by the calendar for an asset. Recomputed from a verified ledger's events."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from consilium_audit.budget import cost, cost_at, limit_of, ran, study_delta
from consilium_audit.payments import payments
from consilium_shared.ledger.entry import Approve, Open, Settle
from consilium_shared.ledger.verify import VerifiedLedger

POINTS = 50
"""Most points of a curve; of a long study's rounds so many are shown, evenly spread, first and last among them."""


@dataclass(frozen=True)
class RoundPoint:
    """ε of all that a study was charged up to this round, at its own δ; round 0 is what came before the first."""

    round: int
    epsilon: float


@dataclass(frozen=True)
class Moment:
    """An asset after one entry of the ledger, as a reader would have computed it then.

    Attributes:
        time: of the entry, as it is written there.
        line: the entry's number.
        epsilon: of everything so far, at the δ of the budget that is in force at the end.
        limit: ε that the budget allowed then.
        studies: digest of a shown study to its ε at its own δ; infinity without privacy.
    """

    time: str
    line: int
    epsilon: float
    limit: float
    studies: dict[str, float]


def study_history(ledger: VerifiedLedger, study: str, points: int = POINTS) -> tuple[RoundPoint, ...]:
    """The study's ε by round, rounds ascending; empty when it was never charged."""
    charges = [each for each in payments(ledger).charges if each.body.study == study]
    approval = _approvals(ledger).get(study)
    if approval is None or not charges:
        return ()
    delta = study_delta(approval)
    return tuple(
        RoundPoint(number, cost_at(ran(each for each in charges if each.body.round <= number), delta))
        for number in _thinned(sorted({each.body.round for each in charges}), points)
    )


def asset_history(
    ledger: VerifiedLedger, asset: str, shown: Collection[str], points: int = POINTS
) -> tuple[Moment, ...]:
    """The asset's ε by the calendar, from the entry that opened it; every change of its budget is in it.

    A charge shows once it is settled, or at once where it never was. ``shown``: digests of the studies whose own ε is
    told beside that of all; a ledger may have thousands.
    """
    delta = ledger.books.assets[asset].delta
    deltas = {study: study_delta(approval) for study, approval in _approvals(ledger).items()}
    settled = {e.body.charge_seq: e.seq for e in ledger.entries if isinstance(e.body, Settle)}
    charges = [each for each in payments(ledger).charges if each.body.asset == asset]
    budgets = [(e.seq, e.body) for e in ledger.entries if isinstance(e.body, Open) and e.body.asset == asset]
    spends = sorted(settled.get(each.seq, each.seq) for each in charges)
    moments = []
    for line in sorted({*(seq for seq, _ in budgets), *_thinned(spends, points)}):
        there = [
            each if settled.get(each.seq, line) <= line else replace(each, settled=None)
            for each in charges
            if each.seq <= line
        ]
        budget = next(body for seq, body in reversed(budgets) if seq <= line)
        studies = {
            study: cost_at(ran(each for each in there if each.body.study == study), deltas[study])
            for study in dict.fromkeys(each.body.study for each in there if each.body.study in shown)
        }
        time = ledger.entries[line - 1].time
        moments.append(Moment(time, line, cost(ran(there), delta), limit_of(budget), studies))
    return tuple(moments)


def _approvals(ledger: VerifiedLedger) -> dict[str, Approve]:
    return {entry.body.study: entry.body for entry in ledger.entries if isinstance(entry.body, Approve)}


def _thinned(values: Sequence[int], points: int) -> list[int]:
    """At most ``points`` of the values, evenly spread, the first and the last among them."""
    if len(values) <= points:
        return list(values)
    step = (len(values) - 1) / (points - 1)
    return [values[math.floor(i * step + 0.5)] for i in range(points)]
