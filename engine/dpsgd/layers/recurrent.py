"""Recurrent layers (LSTM, GRU, RNN): one outer product over all steps for each direction of each layer.

``lstm``, ``gru`` and ``rnn`` return what calling the plain module returns, by its parameters: any layers, directions,
form of series. ``scan.py`` has one direction of one layer. Under autocast everything here stays in the
weights' own precision, and so does what is returned: a state rounded at every step is not worth the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dpsgd.layer import Example, Layer, random
from dpsgd.rnn_scan import ReluScan, TanhScan
from dpsgd.scan import GRUScan, LSTMScan, Order
from dpsgd.tape import Tape

Series = Tensor | PackedSequence
Scan = type[LSTMScan | GRUScan | TanhScan | ReluScan]


def lstm(
    module: nn.LSTM, tape: Tape, series: Series, hx: tuple[Tensor, Tensor] | None = None
) -> tuple[Series, tuple[Tensor, Tensor]]:
    """Output and states, as ``module(series, hx)`` returns them; its backward pass writes to ``tape``.

    Args:
        module: any layers and directions, with biases or without, batch first or not, dropout between layers; its
            parameters get no gradient from autograd.
        tape: for each layer and direction gets one outer product of both weights and gradients of each bias, samples in
            the order of ``series``. Steps that a packed sample does not have are zeros in ``deltas``.
        series: ``[B, T, d]`` if batch first, else ``[T, B, d]``; or without B; or packed. B may be 0, T not.
        hx: initial states and cells, each ``[layers * directions, B, H]``; None for zeros.

    Raises:
        RuntimeError: a shape that the plain module would not take either.
    """
    output, (states, cells) = _run(module, LSTMScan, tape, series, hx)
    return output, (states, cells)


def gru(module: nn.GRU, tape: Tape, series: Series, hx: Tensor | None = None) -> tuple[Series, Tensor]:
    """Output and states, as ``module(series, hx)`` returns them; its backward pass writes to ``tape``. Arguments and
    errors as of ``lstm``, but ``hx`` has no cell state, and the tape receives two outer products, because the reset
    gate is applied between the product with W_hh and the sum with that of W_ih."""
    output, (states,) = _run(module, GRUScan, tape, series, None if hx is None else (hx,))
    return output, states


def rnn(module: nn.RNN, tape: Tape, series: Series, hx: Tensor | None = None) -> tuple[Series, Tensor]:
    """Output and states, as ``module(series, hx)`` returns them; its backward pass writes to ``tape``. Arguments and
    errors as of ``lstm``, but ``hx`` is the states alone."""
    scan: Scan = ReluScan if module.nonlinearity == "relu" else TanhScan
    output, (states,) = _run(module, scan, tape, series, None if hx is None else (hx,))
    return output, states


def _run(
    module: nn.RNNBase, scan: Scan, tape: Tape, series: Series, hx: tuple[Tensor, ...] | None
) -> tuple[Series, tuple[Tensor, ...]]:
    """Run all layers and directions, on any form of series that the plain module takes."""
    counts = lengths = sort = own = None
    if isinstance(series, PackedSequence):
        sort, own, counts = series.sorted_indices, series.unsorted_indices, series.batch_sizes.tolist()
        steps, lengths = pad_packed_sequence(PackedSequence(series.data, series.batch_sizes))
    else:
        if series.dim() not in (2, 3):
            raise RuntimeError(f"a series has 2 or 3 dimensions, not {series.dim()}")
        if series.dim() == 2:
            output, found = _run(module, scan, tape, *_with_batch(module, series, hx))
            assert isinstance(output, Tensor)  # noqa: S101  (it is packed only if the series was)
            return output.squeeze(0 if module.batch_first else 1), tuple(state.squeeze(1) for state in found)
        steps = series.transpose(0, 1) if module.batch_first else series
    if steps.shape[-1] != module.input_size or not len(steps):
        raise RuntimeError(f"a series of {len(steps)} steps of {steps.shape[-1]}; the layer takes {module.input_size}")
    if torch.is_autocast_enabled(steps.device.type):
        steps = steps.to(next(module.parameters()).dtype)
    with torch.autocast(steps.device.type, enabled=False):
        initial = _initial(module, scan, steps, hx, sort)
        device_lengths = None if lengths is None else lengths.to(steps.device)
        orders = [Order(reverse, counts, device_lengths, own) for reverse in (False, True)[: 1 + module.bidirectional]]
        steps, final = _layers(module, scan, tape, steps, initial, orders, sort)
    final = tuple(orders[0].of_samples(state, 1) for state in final)
    if isinstance(series, PackedSequence) and lengths is not None:
        packed = pack_padded_sequence(steps, lengths)
        return PackedSequence(packed.data, packed.batch_sizes, sort, own), final
    return steps.transpose(0, 1) if module.batch_first else steps, final


def _with_batch(
    module: nn.RNNBase, series: Tensor, hx: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """One sample without a batch as a batch of one."""
    return series.unsqueeze(0 if module.batch_first else 1), hx and tuple(state.unsqueeze(1) for state in hx)


def _initial(
    module: nn.RNNBase,
    scan: Scan,
    steps: Tensor,
    hx: tuple[Tensor, ...] | None,
    sort: Tensor | None,
) -> tuple[Tensor, ...]:
    """Initial states, each ``[layers * directions, B, H]``, samples in the order of ``steps``."""
    shape = (module.num_layers * (1 + module.bidirectional), steps.shape[1], module.hidden_size)
    if hx is None:
        return tuple(steps.new_zeros(shape) for _ in range(scan.STATES))
    for state in hx:
        if state.shape != shape:
            raise RuntimeError(f"an initial state has the shape {tuple(state.shape)}; this layer takes {shape}")
    return tuple((s if sort is None else s.index_select(1, sort)).to(steps.dtype) for s in hx)


def _layers(
    module: nn.RNNBase,
    scan: Scan,
    tape: Tape,
    steps: Tensor,
    initial: tuple[Tensor, ...],
    orders: list[Order],
    sort: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """States ``[T, B, directions * H]`` of the highest layer; final states, each ``[layers * directions, B, H]``."""
    final: list[tuple[Tensor, ...]] = []
    for layer in range(module.num_layers):
        if layer and module.training and module.dropout > 0:
            steps = tape.dropout(steps.transpose(0, 1), module.dropout, rows=sort).transpose(0, 1)
        outputs = []
        for order in orders:
            start = tuple(state[len(final)] for state in initial)
            names = [f"{name}_l{layer}{'_reverse' * order.reverse}" for name in ("weight_ih", "weight_hh")]
            names += [name.replace("weight", "bias") for name in names]
            parameters = [getattr(module, name, None) for name in names]
            found = scan.apply(steps, *start, *parameters, tape, order)  # type: ignore[no-untyped-call]
            outputs.append(found[0])
            final.append(found[1:])
        steps = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return steps, tuple(torch.stack(states) for states in zip(*final, strict=True))


def _refusal(module: nn.LSTM) -> str:
    if module.proj_size:
        return f"projects its states (proj_size={module.proj_size}), whose gradient is not known; use proj_size=0"
    return ""


def examples(kind: Callable[..., nn.RNNBase], **named: str) -> Callable[[], Iterator[Example]]:
    """Examples of one direction and two, one layer and two, few steps and many."""

    def found() -> Iterator[Example]:
        yield Example(kind(3, 4, batch_first=True, **named), random(6, 3))
        yield Example(kind(3, 4, 2, bias=False, batch_first=True, bidirectional=True, **named), random(5, 3), "deep")
        yield Example(kind(12, 16, batch_first=True, **named), random(40, 12), "long")
        yield Example(kind(3, 4, 2, batch_first=True, dropout=0.3, **named), random(5, 3), "dropout")

    return found


LAYERS = [
    Layer(nn.LSTM, lstm, examples(nn.LSTM), _refusal),
    Layer(nn.GRU, gru, examples(nn.GRU)),
    Layer(nn.RNN, rnn, lambda: iter([*examples(nn.RNN)(), *examples(nn.RNN, nonlinearity="relu")()])),
]
