"""Linear layers: a sample's gradient is Σ_t δ_t a_tᵀ over the places t at which the weight is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer, in_autocast, random
from dpsgd.tape import Tape


class RecordedLinear(torch.autograd.Function):
    """``nn.functional.linear`` whose backward pass hands inputs and output gradients to ``record``."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, record: Callable[..., None]) -> Tensor:
        """Inputs ``[B, …, d]`` to ``[B, …, p]``."""
        ctx.save_for_backward(inputs, weight)
        ctx.record = record
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the inputs alone."""
        inputs, weight = ctx.saved_tensors
        if len(grad):
            ctx.record(inputs, grad)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None


def forward(module: nn.Linear, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""

    def record(inputs: Tensor, grad: Tensor) -> None:
        inputs, grad = (each.reshape(len(each), -1, each.shape[-1]) for each in (inputs, grad))
        tape.record_outer_product((module.weight,), inputs, grad)
        if module.bias is not None:
            tape.record_gradients(module.bias, grad.sum(1))

    inputs, weight, bias = in_autocast(module, inputs)
    found: Tensor = RecordedLinear.apply(inputs, weight, bias, record)  # type: ignore[no-untyped-call]
    return found


def examples() -> Iterator[Example]:
    """Examples with vectors, and with series of vectors."""
    yield Example(nn.Linear(5, 3), random(5))
    yield Example(nn.Linear(4, 6, bias=False), random(7, 4), "many places, no bias")
    yield Example(nn.Linear(40, 30), random(64, 40), "large")


LAYERS = [Layer(nn.Linear, forward, examples)]
