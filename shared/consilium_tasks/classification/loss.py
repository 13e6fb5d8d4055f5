"""Cross entropy of each record, and the probabilities that are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_shared.task import Loss


def cross_entropy(study: Study, device: torch.device) -> Loss:
    """Cross entropy of each record, times the study's constant weight of the record's class: ``[B, C]`` to ``[B]``.

    With ``training.focal`` it counts the less the surer the model is of the class that is true.
    """
    weights, focal = study.training.class_weights, study.training.focal
    constants = None if weights is None else torch.tensor(weights, dtype=torch.float64, device=device)

    def loss(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
        if focal is not None:
            losses = losses * (-torch.expm1(-losses)) ** focal
        return losses if constants is None else losses * constants[classes].to(losses.dtype)

    return loss


def probabilities(logits: torch.Tensor, _classes: torch.Tensor) -> torch.Tensor:
    """Predicted distributions, float64 ``[B, C]``, of logits ``[B, C]``; what is true changes nothing."""
    return torch.softmax(logits.double(), dim=1)
