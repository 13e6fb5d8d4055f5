"""Group and instance normalisation with weights.

torch's kernel for the gradient of the affine weights adds over the batch. With the batch's channels as channels of one
sample it has nothing to add over, and gives each sample's. An instance norm is a group norm of one channel a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer, random, uneven
from dpsgd.tape import Tape

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, record: Callable[..., None]
    ) -> Tensor:
        inputs = inputs.contiguous()
        batch, channels = inputs.shape[:2]
        found, mean, rstd = torch.native_group_norm(
            inputs, weight, bias, batch, channels, inputs[0, 0].numel(), groups, eps
        )
        ctx.save_for_backward(inputs, weight, mean, rstd)
        ctx.groups, ctx.record = groups, record
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, rstd = ctx.saved_tensors
        batch, channels = inputs.shape[:2]
        one = (1, batch * channels, inputs[0, 0].numel())
        by_inputs, by_weight, by_bias = torch.ops.aten.native_group_norm_backward(
            grad.contiguous().view(one),
            inputs.view(one),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight.repeat(batch),
            *one,
            batch * ctx.groups,
            [ctx.needs_input_grad[0], True, True],
        )
        if len(grad):
            ctx.record(by_weight.view(batch, channels), by_bias.view(batch, channels))
        return (by_inputs.view_as(inputs) if ctx.needs_input_grad[0] else None), None, None, None, None, None


def _normalised(module: nn.GroupNorm | InstanceNorm, groups: int, tape: Tape, inputs: Tensor) -> Tensor:
    if not len(inputs):
        return inputs.clone()

    def record(by_weight: Tensor, by_bias: Tensor) -> None:
        tape.record_gradients(module.weight, by_weight)
        tape.record_gradients(module.bias, by_bias)

    inputs = inputs.to(module.weight.dtype)  # as autocast does with a normalisation
    found: Tensor = _GroupNorm.apply(inputs, module.weight, module.bias, groups, module.eps, record)  # type: ignore[no-untyped-call]
    return found


def group_norm(module: nn.GroupNorm, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""
    return _normalised(module, module.num_groups, tape, inputs)


def instance_norm(module: InstanceNorm, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``. Raises RuntimeError for a sample without a batch."""
    if inputs.dim() != module._get_no_batch_dim() + 1:
        raise RuntimeError(f"inputs of {inputs.dim()} dimensions: the first must be the batch")
    module._check_input_dim(inputs)
    return _normalised(module, module.num_features, tape, inputs)


def _refusal(module: InstanceNorm) -> str:
    if module.track_running_stats:
        return "keeps statistics over samples; leave out track_running_stats"
    return ""


def group_norms() -> Iterator[Example]:
    """Examples with one group, and with as many groups as channels."""
    for groups in (1, 2, 6):
        yield Example(uneven(nn.GroupNorm(groups, 6)), random(6, 5, 4), f"{groups} groups")
    yield Example(uneven(nn.GroupNorm(4, 16)), random(16, 12, 12), "large")


def instance_norms(kind: type[InstanceNorm], *pixels: int) -> Callable[[], Iterator[Example]]:
    """Example of this many dimensions."""

    def examples() -> Iterator[Example]:
        yield Example(uneven(kind(3, affine=True)), random(3, *pixels))

    return examples


LAYERS = [
    Layer(nn.GroupNorm, group_norm, group_norms),
    Layer(nn.InstanceNorm1d, instance_norm, instance_norms(nn.InstanceNorm1d, 9), _refusal),
    Layer(nn.InstanceNorm2d, instance_norm, instance_norms(nn.InstanceNorm2d, 4, 5), _refusal),
    Layer(nn.InstanceNorm3d, instance_norm, instance_norms(nn.InstanceNorm3d, 3, 4, 2), _refusal),
]
