"""Loss of hazards by interval, of each record on its own, and the probabilities that are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from consilium_shared.task import Loss


def hazard_loss(edges: tuple[float, ...]) -> Loss:
    """Sum over a record's intervals of the cross entropy of "the event comes in this one".

    A record counts in the intervals that it lived through, and in that of its event. The interval in which nothing more
    is known begins as one that was not lived through: it does not count. An event after the last edge is one that never
    came.
    """

    def loss(logits: torch.Tensor, times: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
        """Losses ``[B]`` of logits ``[B, J]``, times ``[B]`` in the edges' unit, and events int64 ``[B]``."""
        ends = torch.tensor(edges, dtype=times.dtype, device=times.device)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        lived = times[:, None] > ends
        here = (times[:, None] > starts) & ~lived & (events[:, None] == 1)
        here[:, 0] |= (times <= 0) & (events == 1)  # an event at the very start
        terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, here.to(logits.dtype), reduction="none")
        return (terms * (lived | here)).sum(1)

    return loss


def cumulative(logits: torch.Tensor, _times: torch.Tensor, _events: torch.Tensor) -> torch.Tensor:
    """Probability of the event until the end of each interval, float64 ``[B, J]``, of logits ``[B, J]``."""
    return -torch.expm1(torch.nn.functional.logsigmoid(-logits.double()).cumsum(1))
