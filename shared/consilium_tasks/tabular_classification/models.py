"""Models of a table's records: float32 ``[B, F]`` to logits ``[B, C]``."""

from __future__ import annotations

import torch
from torch import nn

from consilium_shared.inputs import width
from consilium_shared.study import Study
from consilium_tasks.classification.task import classes_of, options_of
from consilium_tasks.networks import MLP
from consilium_tasks.tabular_classification import features_of


class Logistic(nn.Module):
    """Multinomial logistic regression. Starts at zero: the problem is convex, so a random start only adds noise."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]`` of records ``[B, F]``."""
        logits: torch.Tensor = self.head(inputs)
        return logits


def logistic(study: Study) -> Logistic:
    """``Logistic`` over the contract's features."""
    return Logistic(width(features_of(study)), classes_of(study))


def mlp(study: Study) -> MLP:
    """``MLP`` over the contract's features."""
    options = options_of(study)
    return MLP(width(features_of(study)), classes_of(study), options.hidden, options.layers)
