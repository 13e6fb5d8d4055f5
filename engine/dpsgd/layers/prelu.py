"""PReLU: a sample's gradient at the slope of a channel is Σ_t δ_t · min(x_t, 0) over the channel's places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer, random
from dpsgd.tape import Tape


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, record: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.record = record
        return nn.functional.prelu(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        if len(grad):
            by_slope = grad * inputs.clamp(max=0.0)
            channels = len(weight) if len(weight) > 1 else 1
            ctx.record(by_slope.reshape(len(grad), channels, -1).sum(2))
        slopes = weight.view(-1, *[1] * max(0, inputs.dim() - 2)) if len(weight) > 1 else weight
        return (torch.where(inputs > 0, grad, grad * slopes) if ctx.needs_input_grad[0] else None), None, None


def forward(module: nn.PReLU, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""

    def record(by_slope: Tensor) -> None:
        tape.record_gradients(module.weight, by_slope)

    weight = module.weight.to(inputs.dtype)
    found: Tensor = _PReLU.apply(inputs, weight, record)  # type: ignore[no-untyped-call]
    return found


def examples() -> Iterator[Example]:
    """Examples with one slope for all, and one for each channel."""
    yield Example(nn.PReLU(init=0.3), random(4, 5), "one slope")
    yield Example(nn.PReLU(4, init=0.1), random(4, 5, 3), "a slope for each channel")
    yield Example(nn.PReLU(6, init=-0.2), random(6), "vectors")


LAYERS = [Layer(nn.PReLU, forward, examples)]
