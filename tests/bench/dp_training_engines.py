"""The four ways of training that ``dp_training.py`` compares, each as one step on one batch.

All train with SGD on the cross entropy of a sample (its mean over the pixels, where a sample has several labels). The
private ones clip each sample's gradient to norm 1 and add noise of deviation 1. ``poisson_sampling`` is off, so that
all of them see the same batch; what is measured is never released.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_training_models import Case
from dpsgd.opacus_mode import BookKeepingEngine

RATE, SIGMA, BOUND = 1e-3, 1.0, 1.0


class SampleLoss(nn.Module):
    """Cross entropy, with ``reduction`` as Opacus's ghost mode switches it: a vector over samples, or its mean."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
        return losses if self.reduction == "none" else losses.mean()


class Training:
    """A model in training on one batch, always the same."""

    def __init__(self, engine: str, case: Case, size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self._samples, self._labels = case.batch(size, device)
        # Only plain and ours train torch's own recurrent layers.
        build = case.build_for_opacus if engine.startswith("opacus") else case.build
        model = build().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        loader = DataLoader(TensorDataset(self._samples, self._labels), batch_size=size)
        self._model, self.optimizer, self._criterion = ENGINES[engine](model, optimizer, loader)
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        if device.type == "cuda":
            self._precision = lambda: torch.autocast("cuda", dtype=torch.bfloat16)

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        with self._precision():
            loss = self._criterion(self._model(self._samples), self._labels)
        loss.backward()
        self.optimizer.step()

    def rest(self) -> None:
        """Free the gradients, so that the engines of an interleaved run do not hold theirs all at once."""
        self.optimizer.zero_grad()


Parts = tuple[nn.Module, Any, Any]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> Parts:
    """No privacy."""
    return model, optimizer, SampleLoss("mean")


def opacus_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> Parts:
    """Opacus, every per-sample gradient formed."""
    wrapped, private, _ = PrivacyEngine(accountant="prv").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        poisson_sampling=False,
        grad_sample_mode="hooks",
    )
    return wrapped, private, SampleLoss("mean")


def opacus_ghost(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> Parts:
    """Opacus, norms first and then a second backward pass over re-weighted losses."""
    wrapped, private, criterion, _ = PrivacyEngine(accountant="prv").make_private(
        module=model,
        optimizer=optimizer,
        criterion=SampleLoss("mean"),
        data_loader=loader,
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    return wrapped, private, criterion


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> Parts:
    """One backward pass, no per-sample gradients."""

    wrapped, private, criterion, _ = BookKeepingEngine(accountant="prv").make_private(
        module=model,
        optimizer=optimizer,
        criterion=SampleLoss("none"),
        data_loader=loader,
        noise_multiplier=SIGMA,
        max_grad_norm=BOUND,
        poisson_sampling=False,
        grad_sample_mode="book-keeping",
    )
    return wrapped, private, criterion


ENGINES: dict[str, Callable[[nn.Module, torch.optim.Optimizer, DataLoader[Any]], Parts]] = {
    "plain": plain,
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": opacus_ghost,
    "ours": ours,
}
"""Each gives the model, the optimizer and the criterion of a step."""
