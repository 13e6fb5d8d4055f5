"""Losses of numbers, of each record on its own, and the values that are counted.

A record's gradient by an output is 1 at most, whatever was measured: Huber's loss beyond one scale of the study, and
the quantile loss (Koenker & Bassett 1978) everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from consilium_shared.task import Loss, Measure


def huber(targets: int) -> Loss:
    """Mean of Huber's losses of a record's targets, of outputs ``[B, T]`` and T arrays ``[B]``, in scaled units."""

    def loss(outputs: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        true = torch.stack(numbers[:targets], dim=1).to(outputs.dtype)
        return torch.nn.functional.huber_loss(outputs, true, reduction="none").mean(1)

    return loss


def pinball(targets: int, levels: Sequence[float]) -> Loss:
    """Mean of the quantile losses of a record's targets, of outputs ``[B, T · Q]`` and T arrays ``[B]``."""

    def loss(outputs: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        true = torch.stack(numbers[:targets], dim=1).to(outputs.dtype)[:, :, None]
        level = torch.tensor(levels, dtype=outputs.dtype, device=outputs.device)
        over = true - outputs.reshape(-1, targets, len(levels))
        return torch.maximum(level * over, (level - 1) * over).mean((1, 2))

    return loss


def within(bounds: Sequence[tuple[float, float]], levels: int) -> Measure:
    """Outputs ``[B, T · Q]`` to values of the same shape within the bounds of their target, in scaled units.

    A quantile is not below the one before it.
    """

    def values(outputs: torch.Tensor, *_numbers: torch.Tensor) -> torch.Tensor:
        found = list[torch.Tensor]()
        for at, (low, high) in enumerate(bounds):
            for level in range(levels):
                value = outputs[:, at * levels + level]
                found.append(torch.maximum(value, found[-1]) if level else value)
            found[-levels:] = [each.clamp(low, high) for each in found[-levels:]]
        return torch.stack(found, dim=1)

    return values
