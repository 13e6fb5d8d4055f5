"""Convolutions on a tape: forward, the gradient of the inputs, and what the weight's per-sample gradients need.

A convolution applies its weight once at every place of its output, to the patch of its input that lies there. So its
per-sample gradients are a product of T = (number of places) patches and output gradients, as a linear layer's over T
steps; or, formed at once for a whole batch, the weight gradient of one convolution that has the batch's samples as
groups of channels (Rochette, Manoel & Tramel 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.patches import Geometry
from dpsgd.tape import Tape

_FEW_PLACES = 96
"""Up to so many places patches are copied out and multiplied; more are left to the grouped convolution."""


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, leave: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry, ctx.leave = geometry, leave
        return geometry.convolve(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        by_inputs = None
        if ctx.needs_input_grad[0]:
            by_inputs = ctx.geometry.backward(grad, inputs, weight, ctx.geometry.groups, (True, False))[0]
        if len(grad):
            ctx.leave(inputs, grad)
        return by_inputs, None, None, None, None


def apply(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, tape: Tape, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``module`` of ``inputs`` with its weight and bias in the precision given."""
    padding = (0,) * len(module.kernel_size)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode)
    else:
        padding = tuple(module.padding)
    geometry = Geometry(tuple(module.kernel_size), tuple(module.stride), padding, tuple(module.dilation), module.groups)

    def leave(inputs: Tensor, grad: Tensor) -> None:
        if module.bias is not None:
            tape.record_gradients(module.bias, grad.flatten(2).sum(2))
        _leave(tape, module.weight, geometry, inputs, grad)

    found: Tensor = _Convolution.apply(inputs, weight, bias, geometry, leave)  # type: ignore[no-untyped-call]
    return found


def _leave(tape: Tape, weight: Tensor, geometry: Geometry, inputs: Tensor, grad: Tensor) -> None:
    """The weight's entry."""
    if not weight.requires_grad:
        return
    channels, pixels = inputs.shape[1], inputs[0, 0].numel()
    outputs, places = grad.shape[1], grad[0, 0].numel()
    cut = geometry.groups == 1 and len(geometry.kernel) < 3
    cost_factored = geometry.cost_factored(pixels, channels, places, outputs)
    if cut and not tape.materializes(places, outputs, weight[0].numel(), cost_factored):
        tape.record_convolution(weight, geometry, inputs, grad)
    elif cut and (places <= _FEW_PLACES or set(geometry.kernel) == {1}):
        tape.record_gradients(weight, torch.bmm(grad.flatten(2), geometry.patches(inputs)))
    else:
        tape.record_gradients(weight, geometry.per_sample_gradients(inputs, grad))


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        output_padding: tuple[int, ...],
        leave: Callable[..., None],
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry, ctx.leave = geometry, leave
        about = geometry.stride, geometry.padding, geometry.dilation, True, output_padding, geometry.groups
        found: Tensor = torch.ops.aten.convolution(inputs, weight, bias, *about)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        by_inputs = ctx.geometry.convolve(grad, weight, None) if ctx.needs_input_grad[0] else None
        if len(grad):
            ctx.leave(inputs, grad)
        return by_inputs, None, None, None, None, None


def apply_transposed(
    module: nn.ConvTranspose2d, tape: Tape, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``module`` of ``inputs``. It is a convolution that goes backward, so its weight's gradient is that of one whose
    inputs are its output gradients."""
    geometry = Geometry(
        module.kernel_size, module.stride, tuple(map(int, module.padding)), tuple(module.dilation), module.groups
    )

    def leave(inputs: Tensor, grad: Tensor) -> None:
        if module.bias is not None:
            tape.record_gradients(module.bias, grad.flatten(2).sum(2))
        _leave(tape, module.weight, geometry, grad, inputs)

    found: Tensor = _Transposed.apply(inputs, weight, bias, geometry, tuple(module.output_padding), leave)  # type: ignore[no-untyped-call]
    return found
