"""Before a study trains here: does clipping one patient's gradient really bound what that patient can change?

Two things must hold of the model and the loss, and both are tested, not assumed: every trainable layer has a known
per-sample gradient, and no sample's gradient depends on who else is in its batch.
"""

from __future__ import annotations

import copy
import warnings

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn

from consilium_client.training.loss import Loss
from consilium_shared.errors import ConfigurationError

_SAMPLES = 3
_TOLERANCE = 1e-8
"""Relative, in float64; a real dependence is of the order of 1."""

_CHECKED: set[str] = set()


def check_once(digest: str, model: nn.Module, loss: Loss, classes: int, shapes: list[tuple[int, ...]]) -> None:
    """``check``, once for each study digest in this process."""
    if digest not in _CHECKED:
        check(model, loss, classes, shapes)
        _CHECKED.add(digest)


def check(model: nn.Module, loss: Loss, classes: int, shapes: list[tuple[int, ...]]) -> None:
    """Refuse a model or loss for which clipping would not bound a patient's influence.

    Args:
        model: float32 model; a copy is tested.
        loss: losses ``[B]`` of logits ``[B, C]`` and classes ``[B]``.
        classes: C.
        shapes: the shape of one sample of each of the model's inputs, without B.

    Raises:
        ConfigurationError: a layer without a known per-sample gradient, a buffer, or a dependence between samples.
    """
    for name, module in model.named_modules():
        if list(module.buffers(recurse=False)):
            raise ConfigurationError(f"layer {name} keeps statistics over samples; it cannot be trained with privacy")
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        if trainable and type(module) not in GradSampleModule.GRAD_SAMPLERS:
            raise ConfigurationError(f"layer {name} ({type(module).__name__}) has no known per-sample gradient")
    generator = torch.Generator().manual_seed(0)
    samples = [torch.rand((_SAMPLES, *shape), generator=generator, dtype=torch.float64) for shape in shapes]
    labels = torch.arange(_SAMPLES) % classes
    together = _gradients(model, loss, samples, labels)
    for i in range(_SAMPLES):
        alone = _gradient(model, loss, [s[i : i + 1] for s in samples], labels[i : i + 1])
        if torch.linalg.vector_norm(together[i] - alone) > _TOLERANCE * (1.0 + torch.linalg.vector_norm(alone)):
            raise ConfigurationError("a sample's gradient depends on others in its batch; clipping would bound nothing")


def _gradients(model: nn.Module, loss: Loss, samples: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Per-sample gradients ``[B, t]`` as the private trainer computes them."""
    private = per_sample(copy.deepcopy(model).cpu().double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        loss(private(*samples), labels).sum().backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad_sample.flatten(1) for p in private.parameters() if p.requires_grad], dim=1)


def _gradient(model: nn.Module, loss: Loss, sample: list[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
    """Gradient ``[t]`` of one sample alone, by plain differentiation."""
    plain = copy.deepcopy(model).cpu().double()
    trained = [p for p in plain.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(plain(*sample), label).sum(), trained)
    return torch.cat([g.flatten() for g in gradients])


def per_sample(model: nn.Module) -> GradSampleModule:
    """The model in training mode, leaving ``grad_sample`` ``[B, ...]`` at every parameter after a backward pass over
    summed losses."""
    return GradSampleModule(model.train(), loss_reduction="sum", strict=True)
