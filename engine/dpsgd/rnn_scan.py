"""One direction of one simple recurrent layer (Elman 1990), forward and backward through time; see ``scan``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpsgd.scan import Order, begin, gradients_at_states, product, project, through_tanh, without_autocast
from dpsgd.tape import Tape


def _forward(
    ctx: Any,
    activate: Callable[[Tensor, Tensor], None],
    series: Tensor,
    h_0: Tensor,
    parameters: tuple[Tensor | None, ...],
    tape: Tape,
    order: Order,
) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, b_ih, b_hh = parameters
    assert w_ih is not None and w_hh is not None  # noqa: S101  (biases alone may be missing)
    (length, batch, width), hidden = series.shape, w_hh.shape[1]
    joined = series.new_empty(length + 1, batch, 1 + width + hidden)
    states = joined[..., 1 + width :]
    begin(states, h_0, order)
    sums = series.new_empty(length, batch, hidden)
    bias = None if b_ih is None or b_hh is None else b_ih + b_hh
    project(series, w_ih, bias, order.before(joined)[..., : 1 + width], sums)
    recurrent = w_hh.t().contiguous()
    for total, h, h_after in order.steps(sums, order.before(states), order.after(states)):
        activate(total.addmm_(h, recurrent), h_after)
    ctx.parameters, ctx.tape, ctx.order = parameters, tape, order
    ctx.save_for_backward(joined, w_ih, w_hh)  # the weights only to see that they are the same
    found = order.after(states)
    return found, found[order.last()].clone()


def _backward(
    ctx: Any, into: Callable[[Tensor, Tensor, Tensor], Any], at_states: Tensor, at_h: Tensor
) -> tuple[Tensor | None, ...]:
    (joined, _, _), (w_ih, w_hh, b_ih, b_hh), order = ctx.saved_tensors, ctx.parameters, ctx.order
    width = w_ih.shape[1]
    slots, after = gradients_at_states(at_states, at_h, order), order.after(joined[..., 1 + width :])
    deltas = at_states.new_empty(at_states.shape)
    for delta, h, dh, dh_before in order.steps_back(
        slice(None), deltas, after, order.after(slots), order.before(slots)
    ):
        into(dh, h, delta)
        dh_before.addmm_(delta, w_hh)
    deltas = order.silenced(deltas)
    inputs = order.by_sample(order.before(joined)[..., 1:])
    ctx.tape.record_outer_product((w_ih, w_hh), inputs, order.by_sample(deltas))
    if b_ih is not None and b_hh is not None:
        by_bias = order.of_samples(deltas.sum(dim=0), 0)
        ctx.tape.record_gradients(b_ih, by_bias)
        ctx.tape.record_gradients(b_hh, by_bias)
    at_series = product(deltas, w_ih) if ctx.needs_input_grad[0] else None
    return at_series, order.before(slots)[order.first()], None, None, None, None, None, None


class TanhScan(torch.autograd.Function):
    """h = tanh(W_ih x + W_hh h' + b)."""

    STATES = 1

    @staticmethod
    def forward(ctx: Any, series: Tensor, h_0: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        """Series ``[T, B, d]`` and state ``[B, H]`` to states ``[T, B, H]`` and the last state."""
        return _forward(ctx, lambda x, out: torch.tanh(x, out=out), series, h_0, given[:4], *given[4:])  # type: ignore[arg-type]

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, at_states: Tensor, at_h: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the series and the initial state; the parameters' go to the tape."""
        return _backward(ctx, through_tanh, at_states, at_h)


class ReluScan(torch.autograd.Function):
    """h = max(W_ih x + W_hh h' + b, 0)."""

    STATES = 1

    @staticmethod
    def forward(ctx: Any, series: Tensor, h_0: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        """Pass as ``TanhScan`` has it."""
        return _forward(ctx, lambda x, out: torch.clamp(x, min=0.0, out=out), series, h_0, given[:4], *given[4:])  # type: ignore[arg-type]

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, at_states: Tensor, at_h: Tensor) -> tuple[Tensor | None, ...]:
        """Pass as ``TanhScan`` has it."""
        return _backward(ctx, lambda dh, h, out: torch.mul(dh, h > 0, out=out), at_states, at_h)
