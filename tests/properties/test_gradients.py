"""Clipped sums are Opacus's: for every layer, shape, batch and clipping norm, whichever way the tape goes.

The reference is ``opacus`` (its per-sample hooks), and plain differentiation of one sample at a time where it knows no
per-sample gradient or a wrong one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.training import KINDS, records, study, tensors
from torch import Tensor, nn

from consilium_shared.models import build
from dpsgd import engines
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

CPU = torch.device("cpu")
FORMS: dict[str, Callable[..., bool] | None] = {
    "cheaper": None,
    "formed": lambda *_: True,
    "factored": lambda *_: False,
}
Ways = st.sampled_from(list(FORMS))
BOUNDS = st.floats(1e-4, 1e4)


class LayerOf(nn.Module):
    """A layer between two others, so that gradients pass through it both ways."""

    def __init__(self, layer: nn.Module, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.layer = before or nn.Identity(), layer

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.layer(self.before(inputs))
        return torch.tanh(found[0] if isinstance(found, tuple) else found)


def clipped(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    owners: Tensor,
    bound: float,
    engine: engines.Engine,
    form: str = "cheaper",
) -> Tensor:
    """The clipped sum of a loss that weighs every output differently: flat, float64."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    wrapped = engines.wrap(model, engine)
    wrapped.tape.open(RowOwners(owners, CPU, len(inputs[0])))
    with patch.object(Tape, "materializes", FORMS[form] or Tape.materializes):
        wrapped.backward(losses(wrapped(*inputs)))
        sums: dict[Tensor, Tensor] = {p: torch.zeros(p.numel(), dtype=torch.float64) for p in parameters}
        if not wrapped.tape.empty:
            wrapped.tape.add_weighted_sum(wrapped.tape.factors(bound), sums)
    assert all(p.grad is None for p in parameters)
    return torch.cat(list(sums.values()))


def losses(outputs: Tensor) -> Tensor:
    flat = outputs.flatten(1)
    return (flat * torch.linspace(-1.0, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def one_by_one(model: nn.Module, inputs: Tensor, owners: Tensor, bound: float) -> Tensor:
    """The same by plain differentiation."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for patient in range(int(owners[-1]) + 1 if len(owners) else 0):
        own = inputs[: len(owners)][owners == patient]
        found = torch.autograd.grad(losses(model(own)).mean(), parameters, allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
        )
        total += flat * min(1.0, bound / max(float(flat.norm()), 1e-300))
    return total


def assert_equal(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert torch.linalg.vector_norm(found - expected) <= relative * torch.linalg.vector_norm(expected) + 1e-12


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dimensions = draw(st.sampled_from([1, 2, 2, 2]))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel: Any = tuple(draw(st.integers(1, 3)) for _ in range(dimensions))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding: Any = draw(st.sampled_from([0, 1, 2, "valid", "same"]))
    mode: Any = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect"]))
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
    layer = kind(
        channels,
        outputs,
        kernel,
        stride=1 if padding == "same" else stride,
        dilation=dilation,
        padding=padding,
        padding_mode=mode,
        groups=groups,
        bias=draw(st.booleans()),
    )
    return layer, torch.randn(draw(st.integers(0, 4)), channels, *(draw(st.integers(6, 9)) for _ in range(dimensions)))


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    groups = draw(st.sampled_from([1, 2]))
    channels, stride = 2 * groups, draw(st.integers(1, 3))
    extra = draw(st.integers(0, stride - 1))
    kernel = draw(st.integers(1, 3))
    layer = nn.ConvTranspose2d(
        channels, 3 * groups, kernel, stride=stride, output_padding=extra, groups=groups, bias=draw(st.booleans())
    )
    return layer, torch.randn(draw(st.integers(0, 4)), channels, 4, 5)


@st.composite
def linear(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    width, middle = draw(st.integers(1, 6)), draw(st.lists(st.integers(1, 4), max_size=2))
    layer = nn.Linear(width, draw(st.integers(1, 6)), bias=draw(st.booleans()))
    return layer, torch.randn(draw(st.integers(0, 4)), *middle, width)


@st.composite
def normalisations(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    # Of two or three numbers the variance can be so small that float32 has few digits of what is normalised.
    inputs = torch.randn(draw(st.integers(0, 4)), 4, draw(st.integers(2, 4)), draw(st.integers(5, 7)))
    if draw(st.booleans()):
        return nn.GroupNorm(draw(st.sampled_from([1, 2, 4])), 4), inputs
    last = draw(st.integers(1, 3))
    return nn.LayerNorm(inputs.shape[-last:], bias=draw(st.booleans())), inputs


@st.composite
def recurrent(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    kind, width = draw(st.sampled_from([nn.LSTM, nn.GRU])), draw(st.integers(1, 4))
    layer = kind(
        width,
        draw(st.integers(1, 4)),
        num_layers=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        batch_first=True,
        bidirectional=draw(st.booleans()),
    )
    return layer, torch.randn(draw(st.integers(1, 4)), draw(st.integers(1, 5)), width)


@st.composite
def layers(draw: st.DrawFn, *kinds: st.SearchStrategy[tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Tensor]:
    """One of a kind, and inputs for it; weights and numbers come from the seed that is drawn, in every run the same."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return draw(st.one_of(*kinds))


LAYERS = layers(convolutions(), transposed(), linear(), normalisations(), recurrent())


@given(LAYERS, BOUNDS, Ways, st.booleans())
@settings(derandomize=True, deadline=None, max_examples=250)
def test_a_layers_clipped_sum_is_that_of_its_samples_one_by_one(
    drawn: tuple[nn.Module, Tensor], bound: float, form: str, first: bool
) -> None:
    layer, inputs = drawn
    model = LayerOf(layer, None if first else nn.Linear(inputs.shape[-1], inputs.shape[-1])).double()
    inputs, owners = inputs.double(), torch.arange(len(inputs))
    expected = one_by_one(model, inputs, owners, bound)
    assert_equal(clipped(model, (inputs,), owners, bound, "book-keeping", form), expected)
    if len(inputs):
        assert_equal(clipped(model.float(), (inputs.float(),), owners, bound, "book-keeping", form), expected, 1e-4)


@given(LAYERS, BOUNDS, Ways, st.data())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_patients_rows_count_with_their_mean_and_rows_of_filling_with_nothing(
    drawn: tuple[nn.Module, Tensor], bound: float, form: str, data: st.DataObject
) -> None:
    layer, inputs = drawn
    model, inputs = LayerOf(layer).double(), inputs.double()
    numbers = data.draw(st.lists(st.integers(1, 3), max_size=len(inputs)))
    owners = torch.repeat_interleave(torch.tensor(numbers, dtype=torch.int64))[: len(inputs)]
    found = clipped(model, (inputs,), owners, bound, "book-keeping", form)
    assert_equal(found, one_by_one(model, inputs, owners, bound))


OPACUS = layers(convolutions(), linear(), normalisations(), recurrent())


@given(OPACUS, BOUNDS, Ways)
@settings(derandomize=True, deadline=None, max_examples=150)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_layers_clipped_sum_is_opacus(drawn: tuple[nn.Module, Tensor], bound: float, form: str) -> None:
    layer, inputs = drawn
    if getattr(layer, "padding_mode", "zeros") != "zeros" or not len(inputs):
        return  # of these Opacus's hooks know nothing
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        return
    model, owners = LayerOf(layer).double(), torch.arange(len(inputs))
    reference = clipped(model, (inputs.double(),), owners, bound, "opacus")
    assert_equal(clipped(model, (inputs.double(),), owners, bound, "book-keeping", form), reference)


SIZES = [
    (kind, patients, bound) for kind in [*KINDS, "logistic"] for patients in (1, 2, 32) for bound in (1e-3, 0.3, 1e3)
]


@pytest.mark.parametrize(("kind", "patients", "bound"), [*SIZES, ("resnet18-gn", 2, 0.3)])
def test_our_models_clipped_sums_are_opacus(kind: str, patients: int, bound: float) -> None:
    base = {"logistic": "mlp", "resnet18-gn": "small-cnn"}.get(kind, kind)
    spec = study(base)
    model = build(spec.model_copy(update={"model": spec.model.model_copy(update={"name": kind})})).double()
    data = records(base, patients=patients)
    inputs = tuple(each.double() for each in tensors(data, patients))
    owners = torch.arange(patients)
    reference = clipped(model, inputs, owners, bound, "opacus")
    for form in FORMS:
        assert_equal(clipped(model, inputs, owners, bound, "book-keeping", form), reference)


@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), BOUNDS)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_an_embeddings_clipped_sum_is_that_of_its_samples_one_by_one(
    batch: int, steps: int, padded: bool, bound: float
) -> None:
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 3, padding_idx=2 if padded else None)
            self.head = nn.Linear(3, 2)

        def forward(self, places: Tensor) -> Tensor:
            return torch.tanh(self.head(self.embedding(places)))

    model, places = Words().double(), torch.randint(0, 7, (batch, steps))
    for owners in (torch.arange(batch), torch.arange(batch) // 2):
        found = clipped(model, (places,), owners, bound, "book-keeping")
        assert_equal(found, one_by_one(model, places, owners, bound))


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_weight_and_a_layer_used_twice_count_with_the_sum_of_their_gradients(form: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.middle, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)
            self.head.weight = self.words.weight

        def forward(self, places: Tensor) -> Tensor:
            return self.head(torch.tanh(self.middle(torch.tanh(self.middle(self.words(places))))))

    torch.manual_seed(0)
    model, places, owners = Tied().double(), torch.randint(0, 5, (6, 3)), torch.tensor([0, 0, 1, 2, 2, 3])
    found = clipped(model, (places,), owners, 0.2, "book-keeping", form)
    assert_equal(found, one_by_one(model, places, owners, 0.2))


def test_recomputed_activations_give_the_same_sum() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (
                nn.Conv2d(1, 4, 3),
                nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
            )
            self.again = False

        def forward(self, images: Tensor) -> Tensor:
            found = self.first(images)
            if self.again:
                return torch.utils.checkpoint.checkpoint(self.second, found, use_reentrant=False)
            return self.second(found)

    torch.manual_seed(0)
    model, images, owners = Checkpointed().double(), torch.randn(5, 1, 9, 9).double(), torch.arange(5)
    plain = clipped(model, (images,), owners, 0.1, "book-keeping")
    model.again = True
    assert torch.equal(clipped(model, (images,), owners, 0.1, "book-keeping"), plain)


@pytest.mark.parametrize("kind", ["mlp", "small-cnn", "gru", "lstm"])
def test_in_bfloat16_norms_are_still_of_what_is_summed(kind: str) -> None:
    """A clipped patient adds exactly the bound, whatever precision its gradient came from."""
    model, data = build(study(kind)), records(kind, patients=6)
    wrapped = engines.wrap(model, "book-keeping")
    for patient in range(6):
        wrapped.tape.open(RowOwners(torch.zeros(1, dtype=torch.int64), CPU))
        with torch.autocast("cpu", torch.bfloat16):
            logits = wrapped(*(each[patient : patient + 1] for each in tensors(data, 6)))
        wrapped.backward(nn.functional.cross_entropy(logits.float(), torch.tensor([patient % 2]), reduction="none"))
        sums: dict[Tensor, Tensor] = {p: torch.zeros(p.numel(), dtype=torch.float64) for p in model.parameters()}
        wrapped.tape.add_weighted_sum(wrapped.tape.factors(1e-3), sums)
        total = torch.cat(list(sums.values()))
        assert 1e-3 * (1 - 1e-5) <= float(total.norm()) <= 1e-3
