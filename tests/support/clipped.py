"""Clipped sums of our engine behind Opacus's interface, and the same by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpsgd.opacus_mode import BookKeepingEngine

Criterion = Callable[[Tensor, Tensor], Tensor]
BOUND = 0.5
ALONE = nn.CrossEntropyLoss(reduction="none")


class Private:
    """A model in training without noise; ``clipped_sum`` is what a step would add noise to."""

    def __init__(self, model: nn.Module, criterion: Criterion = ALONE, batch: int = 8, **about: Any) -> None:
        about = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "poisson_sampling": False} | about
        self.parameters = list(model.parameters())
        self.module, self.optimizer, self.criterion, self.loader = BookKeepingEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(self.parameters, lr=0.0),
            criterion=criterion,
            data_loader=DataLoader(TensorDataset(torch.zeros(batch, 1)), batch_size=batch),
            grad_sample_mode="book-keeping",
            **about,
        )

    def clipped_sum(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Σ of clipped gradients, flat."""
        self.optimizer.zero_grad()
        self.criterion(self.module(inputs), labels).backward()
        self.optimizer.step()
        return self.released() * self.optimizer.expected_batch_size

    def released(self) -> Tensor:
        """What a step left in ``grad``, flat."""
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
        )


def by_hand(model: nn.Module, criterion: Criterion, inputs: Tensor, labels: Tensor, bound: float) -> Tensor:
    """The clipped sum, one sample after the other, by plain differentiation."""
    model, total = copy.deepcopy(model), torch.zeros(())
    for number in range(len(inputs)):
        loss = criterion(model(inputs[number : number + 1]), labels[number : number + 1]).mean()
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total = total + found * (bound / found.norm()).clamp(max=1.0)
    return total


def assert_near(one: Tensor, other: Tensor) -> None:
    """To 1e-5: of the clipping factor a millionth is kept back, so that norms are never too small."""
    assert torch.linalg.vector_norm(one - other) <= 1e-5 * max(1e-3, float(torch.linalg.vector_norm(other)))
