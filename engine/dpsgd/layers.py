"""Layers that leave on a tape what their weights' per-sample gradients need, and pass only the gradient of their inputs
on.

A model stays as it is: ``attach`` gives each of its leaf modules with weights another ``forward``, which runs the same
arithmetic inside an autograd function that knows the tape. No gradient of a weight is ever computed by autograd, so
every ``.grad`` stays None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from consilium_shared.errors import ConfigurationError
from dpsgd import convolution, recurrent
from dpsgd.tape import Tape

Forward = Callable[..., Any]


def attach(model: nn.Module, tape: Tape) -> None:
    """Let every layer of ``model`` with trainable weights leave its entries on ``tape`` in each backward pass.

    Without gradients (``torch.no_grad``) the model computes as before.

    Raises:
        ConfigurationError: a layer whose per-sample gradients are not known; it is named, and what to use instead.
    """
    check(model)
    for module in model.modules():
        layer = _LAYERS.get(type(module))
        if layer is not None and any(True for _ in module.parameters(recurse=False)):
            module.forward = partial(_recorded, partial(layer, module, tape), type(module).forward, module)


def detach(model: nn.Module) -> None:
    """Undo ``attach``."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


def check(model: nn.Module) -> None:
    """Raises ConfigurationError for a layer that cannot be trained with privacy."""
    for name, module in model.named_modules():
        _check_layer(name, module)


def _check_layer(name: str, module: nn.Module) -> None:
    """Raises ConfigurationError for a module that mixes samples, or has weights and no known per-sample gradient."""
    where = f"layer {name or 'of the model'} ({type(module).__name__})"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ConfigurationError(f"{where} mixes the samples of a batch; use nn.GroupNorm instead")
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        raise ConfigurationError(
            f"{where} changes by which words occur; leave out max_norm, scale_grad_by_freq, sparse"
        )
    if type(module) in _LAYERS and not isinstance(getattr(module, "weight", None), nn.Parameter | None):
        raise ConfigurationError(f"{where} makes its weight from others; use a plain weight")
    if isinstance(module, nn.ConvTranspose2d) and any(
        more >= stride for more, stride in zip(module.output_padding, module.stride, strict=True)
    ):
        raise ConfigurationError(f"{where} pads its output by its stride or more; take a smaller output_padding")
    if list(module.buffers(recurse=False)):
        raise ConfigurationError(f"{where} keeps statistics over samples; it cannot be trained with privacy")
    if any(True for _ in module.parameters(recurse=False)) and type(module) not in _LAYERS:
        known = ", ".join(sorted(layer.__name__ for layer in _LAYERS))
        raise ConfigurationError(f"{where} has no known per-sample gradient; use one of {known}")


def _recorded(recording: Forward, plain: Forward, module: nn.Module, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(module, *inputs, **named)
    return recording(*inputs, **named)


def _cast(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inputs, weight and bias in the precision that autocast asks for."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not torch.is_autocast_enabled(inputs.device.type):
        return inputs, weight, bias
    low = torch.get_autocast_dtype(inputs.device.type)
    return inputs.to(low), None if weight is None else weight.to(low), None if bias is None else bias.to(low)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, leave: Forward) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.leave = leave
        return nn.functional.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        if len(grad):
            ctx.leave(inputs, grad)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None


def _linear(module: nn.Linear, tape: Tape, inputs: Tensor) -> Tensor:
    def leave(inputs: Tensor, grad: Tensor) -> None:
        inputs, grad = (each.reshape(len(each), -1, each.shape[-1]) for each in (inputs, grad))
        tape.record_outer_product((module.weight,), inputs, grad)
        if module.bias is not None:
            tape.record_gradients(module.bias, grad.sum(1))

    inputs, weight, bias = _cast(module, inputs)
    found: Tensor = _Linear.apply(inputs, weight, bias, leave)  # type: ignore[no-untyped-call]
    return found


class _GroupNorm(torch.autograd.Function):
    """torch's kernel for the gradient of the affine weights adds over the batch. With the batch's channels as channels
    of one sample it has nothing to add over, and gives each sample's."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, leave: Forward
    ) -> Tensor:
        inputs = inputs.contiguous()
        batch, channels = inputs.shape[:2]
        found, mean, rstd = torch.native_group_norm(
            inputs, weight, bias, batch, channels, inputs[0, 0].numel(), groups, eps
        )
        ctx.save_for_backward(inputs, weight, mean, rstd)
        ctx.groups, ctx.leave = groups, leave
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
            ctx.leave(by_weight.view(batch, channels), by_bias.view(batch, channels))
        return (by_inputs.view_as(inputs) if ctx.needs_input_grad[0] else None), None, None, None, None, None


def _group_norm(module: nn.GroupNorm, tape: Tape, inputs: Tensor) -> Tensor:
    if not len(inputs):
        return inputs.clone()

    def leave(by_weight: Tensor, by_bias: Tensor) -> None:
        tape.record_gradients(module.weight, by_weight)
        tape.record_gradients(module.bias, by_bias)

    inputs = inputs.to(module.weight.dtype)  # as autocast does with a normalisation
    found: Tensor = _GroupNorm.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, module.num_groups, module.eps, leave
    )
    return found


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, shape: list[int], eps: float, leave: Forward
    ) -> Tensor:
        found, mean, rstd = torch.native_layer_norm(inputs, shape, weight, bias, eps)
        ctx.save_for_backward(inputs, weight, mean, rstd)
        ctx.bias, ctx.shape, ctx.leave = bias, shape, leave
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, rstd = ctx.saved_tensors
        rows = (len(inputs), -1, *ctx.shape)
        if len(grad):
            ctx.leave(((inputs - mean) * rstd).mul_(grad).reshape(rows).sum(1), grad.reshape(rows).sum(1))
        by_inputs = None
        if ctx.needs_input_grad[0]:
            by_inputs = torch.ops.aten.native_layer_norm_backward(
                grad, inputs, ctx.shape, mean, rstd, weight, ctx.bias, [True, False, False]
            )[0]
        return by_inputs, None, None, None, None, None


def _layer_norm(module: nn.LayerNorm, tape: Tape, inputs: Tensor) -> Tensor:
    def leave(by_weight: Tensor, by_bias: Tensor) -> None:
        tape.record_gradients(module.weight, by_weight)
        if module.bias is not None:
            tape.record_gradients(module.bias, by_bias)

    if not len(inputs):
        return inputs.clone()
    inputs = inputs.to(module.weight.dtype)
    found: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, list(module.normalized_shape), module.eps, leave
    )
    return found


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, places: Tensor, leave: Forward) -> Tensor:
        ctx.save_for_backward(places)
        ctx.leave = leave
        return nn.functional.embedding(places, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        if len(grad):
            ctx.leave(places, grad)
        return None, None, None


def _embedding(module: nn.Embedding, tape: Tape, places: Tensor) -> Tensor:
    def leave(places: Tensor, grad: Tensor) -> None:
        rows = len(places)
        tape.record_sparse(
            module.weight, places.reshape(rows, -1), grad.reshape(rows, -1, grad.shape[-1]), module.padding_idx
        )

    found: Tensor = _Embedding.apply(module.weight, places, leave)  # type: ignore[no-untyped-call]
    return found


def _convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, tape: Tape, inputs: Tensor) -> Tensor:
    inputs, weight, bias = _cast(module, inputs)
    assert weight is not None  # noqa: S101  (a convolution has one)
    return convolution.apply(module, tape, inputs, weight, bias)


def _transposed(module: nn.ConvTranspose2d, tape: Tape, inputs: Tensor) -> Tensor:
    inputs, weight, bias = _cast(module, inputs)
    assert weight is not None  # noqa: S101
    return convolution.apply_transposed(module, tape, inputs, weight, bias)


_LAYERS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose2d: _transposed,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.LSTM: recurrent.lstm,
    nn.GRU: recurrent.gru,
}
