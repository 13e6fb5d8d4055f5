"""Per-sample losses: their type, and the scalar whose gradient is taken. Nothing here averages over a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from consilium_shared.errors import ConfigurationError

Loss = Callable[..., torch.Tensor]
"""Outputs ``[B, …]`` and targets, each ``[B, …]``, to losses ``[B]``."""


def per_sample_sum(losses: torch.Tensor, batch: int) -> torch.Tensor:
    """Scalar to differentiate: the sum over samples of each one's loss, ``[B]``, or mean loss, ``[B, …]``.

    Raises:
        ConfigurationError: not one for each of the batch's samples; then some were mixed already.
    """
    if losses.dim() == 0 or len(losses) != batch:
        found = "one number" if losses.dim() == 0 else f"{len(losses)} numbers"
        raise ConfigurationError(f'the loss is {found} for {batch} samples; give one for each (reduction="none")')
    return losses.flatten(1).mean(1).sum() if losses.dim() > 1 else losses.sum()
