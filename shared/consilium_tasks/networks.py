"""Networks that several tasks have."""

from __future__ import annotations

import itertools

import torch
from torch import nn


class MLP(nn.Module):
    """``layers`` hidden layers of ``hidden`` rectified units."""

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [inputs] + [hidden] * layers
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(hidden, outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, outputs]`` of records ``[B, F]``."""
        for layer in self.hidden:
            inputs = torch.relu(layer(inputs))
        logits: torch.Tensor = self.head(inputs)
        return logits
