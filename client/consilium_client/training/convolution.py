"""Convolutions on a tape: forward, the gradient of the inputs, and what the weight's per-sample gradients need.

A convolution applies its weight once at every place of its output, to the patch of its input that lies there. So its
per-sample gradients are a product of T = (number of places) patches and output gradients, as a linear layer's over T
steps; or, formed at once for a whole batch, the weight gradient of one convolution that has the batch's samples as
groups of channels (Rochette, Manoel & Tramel 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from consilium_client.training.tape import Tape

_FEW_PLACES = 96
"""Up to so many places patches are copied out and multiplied; more are left to the grouped convolution."""


@dataclass(frozen=True)
class _Geometry:
    """How a kernel moves over its input, in one, two or three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def backward(self, grad: Tensor, inputs: Tensor, weight: Tensor, groups: int, which: tuple[bool, bool]) -> Any:
        """torch's gradients of a convolution: of its inputs, of its weight."""
        none = [0] * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            grad, inputs, weight, None, self.stride, self.padding, self.dilation, False, none, groups, [*which, False]
        )[:2]

    def formed(self, inputs: Tensor, grad: Tensor) -> Tensor:
        """Per-sample gradients ``[B, O, C / groups, *kernel]`` of inputs ``[B, C, …]`` and output gradients
        ``[B, O, …]``."""
        batch, channels, outputs = len(inputs), inputs.shape[1], grad.shape[1]
        one = grad.new_zeros(()).expand(batch * outputs, channels // self.groups, *self.kernel)  # its sizes alone count
        found: Tensor = self.backward(
            grad.reshape(1, batch * outputs, *grad.shape[2:]),
            inputs.reshape(1, batch * channels, *inputs.shape[2:]),
            one,
            batch * self.groups,
            (False, True),
        )[1]
        return found.view(batch, outputs, channels // self.groups, *self.kernel)

    def patches(self, inputs: Tensor) -> Tensor:
        """What lies under the kernel at each place: ``[B, T, C · kernel]``, in one or two dimensions."""
        if set(self.kernel) == {1} and not any(self.padding):
            steps = tuple(slice(None, None, stride) for stride in self.stride)
            return inputs[(slice(None), slice(None), *steps)].flatten(2).transpose(1, 2)
        if len(self.kernel) == 1:
            flat = ((1, *self.kernel), (1, *self.dilation), (0, *self.padding), (1, *self.stride))
            return nn.functional.unfold(inputs.unsqueeze(2), *flat).transpose(1, 2)
        return nn.functional.unfold(inputs, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, leave: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry, ctx.leave = geometry, leave
        none = [0] * len(geometry.kernel)
        about = geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups
        found: Tensor = torch.ops.aten.convolution(inputs, weight, bias, *about)
        return found

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
    geometry = _Geometry(
        tuple(module.kernel_size), tuple(module.stride), padding, tuple(module.dilation), module.groups
    )

    def leave(inputs: Tensor, grad: Tensor) -> None:
        if module.bias is not None:
            tape.rows(module.bias, grad.flatten(2).sum(2))
        _leave(tape, module.weight, geometry, inputs, grad)

    found: Tensor = _Convolution.apply(inputs, weight, bias, geometry, leave)  # type: ignore[no-untyped-call]
    return found


def _leave(tape: Tape, weight: Tensor, geometry: _Geometry, inputs: Tensor, grad: Tensor) -> None:
    """The weight's entry."""
    if not weight.requires_grad:
        return
    outputs, places = grad.shape[1], grad[0, 0].numel()
    numbers = weight[0].numel()
    cut = geometry.groups == 1 and len(geometry.kernel) < 3
    deltas = grad.flatten(2).transpose(1, 2)
    if cut and not tape.forms(places, outputs, numbers):
        tape.factored((weight,), geometry.patches(inputs), deltas)
    elif cut and (places <= _FEW_PLACES or set(geometry.kernel) == {1}):
        tape.rows(weight, torch.bmm(deltas.transpose(1, 2), geometry.patches(inputs)))
    else:
        tape.rows(weight, geometry.formed(inputs, grad))


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: _Geometry,
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
        geometry, by_inputs = ctx.geometry, None
        if ctx.needs_input_grad[0]:
            none = [0] * len(geometry.kernel)
            about = geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups
            by_inputs = torch.ops.aten.convolution(grad, weight, None, *about)
        if len(grad):
            ctx.leave(inputs, grad)
        return by_inputs, None, None, None, None, None


def apply_transposed(
    module: nn.ConvTranspose2d, tape: Tape, inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``module`` of ``inputs``. It is a convolution that goes backward, so its weight's gradient is that of one whose
    inputs are its output gradients."""
    geometry = _Geometry(
        module.kernel_size, module.stride, tuple(map(int, module.padding)), tuple(module.dilation), module.groups
    )

    def leave(inputs: Tensor, grad: Tensor) -> None:
        if module.bias is not None:
            tape.rows(module.bias, grad.flatten(2).sum(2))
        _leave(tape, module.weight, geometry, grad, inputs)

    found: Tensor = _Transposed.apply(inputs, weight, bias, geometry, tuple(module.output_padding), leave)  # type: ignore[no-untyped-call]
    return found
