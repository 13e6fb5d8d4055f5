"""Losses of each record on its own, for several tasks. Nothing here ever averages over a batch.

A loss that couples the records of a batch (a weighted mean, a batch Dice) lets one patient move another's gradient, and
then clipping bounds nothing. Of Cox's partial likelihood there is no form that does not: each patient's term has the
risk scores of all who are at risk with it. ``independence.check`` refuses it; a discrete-time hazard is a cross entropy
of each patient's own intervals (Gensheimer & Narasimhan 2019), ``masked_cross_entropy`` here.
"""

from __future__ import annotations

import torch


def masked_cross_entropy(logits: torch.Tensor, classes: torch.Tensor, masked: int = -100) -> torch.Tensor:
    """Cross entropy of each sample, the mean over its own places that are not masked: ``[B]``; 0 where all are.

    Args:
        logits: ``[B, C, …]``.
        classes: int64 ``[B, …]``, ``masked`` at places that do not count.
    """
    losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none", ignore_index=masked).flatten(1)
    return losses.sum(1) / (classes != masked).flatten(1).sum(1).clamp(min=1)


def dice(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """1 − the soft Dice coefficient of each sample (Milletari et al. 2016), the mean over classes: ``[B]``.

    Args:
        logits: ``[B, C, …]``.
        classes: int64 ``[B, …]``.
    """
    found = torch.softmax(logits, dim=1).flatten(2)
    true = torch.nn.functional.one_hot(classes.flatten(1), logits.shape[1]).transpose(1, 2).to(found.dtype)
    overlap, sizes = (found * true).sum(2), found.sum(2) + true.sum(2)
    return 1.0 - ((2.0 * overlap + 1.0) / (sizes + 1.0)).mean(1)
