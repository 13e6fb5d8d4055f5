"""One direction of one recurrent layer, forward and backward through time.

The backward pass gives autograd the gradient of the series and of the initial states alone, and tells a tape what the
parameters' per-sample gradients are made of: no product is formed for a weight, and their ``.grad`` stays as it was.

Why it is fast: the series' part of all gates is one product over all steps. A step is one product and a few passes over
memory that is there already, in time-major order. What of the gates' derivatives does not wait for a later step is
computed for many steps at once, into the memory that then takes the gates' gradients: a GRU's or LSTM's own gates. So
no graph can be gone through backward twice; torch refuses it.

What is computed of a sample depends on the others' number and places no more than a product's rows do (``isolation``);
of a packed series, on the others' lengths too, for they shape the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpsgd.tape import Tape

_ROWS_IN_CACHE = 1024
"""Samples times steps: with 128 hidden units some 4 MiB."""

Row = int | tuple[Tensor, Tensor]
"""An index of ``[T, B, ...]`` that gives ``[B, ...]``: one step, or each sample's own."""


@dataclass(frozen=True)
class Order:
    """The order of a direction's steps, and which samples take part in each.

    Packed samples are sorted, the longest first: those that have a step are the first ``counts[t]``. The others' rows
    are in memory, hold nothing of meaning, and are skipped.

    Attributes:
        reverse: from the last step to the first.
        counts: for each step, of how many samples it is; None: of all.
        lengths: int64 ``[B]``, of packed samples.
        own: for each packed sample of the series as given, its row here.
    """

    reverse: bool
    counts: list[int] | None = None
    lengths: Tensor | None = None
    own: Tensor | None = None

    def before(self, slots: Tensor) -> Tensor:
        """Part ``[T, B, ...]`` of ``[T + 1, B, ...]`` that holds what each step starts from."""
        return slots[1:] if self.reverse else slots[:-1]

    def after(self, slots: Tensor) -> Tensor:
        """Part ``[T, B, ...]`` of ``[T + 1, B, ...]`` that holds what each step ends with."""
        return slots[:-1] if self.reverse else slots[1:]

    def first(self) -> Row:
        """Row where ``before`` holds the initial states."""
        return self._longest() if self.reverse else 0

    def last(self) -> Row:
        """Row where ``after`` holds the final states."""
        return 0 if self.reverse else self._longest()

    def _longest(self) -> Row:
        if self.lengths is None:
            return -1
        return self.lengths - 1, torch.arange(len(self.lengths), device=self.lengths.device)

    def steps(self, *buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views ``[samples of the step, ...]`` of buffers ``[T, B, ...]``, step by step in this order."""
        views = [self._views(buffer, slice(None)) for buffer in buffers]
        return zip(*(reversed(each) if self.reverse else each for each in views), strict=True)

    def steps_back(self, part: slice, *buffers: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """``steps`` of buffers that hold some of the steps, the last one first."""
        views = [self._views(buffer, part) for buffer in buffers]
        return zip(*(each if self.reverse else reversed(each) for each in views), strict=True)

    def _views(self, buffer: Tensor, part: slice) -> list[Tensor]:
        views = list(buffer.unbind(0))
        return views if self.counts is None else [v[:n] for v, n in zip(views, self.counts[part], strict=True)]

    def parts_back(self, steps: int, most: int) -> list[slice]:
        """All ``steps`` in parts of at most ``most``, the last part first."""
        parts = [slice(start, min(start + most, steps)) for start in range(0, steps, most)]
        return parts if self.reverse else parts[::-1]

    def silenced(self, buffer: Tensor) -> Tensor:
        """``[T, B, ...]`` with zeros, from now on, in the steps that samples do not have."""
        for step, count in zip(buffer, self.counts or (), strict=False):
            step[count:].zero_()
        return buffer

    def of_samples(self, found: Tensor, dim: int) -> Tensor:
        """Samples along ``dim`` in the order in which the series was given."""
        return found if self.own is None else found.index_select(dim, self.own)

    def by_sample(self, found: Tensor) -> Tensor:
        """``[T, B, ...]`` as ``[B, T, ...]``, samples in the order in which the series was given."""
        return self.of_samples(found, 1).transpose(0, 1)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass, and what it tells the tape, in the gradients' own precision wherever it is called from."""

    @wraps(backward)
    def inside(ctx: Any, *gradients: Tensor) -> Any:
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return inside


class LSTMScan(torch.autograd.Function):
    """i, f, o = σ(·), g = tanh(·) of W_ih x + W_hh h' + b;  c = f c' + i g;  h = o tanh(c). Gates in the order i, f, g,
    o (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, as torch has it)."""

    STATES = 2

    @staticmethod
    def forward(
        ctx: Any,
        series: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        tape: Tape,
        order: Order,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Series ``[T, B, d]`` and states ``[B, H]`` to states ``[T, B, H]``, the last state, the last cell."""
        (length, batch, width), hidden = series.shape, w_hh.shape[1]
        # A step's input and the state it starts from stand side by side: so the tape takes them, in one product.
        joined = series.new_empty(length + 1, batch, 1 + width + hidden)
        cells = series.new_empty(length + 1, batch, hidden)
        states = joined[..., 1 + width :]
        begin(states, h_0, order)
        begin(cells, c_0, order)
        gates = series.new_empty(length, batch, 4 * hidden)
        bias = None if b_ih is None or b_hh is None else b_ih + b_hh
        project(series, w_ih, bias, order.before(joined)[..., : 1 + width], gates)
        recurrent = w_hh.t().contiguous()
        for gate, i_f, i, f, g, o, h, c, h_after, c_after in order.steps(
            gates,
            gates[..., : 2 * hidden],
            *gates.chunk(4, dim=2),
            order.before(states),
            order.before(cells),
            order.after(states),
            order.after(cells),
        ):
            gate.addmm_(h, recurrent)
            i_f.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, c, out=c_after).addcmul_(i, g)
            torch.tanh(c_after, out=h_after).mul_(o)
        ctx.parameters, ctx.tape, ctx.order = (w_ih, w_hh, b_ih, b_hh), tape, order
        ctx.save_for_backward(joined, cells, gates, w_ih, w_hh)  # the weights only to see that they are the same
        last, found = order.last(), order.after(states)
        return found, found[last].clone(), order.after(cells)[last].clone()

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, at_states: Tensor, at_h: Tensor, at_c: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the series and the initial states; the parameters' go to the tape."""
        joined, cells, gates, _, _ = ctx.saved_tensors
        (w_ih, w_hh, b_ih, b_hh), order = ctx.parameters, ctx.order
        (steps, batch, _), hidden = gates.shape, w_hh.shape[1]
        before, after = order.before(cells), order.after(cells)
        slots, at_cell = gradients_at_states(at_states, at_h, order), at_c.clone()
        most = _steps_at_once(gates)
        spare = gates.new_empty(4, most, batch, hidden)
        for part in order.parts_back(steps, most):
            deltas, (squashed, into_c, into_g, keep) = gates[part], spare[:, : part.stop - part.start]
            i, f, g, o = deltas.chunk(4, dim=2)
            keep.copy_(f)
            torch.tanh(after[part], out=squashed)
            through_tanh(o, squashed, into_c)
            _through_sigmoid(squashed, o, o)  # from here on gates hold what gradients at c or h are multiplied with
            through_tanh(i, g, into_g)
            _through_sigmoid(g, i, i)
            _through_sigmoid(before[part], f, f)
            g.copy_(into_g)
            i_f_g = deltas.unflatten(2, (4, hidden))[:, :, :3]
            dc_rows = at_cell.expand_as(keep)
            for delta, d_i_f_g, d_o, kept, squash, dh, dh_before, dc in order.steps_back(
                part, deltas, i_f_g, o, keep, into_c, order.after(slots)[part], order.before(slots)[part], dc_rows
            ):
                dc.addcmul_(dh, squash)
                d_i_f_g.mul_(dc.unsqueeze(1))
                d_o.mul_(dh)
                dc.mul_(kept)
                dh_before.addmm_(delta, w_hh)
        deltas = order.silenced(gates)
        ctx.tape.record_outer_product(
            (w_ih, w_hh), order.by_sample(order.before(joined)[..., 1:]), order.by_sample(deltas)
        )
        if b_ih is not None and b_hh is not None:
            by_bias = order.of_samples(deltas.sum(dim=0), 0)
            ctx.tape.record_gradients(b_ih, by_bias)
            ctx.tape.record_gradients(b_hh, by_bias)
        at_series = product(deltas, w_ih) if ctx.needs_input_grad[0] else None
        return at_series, order.before(slots)[order.first()], at_cell, None, None, None, None, None, None


class GRUScan(torch.autograd.Function):
    """r, z = σ(W_ih x + W_hh h' + b);  n = tanh(W_in x + b_in + r (W_hn h' + b_hn));  h = (1 - z) n + z h' (Cho et al.
    2014, with the reset gate after the product as cuDNN and torch have it). Gates in the order r, z, n."""

    STATES = 1

    @staticmethod
    def forward(
        ctx: Any,
        series: Tensor,
        h_0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        tape: Tape,
        order: Order,
    ) -> tuple[Tensor, Tensor]:
        """Series ``[T, B, d]`` and states ``[B, H]`` to states ``[T, B, H]`` and the last state."""
        (length, batch, width), hidden = series.shape, w_hh.shape[1]
        states = series.new_empty(length + 1, batch, hidden)
        begin(states, h_0, order)
        # [m, r, z, n] with m = W_hn h' + b_hn: series give the last three, states the first three, each in one product.
        gates = series.new_empty(length, batch, 4 * hidden)
        bias = None
        if b_ih is not None and b_hh is not None:
            bias = torch.cat([b_ih[: 2 * hidden] + b_hh[: 2 * hidden], b_ih[2 * hidden :]])
        given = series.new_empty(length, batch, 1 + width)
        project(series, w_ih, bias, given, gates[..., hidden:])
        gates[..., :hidden] = 0.0 if b_hh is None else b_hh[2 * hidden :]
        recurrent = torch.cat([w_hh[2 * hidden :], w_hh[: 2 * hidden]]).t().contiguous()
        for m_r_z, r_z, m, r, z, n, h, h_after in order.steps(
            gates[..., : 3 * hidden],
            gates[..., hidden : 3 * hidden],
            *gates.chunk(4, dim=2),
            order.before(states),
            order.after(states),
        ):
            m_r_z.addmm_(h, recurrent)
            r_z.sigmoid_()
            n.addcmul_(r, m).tanh_()
            torch.lerp(n, h, z, out=h_after)
        ctx.parameters, ctx.tape, ctx.order = (w_ih, w_hh, b_ih, b_hh), tape, order
        ctx.save_for_backward(given, states, gates, w_ih, w_hh)  # the weights only to see that they are the same
        found = order.after(states)
        return found, found[order.last()].clone()

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, at_states: Tensor, at_h: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the series and the initial state; the parameters' go to the tape."""
        given, states, gates, _, _ = ctx.saved_tensors
        (w_ih, w_hh, b_ih, b_hh), order = ctx.parameters, ctx.order
        (steps, batch, _), hidden = gates.shape, w_hh.shape[1]
        before, one = order.before(states), gates.new_ones(())
        slots = gradients_at_states(at_states, at_h, order)
        deltas = gates.new_empty(steps, batch, 3 * hidden)  # at what W_hh gives, in its order r, z, n
        most = _steps_at_once(gates)
        spare = gates.new_empty(most, batch, hidden)
        for part in order.parts_back(steps, most):
            (m, r, z, n), into_n = gates[part].chunk(4, dim=2), spare[: part.stop - part.start]
            d_r, d_z, d_m = deltas[part].chunk(3, dim=2)  # first what gradients at h are multiplied with
            through_tanh(torch.sub(one, z, out=into_n), n, into_n)
            _through_sigmoid(torch.mul(into_n, m, out=d_r), r, d_r)
            _through_sigmoid(torch.sub(before[part], n, out=d_z), z, d_z)
            torch.mul(into_n, r, out=d_m)
            d_r_z_m = deltas[part].unflatten(2, (3, hidden))
            for delta, by_gate, keep, dh, dh_before in order.steps_back(
                part, deltas[part], d_r_z_m, z, order.after(slots)[part], order.before(slots)[part]
            ):
                by_gate.mul_(dh.unsqueeze(1))
                dh_before.addcmul_(dh, keep)
                dh_before.addmm_(delta, w_hh)
            gates[part, :, hidden : 3 * hidden] = deltas[part, :, : 2 * hidden]
            torch.mul(into_n, order.after(slots)[part], out=n)
        at_inputs, deltas = order.silenced(gates[..., hidden:]), order.silenced(deltas)
        ctx.tape.record_outer_product((w_ih,), order.by_sample(given[..., 1:]), order.by_sample(at_inputs))
        ctx.tape.record_outer_product((w_hh,), order.by_sample(before), order.by_sample(deltas))
        if b_ih is not None and b_hh is not None:
            by_inputs, by_m = at_inputs.sum(dim=0), deltas[..., 2 * hidden :].sum(dim=0)
            ctx.tape.record_gradients(b_ih, order.of_samples(by_inputs, 0))
            ctx.tape.record_gradients(b_hh, order.of_samples(torch.cat([by_inputs[:, : 2 * hidden], by_m], dim=1), 0))
        at_series = product(at_inputs, w_ih) if ctx.needs_input_grad[0] else None
        return at_series, order.before(slots)[order.first()], None, None, None, None, None, None


def begin(slots: Tensor, initial: Tensor, order: Order) -> None:
    """Put what the first steps start from into ``[T + 1, B, ...]``."""
    if order.counts is None:
        order.before(slots)[order.first()] = initial
    else:  # everywhere: steps that a sample does not have are then finite, and its first is wherever it is
        slots.copy_(initial)


def project(series: Tensor, weight: Tensor, bias: Tensor | None, given: Tensor, out: Tensor) -> None:
    """``series @ weight.T + bias`` of all steps in one product, into ``out``: ``[T, B, ...]``, rows evenly spaced.

    ``given`` ``[T, B, 1 + d]`` takes ones and the series: so the bias is one more column of the weight, and is not
    written to every row first.
    """
    given[..., 0] = 1.0
    given[..., 1:] = series
    wide = torch.cat([weight.new_zeros(len(weight)).unsqueeze(1) if bias is None else bias.unsqueeze(1), weight], dim=1)
    count = out.shape[0] * out.shape[1]
    torch.mm(given.view(count, given.shape[2]), wide.t(), out=out.view(count, out.shape[2]))


def product(deltas: Tensor, weight: Tensor) -> Tensor:
    """Gradients ``[T, B, d]`` of the series, of all steps in one product."""
    steps, batch, gates = deltas.shape
    return torch.mm(deltas.view(steps * batch, gates), weight).view(steps, batch, weight.shape[1])


def _through_sigmoid(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    """``gradient * output * (1 - output)``, into ``out``, which may be ``gradient``."""
    found: Tensor = torch.ops.aten.sigmoid_backward.grad_input(gradient, output, grad_input=out)
    return found


def through_tanh(gradient: Tensor, output: Tensor, out: Tensor) -> Tensor:
    """``gradient * (1 - output ** 2)``, into ``out``, which may be one of the others."""
    found: Tensor = torch.ops.aten.tanh_backward.grad_input(gradient, output, grad_input=out)
    return found


def _steps_at_once(gates: Tensor) -> int:
    """Number of time steps whose gate derivatives are precomputed together: all on a GPU (launch-bound), on a CPU as
    many as fit its cache. It depends on shapes alone and changes no result."""
    return len(gates) if gates.is_cuda else max(1, min(len(gates), _ROWS_IN_CACHE // max(1, gates.shape[1])))


def gradients_at_states(at_states: Tensor, at_last: Tensor, order: Order) -> Tensor:
    """Gradients at all states ``[T + 1, B, H]``, as far as they are known before any step back is made."""
    slots = at_states.new_empty(len(at_states) + 1, *at_states.shape[1:])
    slots[-1 if order.reverse else 0] = 0.0
    after = order.after(slots)
    after.copy_(at_states)
    after[order.last()] += at_last
    return slots
