"""Layer and root-mean-square normalisation: a sample's gradient at the weight is Σ_t δ_t · x̂_t over its places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer, random, uneven
from dpsgd.tape import Tape


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: list[int],
        eps: float,
        record: Callable[..., None],
    ) -> Tensor:
        found, mean, rstd = torch.native_layer_norm(inputs, shape, weight, bias, eps)
        ctx.save_for_backward(inputs, weight, mean, rstd)
        ctx.bias, ctx.shape, ctx.record = bias, shape, record
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, rstd = ctx.saved_tensors
        rows = (len(inputs), -1, *ctx.shape)
        if len(grad):
            ctx.record(((inputs - mean) * rstd).mul_(grad).reshape(rows).sum(1), grad.reshape(rows).sum(1))
        by_inputs = None
        if ctx.needs_input_grad[0]:
            by_inputs = torch.ops.aten.native_layer_norm_backward(
                grad, inputs, ctx.shape, mean, rstd, weight, ctx.bias, [True, False, False]
            )[0]
        return by_inputs, None, None, None, None, None


def layer_norm(module: nn.LayerNorm, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""

    def record(by_weight: Tensor, by_bias: Tensor) -> None:
        tape.record_gradients(module.weight, by_weight)
        if module.bias is not None:
            tape.record_gradients(module.bias, by_bias)

    if not len(inputs):
        return inputs.clone()
    inputs = inputs.to(module.weight.dtype)
    found: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, list(module.normalized_shape), module.eps, record
    )
    return found


class _Scaled(torch.autograd.Function):
    """Normalised inputs times a weight."""

    @staticmethod
    def forward(ctx: Any, normalised: Tensor, weight: Tensor, record: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(normalised, weight)
        ctx.record = record
        return normalised * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, weight = ctx.saved_tensors
        if len(grad):
            ctx.record((normalised * grad).reshape(len(grad), -1, *weight.shape).sum(1))
        return (grad * weight if ctx.needs_input_grad[0] else None), None, None


def rms_norm(module: nn.RMSNorm, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""
    inputs = inputs.to(module.weight.dtype)
    normalised = nn.functional.rms_norm(inputs, module.normalized_shape, None, module.eps)
    record = lambda by_weight: tape.record_gradients(module.weight, by_weight)  # noqa: E731
    found: Tensor = _Scaled.apply(normalised, module.weight, record)  # type: ignore[no-untyped-call]
    return found


def layer_norms() -> Iterator[Example]:
    """Examples over one dimension and several, with and without a bias."""
    yield Example(uneven(nn.LayerNorm(6)), random(5, 6))
    yield Example(uneven(nn.LayerNorm((4, 5), bias=False)), random(3, 4, 5), "two dimensions, no bias")


def rms_norms() -> Iterator[Example]:
    """Examples over one dimension and several."""
    yield Example(uneven(nn.RMSNorm(6)), random(5, 6))
    yield Example(uneven(nn.RMSNorm((4, 5), eps=1e-3)), random(3, 4, 5), "two dimensions")


LAYERS = [Layer(nn.LayerNorm, layer_norm, layer_norms), Layer(nn.RMSNorm, rms_norm, rms_norms)]
