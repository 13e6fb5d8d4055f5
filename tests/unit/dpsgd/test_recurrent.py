"""LSTM and GRU with a tape: what the plain layer returns, and what every per-sample gradient is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from consilium_shared.errors import ConfigurationError
from dpsgd import registry
from dpsgd.isolation import ROWS
from dpsgd.layers.recurrent import gru, lstm, rnn
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
Layer = nn.LSTM | nn.GRU | nn.RNN


class Recorded:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.products: list[tuple[tuple[nn.Parameter, ...], Tensor, Tensor]] = []
        self.biases: list[tuple[nn.Parameter, Tensor]] = []

    def record_outer_product(self, weights: tuple[nn.Parameter, ...], inputs: Tensor, deltas: Tensor) -> None:
        self.products.append((weights, inputs.clone(), deltas.clone()))

    def record_gradients(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        self.biases.append((parameter, gradients.clone()))

    def dropout(self, inputs: Tensor, probability: float, rows: Tensor | None = None) -> Tensor:
        tape = Tape()
        tape.open(RowOwners(torch.arange(len(inputs)), torch.device("cpu")), torch.arange(len(inputs)))
        return tape.dropout(inputs, probability, rows=rows)

    def everything(self) -> list[Tensor]:
        """All that was told, samples first."""
        return [t for _, *pair in self.products for t in pair] + [gradients for _, gradients in self.biases]

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Per-sample gradients ``[B, ...]``."""
        found = dict(self.biases)
        for weights, inputs, deltas in self.products:
            whole = torch.einsum("btp,btd->bpd", deltas, inputs)
            parts = whole.split([weight.shape[1] for weight in weights], dim=2)
            found.update(zip(weights, parts, strict=True))
        return found


def run(layer: Layer, tape: Any, series: Any, hx: Any = None) -> tuple[Any, tuple[Tensor, ...]]:
    """Output and final states, with the tape or plainly (None)."""
    if tape is None:
        output, states = layer(series, hx)
    elif isinstance(layer, nn.LSTM):
        output, states = lstm(layer, tape, series, hx)
    elif isinstance(layer, nn.GRU):
        output, states = gru(layer, tape, series, hx)
    else:
        output, states = rnn(layer, tape, series, hx)
    return output, states if isinstance(states, tuple) else (states,)


def initial(layer: Layer, batch: int) -> Any:
    shape = (layer.num_layers * (1 + layer.bidirectional), batch, layer.hidden_size)
    dtype = layer.get_parameter("weight_ih_l0").dtype
    h = torch.randn(shape, dtype=dtype, requires_grad=True)
    return (h, torch.randn(shape, dtype=dtype, requires_grad=True)) if isinstance(layer, nn.LSTM) else h


def some_loss(output: Tensor, states: tuple[Tensor, ...]) -> Tensor:
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return (output * weights).sum() + sum((state.sin() ** 2).sum() for state in states)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (1, True), (3, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_final_states_are_the_plain_layers(
    kind: type[Layer],
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    given: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    layer = kind(5, 7, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, dtype=dtype)
    series = torch.randn((3, 6, 5), dtype=dtype)
    hx = initial(layer, 3 if batch_first else 6) if given else None
    (ours, our_states), (plain, states) = run(layer, Recorded(), series, hx), run(layer, None, series, hx)
    for one, other in zip((ours, *our_states), (plain, *states), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_series_comes_back_packed_as_from_the_plain_layer(kind: type[Layer], sort: bool) -> None:
    layer = kind(5, 7, 2, bidirectional=True, dtype=torch.float64)
    lengths = torch.tensor([5, 4, 4, 1] if sort else [4, 1, 5, 4])
    series = pack_padded_sequence(torch.randn(5, 4, 5, dtype=torch.float64), lengths, enforce_sorted=sort)
    (ours, our_states), (plain, states) = run(layer, Recorded(), series), run(layer, None, series)
    assert isinstance(ours, PackedSequence)
    assert torch.equal(ours.batch_sizes, plain.batch_sizes)
    assert (ours.unsorted_indices is None) == sort
    if not sort:
        assert ours.unsorted_indices is not None and plain.unsorted_indices is not None
        assert torch.equal(ours.unsorted_indices, plain.unsorted_indices)
    for one, other in zip((ours.data, *our_states), (plain.data, *states), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_series_without_a_batch_is_one_sample(kind: type[Layer], batch_first: bool) -> None:
    layer, tape = kind(5, 7, 2, batch_first=batch_first), Recorded()
    series, hx = torch.randn(6, 5), initial(layer, 1)
    hx = tuple(h[:, 0] for h in hx) if isinstance(hx, tuple) else hx[:, 0]
    (ours, our_states), (plain, states) = run(layer, tape, series, hx), run(layer, None, series, hx)
    for one, other in zip((ours, *our_states), (plain, *states), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    some_loss(ours, our_states).backward()
    assert all(len(told) == 1 for told in tape.everything())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_falls_between_the_layers_and_only_in_training(kind: type[Layer], training: bool) -> None:
    layer = kind(5, 7, 2, dropout=0.999999).train(training)
    series = torch.randn(6, 3, 5)
    output, _ = run(layer, Recorded(), series)
    layer.dropout = 0.0
    with torch.no_grad():
        layer.get_parameter("weight_ih_l1").mul_(
            0.0 if training else 1.0
        )  # what dropping all of the first layer's output is
    torch.testing.assert_close(output, run(layer, None, series)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_of_a_packed_sample_is_what_is_dropped_of_it_alone(kind: type[Layer], sort: bool) -> None:
    layer, lengths = kind(5, 7, 2, dropout=0.5), torch.tensor([5, 4, 1] if sort else [1, 5, 4])
    series, tape = torch.randn(5, 3, 5), Tape()
    outputs = []
    for samples in ([0, 1, 2], [0], [1], [2]):
        packed = pack_padded_sequence(series[:, samples], lengths[samples], enforce_sorted=sort)
        tape.open(RowOwners(torch.arange(len(samples)), torch.device("cpu")), torch.tensor(samples))
        found = pad_packed_sequence(run(layer, tape, packed)[0], total_length=5)[0]
        outputs.append(found.detach())
    # A mask has as many steps as the longest of a batch, so of a shorter series it is another: the longest is compared.
    longest = int(lengths.argmax())
    torch.testing.assert_close(outputs[0][:, longest], outputs[1 + longest][:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_gives_the_parameters_nothing_and_the_inputs_their_gradient(kind: type[Layer]) -> None:
    layer = kind(5, 7, 2, bidirectional=True, dtype=torch.float64)
    series, hx = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True), initial(layer, 3)
    leaves = [series, *(hx if isinstance(hx, tuple) else (hx,))]
    tape = Recorded()
    ours = torch.autograd.grad(some_loss(*run(layer, tape, series, hx)), leaves)
    assert all(parameter.grad is None for parameter in layer.parameters())
    plain = torch.autograd.grad(some_loss(*run(layer, None, series, hx)), [*leaves, *layer.parameters()])
    for one, other in zip(ours, plain, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    told = tape.gradients()
    for parameter, gradient in zip(layer.parameters(), plain[len(leaves) :], strict=True):
        torch.testing.assert_close(told[parameter].sum(0), gradient, rtol=0, atol=1e-12)


def test_an_lstm_tells_one_product_and_a_gru_two_for_each_layer_and_direction() -> None:
    for kind, products in ((nn.LSTM, 1), (nn.GRU, 2)):
        tape, layer = Recorded(), kind(5, 7, 2, bidirectional=True)
        run(layer, tape, torch.randn(6, 3, 5))[0].sum().backward()
        assert len(tape.products) == 4 * products
        told = [id(weight) for weights, _, _ in tape.products for weight in weights]
        assert sorted(told) == sorted(id(p) for name, p in layer.named_parameters() if name.startswith("weight"))
        assert all(inputs.shape[:2] == deltas.shape[:2] == (3, 6) for _, inputs, deltas in tape.products)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_a_packed_sample_does_not_have_adds_nothing(kind: type[Layer]) -> None:
    layer, tape, lengths = kind(5, 7, 2, bidirectional=True), Recorded(), [2, 5, 3]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1e18)  # what lies in memory beyond a sample's end overflows
    packed = pack_padded_sequence(torch.randn(5, 3, 5), torch.tensor(lengths), enforce_sorted=False)
    run(layer, tape, packed)[0].data.sum().backward()
    for _, _, deltas in tape.products:
        for sample, length in enumerate(lengths):
            assert not deltas[sample, length:].any()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_graph_is_gone_through_backward_once(kind: type[Layer]) -> None:
    layer = kind(5, 7)
    output, _ = run(layer, Recorded(), torch.randn(6, 3, 5))
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_changed_since_the_forward_pass_are_refused(kind: type[Layer]) -> None:
    layer = kind(5, 7)
    output, _ = run(layer, Recorded(), torch.randn(6, 3, 5))
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_states_and_gradients_are_those_of_float32(kind: type[Layer]) -> None:
    layer, series = kind(5, 7, 2), torch.randn(6, 3, 5).bfloat16()
    full, cast = Recorded(), Recorded()
    expected, _ = run(layer, full, series.float())
    expected.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = run(layer, cast, series)
        found.sum().backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(*pair) for pair in zip(cast.everything(), full.everything(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_layer_tells_the_same_once(kind: type[Layer]) -> None:
    layer, series = kind(5, 7), torch.randn(6, 3, 5, requires_grad=True)
    plain, recomputed = Recorded(), Recorded()
    run(layer, plain, series)[0].sum().backward()
    output = checkpoint(lambda given: run(layer, recomputed, given)[0], series, use_reentrant=False)
    output.sum().backward()
    assert all(torch.equal(*pair) for pair in zip(recomputed.everything(), plain.everything(), strict=True))


def test_projections_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="proj_size=3"):
        registry.check(nn.LSTM(5, 7, proj_size=3))


@pytest.mark.parametrize("shape", [(0, 3, 5), (6, 3, 4), (6, 3, 5, 1), (5,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_series_that_the_plain_layer_refuses_is_refused(kind: type[Layer], shape: tuple[int, ...]) -> None:
    for tape in (None, Recorded()):
        with pytest.raises((RuntimeError, ValueError)):
            run(kind(5, 7), tape, torch.randn(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_initial_states_of_another_shape_are_refused(kind: type[Layer]) -> None:
    layer = kind(5, 7)
    for tape in (None, Recorded()):
        with pytest.raises(RuntimeError):
            run(layer, tape, torch.randn(6, 3, 5), initial(layer, 2))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("steps", [1, 7, 48])
@pytest.mark.parametrize("hidden", [13, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_a_row_depends_on_neither_its_place_nor_its_neighbours(
    kind: type[Layer], hidden: int, steps: int, one_thread: None
) -> None:
    layer = kind(9, hidden, 2, batch_first=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)

    def told(series: Tensor) -> list[Tensor]:
        tape = Recorded()
        output, _ = run(layer, tape, series)
        (output[:, -1] + output.mean(1)).sum().backward()
        return [output.detach(), *tape.everything()]

    series, kept = torch.randn(ROWS, steps, 9), ROWS // 2
    before = told(series)
    for _ in range(3):
        order = torch.randperm(ROWS)
        other = series[order]
        other[kept:] = torch.randn(ROWS - kept, steps, 9) * 1e3
        other[-1] = torch.nan
        after = told(other)
        assert all(torch.equal(one[order[:kept]], two[:kept]) for one, two in zip(before, after, strict=True))
