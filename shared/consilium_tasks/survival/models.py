"""Hazard models of a table's records: float32 ``[B, F]`` to the logits of the hazards ``[B, J]``."""

from __future__ import annotations

import torch
from torch import nn

from consilium_shared.inputs import width
from consilium_shared.study import Study
from consilium_tasks.networks import MLP
from consilium_tasks.survival import data_of, options_of

RARE = -3.0
"""Logit at which hazards begin: about one in twenty."""


class LinearHazard(nn.Module):
    """One risk for all intervals, linear in the features, beside a hazard of each interval (proportional odds).

    So few numbers that the noise of a small hospital's budget leaves them. Starts at no risk of anybody's own.
    """

    def __init__(self, inputs: int, intervals: int) -> None:
        super().__init__()
        self.risk = nn.Linear(inputs, 1, bias=False)
        self.head = nn.Linear(1, intervals)
        nn.init.zeros_(self.risk.weight)
        nn.init.ones_(self.head.weight)
        nn.init.constant_(self.head.bias, RARE)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, J]`` of records ``[B, F]``."""
        logits: torch.Tensor = self.head(self.risk(inputs))
        return logits


def linear(study: Study) -> LinearHazard:
    """``LinearHazard`` over the contract's features and intervals."""
    data = data_of(study)
    return LinearHazard(width(data.features), len(data.edges))


def mlp(study: Study) -> MLP:
    """``MLP`` over the contract's features, with a logit for each interval; its hazards begin rare."""
    data, options = data_of(study), options_of(study)
    model = MLP(width(data.features), len(data.edges), options.hidden, options.layers)
    nn.init.constant_(model.head.bias, RARE)
    return model
