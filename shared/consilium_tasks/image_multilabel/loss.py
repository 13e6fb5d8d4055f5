"""Loss of several labels, of each record on its own, and the probabilities that are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from consilium_shared.task import Loss


def known_cross_entropy(weights: tuple[float, ...] | None, device: torch.device) -> Loss:
    """Cross entropy of each record's findings, the mean over those that are known; 0 where none is.

    ``weights``: constants of the study, by which what is said of a finding counts where it is present.
    """
    present = None if weights is None else torch.tensor(weights, dtype=torch.float64, device=device)

    def loss(logits: torch.Tensor, *findings: torch.Tensor) -> torch.Tensor:
        """Losses ``[B]`` of logits ``[B, L]`` and L findings int64 ``[B]``: 1, 0, or -1 where nothing is known."""
        true = torch.stack(findings, dim=1)
        known = (true >= 0).to(logits.dtype)
        terms = torch.nn.functional.binary_cross_entropy_with_logits(
            logits,
            true.clamp(min=0).to(logits.dtype),
            reduction="none",
            pos_weight=None if present is None else present.to(logits.dtype),
        )
        return (terms * known).sum(1) / known.sum(1).clamp(min=1)

    return loss


def probabilities(logits: torch.Tensor, *_findings: torch.Tensor) -> torch.Tensor:
    """Probability of each finding, float64 ``[B, L]``, of logits ``[B, L]``; what is true changes nothing."""
    return torch.sigmoid(logits.double())
