"""Convolutions and transposed convolutions: forward, the gradient of the inputs, and records for the weight.

A convolution applies its weight once at every place of its output, to the patch of its input that lies there. So its
per-sample gradients are a product of T = (number of places) patches and output gradients, as a linear layer's over T
steps; or, formed at once for a whole batch, the weight gradient of one convolution that has the batch's samples as
groups of channels (Rochette, Manoel & Tramel 2019). A transposed convolution goes backward: its weight's gradient is
that of a convolution whose inputs are its output gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer, in_autocast, random
from dpsgd.patches import Geometry
from dpsgd.tape import Tape

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_FEW_PLACES = 96
"""Up to so many places patches are copied out and multiplied; more are left to the grouped convolution."""


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, record: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry, ctx.record = geometry, record
        return geometry.convolve(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        by_inputs = None
        if ctx.needs_input_grad[0]:
            by_inputs = ctx.geometry.backward(grad, inputs, weight, ctx.geometry.groups, (True, False))[0]
        if len(grad):
            ctx.record(inputs, grad)
        return by_inputs, None, None, None, None


def convolution(module: Convolution, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""
    inputs, weight, bias = in_autocast(module, inputs)
    padding = (0,) * len(module.kernel_size)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode)
    else:
        padding = tuple(module.padding)
    geometry = Geometry(tuple(module.kernel_size), tuple(module.stride), padding, tuple(module.dilation), module.groups)

    def record(inputs: Tensor, grad: Tensor) -> None:
        if module.bias is not None:
            tape.record_gradients(module.bias, grad.flatten(2).sum(2))
        _record_weight(tape, module.weight, geometry, inputs, grad)

    found: Tensor = _Convolution.apply(inputs, weight, bias, geometry, record)  # type: ignore[no-untyped-call]
    return found


def _record_weight(tape: Tape, weight: Tensor, geometry: Geometry, inputs: Tensor, grad: Tensor) -> None:
    """Record the weight's gradients, in the form that is cheapest for these sizes."""
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
        record: Callable[..., None],
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry, ctx.record = geometry, record
        about = geometry.stride, geometry.padding, geometry.dilation, True, output_padding, geometry.groups
        found: Tensor = torch.ops.aten.convolution(inputs, weight, bias, *about)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        by_inputs = ctx.geometry.convolve(grad, weight, None) if ctx.needs_input_grad[0] else None
        if len(grad):
            ctx.record(inputs, grad)
        return by_inputs, None, None, None, None, None


def transposed(module: Transposed, tape: Tape, inputs: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""
    inputs, weight, bias = in_autocast(module, inputs)
    sizes = tuple(module.kernel_size), tuple(module.stride), tuple(map(int, module.padding)), tuple(module.dilation)
    geometry = Geometry(*sizes, module.groups)
    extra = tuple(module.output_padding)
    if output_size is not None:
        kernel, stride, padding, dilation = map(list, sizes)
        extra = tuple(module._output_padding(inputs, list(output_size), stride, padding, kernel, len(kernel), dilation))

    def record(inputs: Tensor, grad: Tensor) -> None:
        if module.bias is not None:
            tape.record_gradients(module.bias, grad.flatten(2).sum(2))
        _record_weight(tape, module.weight, geometry, grad, inputs)

    found: Tensor = _Transposed.apply(inputs, weight, bias, geometry, extra, record)  # type: ignore[no-untyped-call]
    return found


def _refusal(module: Transposed) -> str:
    if any(more >= stride for more, stride in zip(module.output_padding, module.stride, strict=True)):
        return "pads its output by its stride or more; take a smaller output_padding"
    return ""


def convolutions(kind: type[Convolution], *pixels: int) -> Callable[[], Iterator[Example]]:
    """Examples small and large, of one dimension, strided, dilated, padded, in groups."""

    def examples() -> Iterator[Example]:
        yield Example(kind(3, 4, 3), random(3, *pixels))
        yield Example(kind(3, 4, 3, stride=2, padding=1, bias=False), random(3, *pixels), "strided, no bias")
        yield Example(kind(2, 6, 2, dilation=2, groups=2), random(2, *pixels), "dilated, groups")
        yield Example(kind(2, 3, 3, padding="same", padding_mode="circular"), random(2, *pixels), "circular")
        yield Example(kind(16, 24, 3, padding=1), random(16, *pixels), "large")
        yield Example(kind(8, 8, 1), random(8, *pixels), "one by one")

    return examples


def transposeds(kind: type[Transposed], *pixels: int) -> Callable[[], Iterator[Example]]:
    """Examples small and large, of one dimension, strided, padded, in groups."""

    def examples() -> Iterator[Example]:
        yield Example(kind(3, 4, 3), random(3, *pixels))
        yield Example(kind(4, 2, 2, stride=2, bias=False), random(4, *pixels), "strided, no bias")
        yield Example(kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), random(4, *pixels), "groups")
        yield Example(kind(16, 12, 3, stride=2, padding=1), random(16, *pixels), "large")

    return examples


LAYERS = [
    Layer(nn.Conv1d, convolution, convolutions(nn.Conv1d, 11)),
    Layer(nn.Conv2d, convolution, convolutions(nn.Conv2d, 7, 6)),
    Layer(nn.Conv3d, convolution, convolutions(nn.Conv3d, 5, 4, 6)),
    Layer(nn.ConvTranspose1d, transposed, transposeds(nn.ConvTranspose1d, 7), _refusal),
    Layer(nn.ConvTranspose2d, transposed, transposeds(nn.ConvTranspose2d, 4, 5), _refusal),
    Layer(nn.ConvTranspose3d, transposed, transposeds(nn.ConvTranspose3d, 3, 4, 2), _refusal),
]
