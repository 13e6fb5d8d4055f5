"""The loss of each record on its own. Nothing here ever averages over a batch.

A loss that couples the records of a batch (a weighted mean, a batch Dice) lets one patient move another's gradient,
and then clipping bounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from consilium_shared.errors import ConfigurationError
from consilium_shared.study import Study

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits ``[B, C]`` and classes int64 ``[B]`` to losses ``[B]``."""


def per_record(study: Study, device: torch.device) -> Loss:
    """Cross entropy of each record, times the study's constant weight of the record's class."""
    weights = study.training.class_weights
    constants = None if weights is None else torch.tensor(weights, dtype=torch.float64, device=device)

    def loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
        return losses if constants is None else losses * constants[classes].to(losses.dtype)

    return loss


def per_sample_sum(losses: torch.Tensor) -> torch.Tensor:
    """What to differentiate: the sum over samples of each one's loss, ``[B]``, or mean loss, ``[B, …]``.

    Raises:
        ConfigurationError: a single number, in which the samples were mixed already.
    """
    if losses.dim() == 0:
        raise ConfigurationError(
            'the loss is one number for the whole batch; give one for each sample (reduction="none")'
        )
    return losses.flatten(1).mean(1).sum() if losses.dim() > 1 else losses.sum()
