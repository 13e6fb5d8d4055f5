"""Every registered layer, on its own examples, against one sample after the other by plain differentiation.

A new file in ``dpsgd/layers`` is found here by itself: its examples are what these tests run on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from dpsgd import engines, registry
from dpsgd.isolation import ROWS, one_thread, without_denormals
from dpsgd.layer import Example, Layer
from dpsgd.layers import linear
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

CPU = torch.device("cpu")
FORMS = {"cheaper": None, "materialized": lambda *_: True, "factored": lambda *_: False}
SEEDS = torch.arange(100, 100 + 2 * ROWS)
ALONE, SEVERAL = torch.arange(5), torch.tensor([0, 0, 1, 2, 2])


def found_examples() -> Iterator[Any]:
    torch.manual_seed(0)
    for kind, layer in registry.registered().items():
        for number, example in enumerate(layer.examples()):
            yield pytest.param(layer, example, id=f"{kind.__name__}-{number}-{example.name}")


EACH = pytest.mark.parametrize(("layer", "example"), list(found_examples()))


class Inside(nn.Module):
    """The layer, and what makes every output count differently."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.layer(*inputs)
        return torch.tanh(found[0] if isinstance(found, tuple) else found)


def losses(outputs: Tensor) -> Tensor:
    flat = outputs.flatten(1)
    return (flat * torch.linspace(-1.0, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def drawing_nothing(module: nn.Module) -> nn.Module:
    """A copy in which no layer drops anything."""
    module = copy.deepcopy(module)
    for each in module.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(each, name, None), float):
                setattr(each, name, 0.0)
    return module


def inputs_of(example: Example, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    given = example.inputs(batch)
    made = {id(each): each.to(dtype) if each.is_floating_point() else each for each in given}
    return tuple(made[id(each)] for each in given)  # one tensor given twice stays one


def one_by_one(model: nn.Module, inputs: tuple[Tensor, ...], owners: Tensor) -> Tensor:
    """Each patient's gradient ``[P, d]``, the mean of its rows', by plain differentiation."""
    found, parameters = [], list(model.parameters())
    for patient in range(int(owners[-1]) + 1):
        rows = torch.nonzero(owners == patient).flatten()
        loss = torch.stack([losses(model(*taken(inputs, row)))[0] for row in rows]).mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) if parameters else loss)
    return torch.stack(found)


def taken(inputs: tuple[Tensor, ...], row: Tensor) -> tuple[Tensor, ...]:
    made = {id(each): each[row : row + 1] for each in inputs}
    return tuple(made[id(each)] for each in inputs)


class Recorded:
    """One backward pass of a model through the engine."""

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], owners: Tensor, form: str = "cheaper", tape: Any = None
    ) -> None:
        self.model = Inside(copy.deepcopy(module)).to(next((x.dtype for x in inputs if x.is_floating_point()), None))
        self.tape, self.parameters = tape or Tape(), list(self.model.parameters())
        wrapped = engines.BookKeeping(self.model.train(), self.tape)
        self.tape.open(RowOwners(owners, CPU, len(inputs[0])), SEEDS[: len(inputs[0])])
        with patch.object(Tape, "materializes", FORMS[form] or Tape.materializes):
            wrapped.backward(losses(wrapped(*inputs)))
        assert all(p.grad is None for p in self.parameters)

    def gradients(self) -> Tensor:
        """Each patient's, formed: ``[P, d]``."""
        found = self.tape.gradients()
        return torch.cat([found[p] for p in self.parameters], dim=1)

    def clipped_sum(self, bound: float) -> Tensor:
        sums: dict[Tensor, Tensor] = {p: torch.zeros(p.numel(), dtype=torch.float64) for p in self.parameters}
        self.tape.add_weighted_sum(self.tape.factors(bound), sums)
        return torch.cat(list(sums.values()))


def with_weights(example: Example) -> bool:
    return any(True for _ in example.module.parameters())


def test_every_layer_has_examples() -> None:
    assert len(registry.registered()) > 20
    for layer in registry.registered().values():
        assert list(layer.examples())


def test_two_files_cannot_claim_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LAYERS", [*linear.LAYERS, Layer(nn.GRU, linear.forward, linear.examples)])
    with pytest.raises(RuntimeError, match=r"two layers .* are for GRU"):
        registry.registered.__wrapped__()


@EACH
def test_outputs_and_the_gradient_of_the_inputs_are_the_plain_modules(layer: Layer, example: Example) -> None:
    module, inputs = drawing_nothing(example.module).double(), inputs_of(example, 4)
    made = {id(x): x.clone().requires_grad_(x.is_floating_point()) for x in inputs}
    leaves = tuple(made[id(x)] for x in inputs)
    plain = Inside(copy.deepcopy(module))
    expected = plain(*leaves)
    attached = Inside(copy.deepcopy(module))
    tape = Tape()
    registry.attach(attached, tape)
    tape.open(RowOwners(torch.arange(4), CPU), SEEDS[:4])
    found = attached(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = [leaf for leaf in made.values() if leaf.requires_grad]
    if wanted:
        ours = torch.autograd.grad(losses(found).sum(), wanted)
        theirs = torch.autograd.grad(losses(expected).sum(), wanted)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    registry.detach(attached)
    assert torch.equal(attached(*leaves), expected)
    assert attached.state_dict().keys() == plain.state_dict().keys()


@EACH
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("owners", [ALONE, SEVERAL], ids=["a row each", "several rows"])
def test_each_patients_gradient_norm_and_clipped_sum_are_those_of_its_rows_alone(
    layer: Layer, example: Example, form: str, owners: Tensor
) -> None:
    if not with_weights(example):
        return
    module, inputs = drawing_nothing(example.module).double(), inputs_of(example, len(owners) + 1)  # one of filling
    expected = one_by_one(Inside(copy.deepcopy(module)), inputs, owners)
    torch.testing.assert_close(Recorded(module, inputs, owners, form).gradients(), expected, rtol=1e-8, atol=1e-9)
    norms = torch.linalg.vector_norm(expected, dim=1)
    ratios = Recorded(module, inputs, owners, form).tape.ratios(0.7)
    assert (0.7 / ratios >= norms * (1 - 1e-9)).all()  # never too small
    torch.testing.assert_close(0.7 / ratios, norms, rtol=2e-6, atol=0.0)
    clipped = (expected * (0.7 / norms).clamp(max=1.0)[:, None]).sum(0)
    found = Recorded(module, inputs, owners, form).clipped_sum(0.7)
    assert torch.linalg.vector_norm(found - clipped) <= 1e-5 * torch.linalg.vector_norm(clipped)


@EACH
@pytest.mark.parametrize("form", FORMS)
def test_of_float32_the_sum_is_that_of_the_clipped_gradients_to_the_digits_of_float64(
    layer: Layer, example: Example, form: str
) -> None:
    """In float32 the rounding of one sum could be moved by one more patient by more than the bound."""
    if not with_weights(example):
        return
    inputs = inputs_of(example, 5, torch.float32)
    whole = Recorded(example.module.float(), inputs, ALONE, form)
    factors, each = whole.tape.factors(0.7), whole.gradients()
    expected = (each * factors[:, None]).sum(0)
    sums: dict[Tensor, Tensor] = {p: torch.zeros(p.numel(), dtype=torch.float64) for p in whole.parameters}
    whole.tape.add_weighted_sum(factors, sums)
    found = torch.cat(list(sums.values()))
    assert torch.linalg.vector_norm(found - expected) <= 1e-12 * each.norm()


@EACH
def test_a_rows_records_are_the_same_bits_wherever_it_stands_and_whoever_is_beside_it(
    layer: Layer, example: Example
) -> None:
    inputs, module = inputs_of(example, ROWS, torch.float32), example.module.float()
    tape, model = Tape(), Inside(copy.deepcopy(module)).train()
    wrapped = engines.BookKeeping(model, tape)

    def bits(order: Tensor, rows: int) -> dict[int, bytes]:
        """By sample, its output's bits and its records'."""
        made = {id(x): torch.cat([x[order], x.new_zeros((ROWS - len(order), *x.shape[1:]))]) for x in inputs}
        given = tuple(made[id(x)] for x in inputs)
        tape.open(RowOwners(torch.arange(len(order)), CPU, ROWS), torch.cat([SEEDS[order], SEEDS[: ROWS - len(order)]]))
        with one_thread(), without_denormals():
            outputs = wrapped(*given)
            if outputs.requires_grad:
                wrapped.backward(losses(outputs))
        found = {}
        for place, sample in enumerate(order.tolist()):
            parts = [outputs[place], *tape.tensors_of(place)]
            found[sample] = b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)
        tape.close()
        return found

    draw = torch.Generator().manual_seed(2)
    everyone = bits(torch.arange(ROWS), ROWS)
    for count in (1, 7, ROWS - 1, ROWS):
        order = torch.randperm(ROWS, generator=draw)[:count]
        assert all(everyone[sample] == each for sample, each in bits(order, ROWS).items())
    for loud in (math.nan, 1e30):
        if inputs[0].is_floating_point():
            inputs[0][5] = loud
            beside = bits(torch.arange(ROWS), ROWS)
            assert all(everyone[sample] == each for sample, each in beside.items() if sample != 5)


@EACH
def test_memory_that_is_used_again_gives_the_same_bits(layer: Layer, example: Example) -> None:
    if not with_weights(example):
        return
    module, tape = example.module.float(), Tape()
    for batch in (5, 9, 2, 5):
        inputs, owners = inputs_of(example, batch, torch.float32), torch.arange(batch)
        again = Recorded(module, inputs, owners, tape=tape).clipped_sum(0.5)
        assert torch.equal(again, Recorded(module, inputs, owners).clipped_sum(0.5))


@EACH
def test_frozen_weights_leave_nothing_and_an_empty_batch_is_taken(layer: Layer, example: Example) -> None:
    module = copy.deepcopy(example.module).float().requires_grad_(False)
    inputs = inputs_of(example, 3, torch.float32)
    made = {id(x): x.clone().requires_grad_(x.is_floating_point()) for x in inputs}
    model, tape = Inside(module), Tape()
    registry.attach(model, tape)
    tape.open(RowOwners(torch.arange(3), CPU), SEEDS[:3])
    found = model(*(made[id(x)] for x in inputs))
    if found.requires_grad:
        losses(found).sum().backward()
    assert tape.empty
    tape.open(RowOwners(torch.arange(0), CPU, 3), SEEDS[:3])
    registry.detach(model)
    live = engines.BookKeeping(Inside(copy.deepcopy(example.module)).float().train(), tape)
    outputs = live(*inputs)
    if outputs.requires_grad:
        live.backward(losses(outputs))
    assert tape.empty
