"""Per-sample gradients of LSTM and GRU equal those of the plain layer on one sample at a time, whatever the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpsgd import scan
from dpsgd.layers.recurrent import gru, lstm


class Summed:
    """Per-sample gradients of each parameter, formed."""

    def __init__(self) -> None:
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def record_gradients(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        self.gradients[parameter] = self.gradients.get(parameter, 0) + gradients

    def record_outer_product(self, weights: tuple[nn.Parameter, ...], inputs: Tensor, deltas: Tensor) -> None:
        whole = torch.einsum("btp,btd->bpd", deltas, inputs)
        for weight, part in zip(weights, whole.split([w.shape[1] for w in weights], dim=2), strict=True):
            self.record_gradients(weight, part)


@dataclass
class Case:
    layer: nn.LSTM | nn.GRU
    series: Tensor
    lengths: list[int] | None
    initial: list[Tensor]
    weights: Tensor

    def losses(self, tape: Any, chosen: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The chosen samples' losses, one each, and the leaves that they were computed from."""
        dim = 0 if self.layer.batch_first else 1
        index = torch.tensor(chosen, dtype=torch.int64)
        series = self.series.index_select(dim, index).requires_grad_()
        states = [state.index_select(1, index).requires_grad_() for state in self.initial]
        hx: Any = None if not states else tuple(states) if isinstance(self.layer, nn.LSTM) else states[0]
        fed: Any = series
        if self.lengths is not None:
            lengths = torch.tensor([self.lengths[i] for i in chosen])
            fed = pack_padded_sequence(series, lengths, self.layer.batch_first, enforce_sorted=False)
        if tape is None:
            output, final = self.layer(fed, hx)
        elif isinstance(self.layer, nn.LSTM):
            output, final = lstm(self.layer, tape, fed, hx)
        else:
            output, final = gru(self.layer, tape, fed, hx)
        if self.lengths is not None:
            output, _ = pad_packed_sequence(output, self.layer.batch_first, total_length=len(self.weights))
        losses = ((output if self.layer.batch_first else output.transpose(0, 1)) * self.weights).sum((1, 2))
        for state in final if isinstance(final, tuple) else (final,):
            losses = losses + (state**2).sum((0, 2))
        return losses, [series, *states]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    batch, steps = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    inputs, hidden, layers = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    kind: type[nn.LSTM] | type[nn.GRU] = draw(st.sampled_from([nn.LSTM, nn.GRU]))
    double: dict[str, Any] = {"dtype": torch.float64}
    layer = kind(inputs, hidden, layers, draw(st.booleans()), draw(st.booleans()), 0.0, draw(st.booleans()), **double)
    packed = batch > 0 and draw(st.booleans())
    lengths = [draw(st.integers(1, steps)) for _ in range(batch)] if packed else None
    directions = 1 + layer.bidirectional
    count = draw(st.sampled_from([0, 2 if kind is nn.LSTM else 1]))
    return Case(
        layer,
        torch.randn((batch, steps, inputs) if layer.batch_first else (steps, batch, inputs), **double) * 2,
        lengths,
        [torch.randn((layers * directions, batch, hidden), **double) for _ in range(count)],
        torch.randn((steps, directions * hidden), **double),
    )


def close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(one - other) <= 1e-12 * (1e-3 + torch.linalg.vector_norm(other)))


def matches(case: Case) -> bool:
    """Whether all per-sample gradients and those of series and initial states are the plain layer's."""
    batch, dim = case.series.shape[0 if case.layer.batch_first else 1], 0 if case.layer.batch_first else 1
    tape = Summed()
    losses, leaves = case.losses(tape, list(range(batch)))
    ours = torch.autograd.grad(losses.sum(), leaves)
    parameters = list(case.layer.parameters())
    agree = all(tape.gradients[p].shape == (batch, *p.shape) for p in parameters)
    for i in range(batch):
        loss, alone = case.losses(None, [i])
        plain = torch.autograd.grad(loss.sum(), [*alone, *parameters])
        agree &= close(losses[i], loss[0])
        agree &= all(close(tape.gradients[p][i], g) for p, g in zip(parameters, plain[len(alone) :], strict=True))
        agree &= close(ours[0].select(dim, i), plain[0].select(dim, 0))
        agree &= all(close(a[:, i], b[:, 0]) for a, b in zip(ours[1:], plain[1 : len(alone)], strict=True))
    return agree


@given(cases(), st.sampled_from([1, 3, 1024]))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_every_samples_gradient_is_that_of_the_plain_layer_on_it_alone(case: Case, rows: int) -> None:
    """Also where the backward pass is made of several parts (``_ROWS_IN_CACHE``)."""
    usual = scan._ROWS_IN_CACHE
    scan._ROWS_IN_CACHE = rows
    try:
        assert matches(case)
    finally:
        scan._ROWS_IN_CACHE = usual


def test_a_gradient_that_is_off_by_little_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    series, weights = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    exact = scan._through_sigmoid
    for layer in (nn.LSTM(4, 5, dtype=torch.float64), nn.GRU(4, 5, dtype=torch.float64)):
        case = Case(layer, series, None, [], weights)
        assert matches(case)
        with monkeypatch.context() as planted:
            planted.setattr(scan, "_through_sigmoid", lambda *given: exact(*given).mul_(1 + 1e-9))
            assert not matches(case)
