"""Models of forecasts: a table's records float32 ``[B, F]`` to numbers ``[B, T · Q]`` in scaled units.

Untrained they predict the last value where the study names it, else the targets' centers.
"""

from __future__ import annotations

import torch
from torch import nn

from consilium_shared.inputs import width
from consilium_shared.study import Study
from consilium_tasks.forecasting import data_of, options_of
from consilium_tasks.networks import MLP


class Linear(nn.Module):
    """Linear regression."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Numbers ``[B, T · Q]`` of records ``[B, F]``."""
        found: torch.Tensor = self.head(inputs)
        return found


class Skipped(MLP):
    """``MLP`` beside a linear regression; it begins at 0."""

    def __init__(self, skip: nn.Linear, hidden: int, layers: int) -> None:
        super().__init__(skip.in_features, skip.out_features, hidden, layers)
        self.skip = skip
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Numbers ``[B, T · Q]`` of records ``[B, F]``."""
        beside: torch.Tensor = self.skip(inputs)
        return super().forward(inputs) + beside


def persistence(study: Study) -> nn.Linear:
    """Linear layer that gives each target's last value at every level."""
    data = data_of(study)
    levels = len(data.quantiles) or 1
    layer = nn.Linear(width(data.features), levels * len(data.targets))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for at, target in enumerate(data.targets):
            if (last := data.last_of(target)) is not None:
                feature, factor, offset = last
                column = width(data.features[: data.features.index(feature)])
                layer.weight[at * levels : (at + 1) * levels, column] = factor
                layer.bias[at * levels : (at + 1) * levels] = offset
    return layer


def linear(study: Study) -> Linear:
    """``Linear`` over the contract's features."""
    return Linear(persistence(study))


def mlp(study: Study) -> Skipped:
    """``Skipped`` over the contract's features."""
    options = options_of(study)
    return Skipped(persistence(study), options.hidden, options.layers)
