"""Independence test before a study trains: clipping one patient's gradient must bound what that patient changes.

Two things must hold of the model and the loss, and both are tested, not assumed: every trainable layer has a known
per-sample gradient, and no sample's gradient depends on who else is in its batch, or was in the one before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from consilium_shared.errors import ConfigurationError
from dpsgd import engines, registry
from dpsgd.per_sample import Loss
from dpsgd.row_owners import RowOwners

_TOLERANCE = 1e-8
"""Relative, in float64; a real dependence is of the order of 1."""

_CHECKED: set[str] = set()


def check_once(
    digest: str, model: nn.Module, loss: Loss, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> None:
    """``check``, once for each study digest in this process."""
    if digest not in _CHECKED:
        check(model, loss, inputs, targets)
        _CHECKED.add(digest)


def check(model: nn.Module, loss: Loss, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Refuse a model or loss for which clipping would not bound a patient's influence.

    Args:
        model: float32 model; a copy is tested.
        loss: losses ``[B]`` of outputs and targets, each ``[B, …]``.
        inputs: some samples, three or so, unlike each other: the model's inputs, each ``[B, …]``.
        targets: theirs, each ``[B, …]``.

    Raises:
        ConfigurationError: fewer than three samples, a layer without a known per-sample gradient, or a dependence
            between samples.
    """
    count = len(inputs[0])
    if count < 3:
        raise ConfigurationError(f"an example of {count} samples: give at least 3, so that one can move another")
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).cpu().double()
    with torch.no_grad():  # weights of zero, as some models begin with, would hide what lies below them
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    samples, truth = (
        [each.cpu().double() if each.is_floating_point() else each.cpu() for each in side] for side in (inputs, targets)
    )
    seeds = torch.arange(1, count + 1)
    rows = [slice(i, i + 1) for i in range(count)]
    if registry.random_layers(model):  # with what they draw a sample is held against itself alone, in the engine
        together = _gradients(model, loss, samples, truth, seeds)
        for row in rows:
            alone = _gradients(model, loss, [s[row] for s in samples], [t[row] for t in truth], seeds[row])
            _compare(together[row], alone)
        registry.draw_nothing(model)
    together = _gradients(model, loss, samples, truth, seeds)
    for row in rows:
        _compare(together[row], _gradient(model, loss, [s[row] for s in samples], [t[row] for t in truth]))


def _compare(together: torch.Tensor, alone: torch.Tensor) -> None:
    if not torch.linalg.vector_norm(together - alone) <= _TOLERANCE * (1.0 + torch.linalg.vector_norm(alone)):
        raise ConfigurationError(
            "a sample's gradient depends on others in its batch or in the one before; clipping would bound nothing"
        )


def _gradients(
    model: nn.Module,
    loss: Loss,
    samples: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    seeds: torch.Tensor,
) -> torch.Tensor:
    """Per-sample gradients ``[B, d]`` as the private trainer computes them."""
    tested, count = copy.deepcopy(model), len(samples[0])
    private = engines.wrap(tested, "book-keeping")
    try:
        for before in (True, False):  # what a pass leaves in the model, of whatever samples, must not move the next
            sides = [[each[:1].expand_as(each) if before else each for each in side] for side in (samples, truth)]
            private.tape.open(RowOwners(torch.arange(count), torch.device("cpu")), seeds)
            private.backward(loss(private(*sides[0]), *sides[1]))
    except RuntimeError as error:
        raise ConfigurationError(f"the model cannot be differentiated sample by sample: {error}") from error
    if any(parameter.grad is not None for parameter in tested.parameters()):
        raise ConfigurationError("a parameter is used outside of its layer; no clipping would bound its gradient")
    found = private.tape.gradients()
    trained = [p for p in tested.parameters() if p.requires_grad]
    return torch.cat([found[p] if p in found else p.new_zeros((count, p.numel())) for p in trained], dim=1)


def _gradient(
    model: nn.Module, loss: Loss, sample: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Gradient ``[t]`` of one sample alone, by plain differentiation."""
    plain = copy.deepcopy(model)
    trained = [p for p in plain.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(plain(*sample), *truth).sum(), trained, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(trained, found, strict=True)]
    )
