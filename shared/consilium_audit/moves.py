"""Moves of the model: how far each round's updates took it, so that a jump is seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from consilium_shared.protocol.records import RoundRecord

JUMP = 3.0
"""A mean update that is so many times as long as the median round's is marked."""


@dataclass(frozen=True)
class Move:
    """One round.

    Attributes:
        update: L2 norm of the mean update.
        step: L2 norm of what the model moved by; 0 where no step was taken.
        jump: whether ``update`` is longer than ``JUMP`` times the median of the study's.
        no_metrics: why counts that were opened gave no metrics.
    """

    round: int
    update: float | None
    step: float | None
    jump: bool
    no_metrics: str | None


def moves(records: Sequence[RoundRecord]) -> list[Move]:
    """Moves, one of each record that says anything of it, in order."""
    known = [record.update_norm for record in records if record.update_norm is not None]
    usual = median(known) if known else 0.0
    found = []
    for record in records:
        update, why = record.update_norm, record.no_metrics or record.no_metrics_before
        if update is not None or why is not None:
            jump = update is not None and update > JUMP * usual
            found.append(Move(record.round, update, record.step_norm, jump, why))
    return found
