"""Adding or removing one patient moves the sum before noise by at most the clipping norm, exactly.

Sums are compared with the bound as whole numbers, so no tolerance stands in those assertions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import studies
from torch import nn

from consilium_shared.models import build
from consilium_shared.study import Study
from dpsgd import engines, private_optimizer
from dpsgd.adaptive import AdaptiveClipping
from dpsgd.lattice import Lattice
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import ERROR, Tape

CPU = torch.device("cpu")

# -- given rows

SHAPES = ((3, 2), (5,), (1,))
ODD = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 0.0]
Patients = list[torch.Tensor]
"""For each patient its records' gradients: float32 ``[records, 12]``."""


@st.composite
def patients(draw: st.DrawFn) -> Patients:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for records in draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)):
        rows = generator.standard_normal((records, 12)) * 10.0 ** draw(st.integers(-20, 20))
        for _ in range(draw(st.integers(0, 2))):
            place = draw(st.integers(0, records - 1)), draw(st.integers(0, 11))
            rows[place] = draw(st.sampled_from(ODD))
        found.append(torch.from_numpy(rows.astype(np.float32)))
    return found


def an_optimizer(
    parameters: list[nn.Parameter], bound: float, sigma: float, tape: Tape, adaptive: AdaptiveClipping | None = None
) -> PrivateOptimizer:
    about: dict[str, Any] = {
        "clipping_norm": bound,
        "noise_multiplier": sigma,
        "expected_batch": 1,
        "noise": Noise(bytes(32)),
    }
    return PrivateOptimizer(torch.optim.SGD(parameters, 1.0), tape, adaptive=adaptive, **about)


def summed(batches: list[Patients], bound: float, sigma: float, adaptive: AdaptiveClipping | None = None) -> list[int]:
    """The sum before noise, in steps of the lattice; with adaptive clipping the sum of marks is its last number."""
    parameters, tape = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES], Tape()
    optimizer = an_optimizer(parameters, bound, sigma, tape, adaptive)
    for batch in batches:
        rows, owners = torch.cat(batch), torch.repeat_interleave(torch.tensor([len(p) for p in batch]))
        parts = rows.split([math.prod(shape) for shape in SHAPES], dim=1)
        tape.open(RowOwners(owners, CPU))
        for parameter, part, shape in zip(parameters, parts, SHAPES, strict=True):
            tape.record_gradients(parameter, part.reshape(-1, *shape))
        optimizer.accumulate()
    return whole(optimizer)


def whole(optimizer: PrivateOptimizer) -> list[int]:
    numbers = optimizer._sum.round().tolist()
    assert all(abs(number) < 2**53 for number in numbers)
    return [int(number) for number in numbers]


def norm_is_at_most(vector: list[int], bound: float, step: float) -> bool:
    most = int(bound / step)  # step is a power of two: exact but for the fraction, which may only be lost
    return sum(number**2 for number in vector) <= most**2


def is_rounding_alone(vector: list[int], patients: int, bound: float, step: float) -> bool:
    """At most what the lattice allows for so many patients in the sum."""
    return math.sqrt(sum(number**2 for number in vector)) <= patients * ERROR * bound / step + math.sqrt(len(vector))


def minus(one: list[int], other: list[int]) -> list[int]:
    return [a - b for a, b in zip(one, other, strict=True)]


BOUNDS = st.floats(1e-3, 1e3)
SIGMAS = st.floats(0.0, 50.0)


ADAPTIVE = st.none() | st.builds(AdaptiveClipping, quantile=st.floats(0.05, 0.95))


@given(patients(), BOUNDS, SIGMAS, ADAPTIVE, st.data())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_one_patient_moves_the_sum_by_its_own_clipped_gradient_and_no_other(
    everyone: Patients, bound: float, sigma: float, adaptive: AdaptiveClipping | None, data: st.DataObject
) -> None:
    leaver = data.draw(st.integers(0, len(everyone) - 1))
    others = everyone[:leaver] + everyone[leaver + 1 :]
    before, after = (summed([batch] if batch else [], bound, sigma, adaptive) for batch in (everyone, others))
    alone = summed([[everyone[leaver]]], bound, sigma, adaptive)
    step, moved = Lattice.of(bound, sigma, 12, 1).step, minus(before, after)
    assert norm_is_at_most(moved, bound, step)
    assert is_rounding_alone(minus(moved, alone), len(everyone), bound, step)


@given(patients(), BOUNDS, st.data())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_order_and_physical_batches_do_not_matter_but_for_what_the_lattice_allows(
    everyone: Patients, bound: float, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(everyone))
    cut = data.draw(st.integers(1, len(everyone)))
    batches = [batch for batch in (order[:cut], order[cut:]) if batch]
    moved = minus(summed(batches, bound, 1.0), summed([everyone], bound, 1.0))
    assert is_rounding_alone(moved, len(everyone), bound, Lattice.of(bound, 1.0, 12, 1).step)


@given(patients(), BOUNDS)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_patient_below_the_bound_counts_as_the_mean_of_its_records(everyone: Patients, bound: float) -> None:
    for rows in everyone:
        mean = rows.double().mean(dim=0)
        found, step = summed([[rows]], bound, 1.0), Lattice.of(bound, 1.0, 12, 1).step
        if not torch.isfinite(mean).all():
            assert found == [0] * 12
        elif torch.linalg.vector_norm(mean) < 0.999 * bound:
            rounding = 1e-6 * float(rows.abs().max())  # of the mean, in the rows' own precision
            assert np.array(found) * step == pytest.approx(mean.numpy(), abs=0.51 * step + rounding, rel=1e-12)
        else:
            assert not norm_is_at_most(found, 0.999 * bound, step)  # clipped, but by no more than needed


RATIOS = Tape.ratios


def no_clipping(tape: Tape, bound: float) -> torch.Tensor:
    return torch.ones(tape.owners.patients, dtype=torch.float64)


def a_little_less_clipping(tape: Tape, bound: float) -> torch.Tensor:
    return RATIOS(tape, bound * 1.00003)


def by_the_largest_tensor(tape: Tape, bound: float) -> torch.Tensor:
    norms = torch.stack([entry.squares()[0].sqrt() for entry in tape._records])
    return (bound / norms).amin(dim=0)


@pytest.mark.parametrize("planted", [no_clipping, a_little_less_clipping, by_the_largest_tensor])
def test_a_wrong_clipper_is_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rows = Lattice.of(1.0, 1.0, 12, 1).step, torch.full((1, 12), 7.0)
    assert norm_is_at_most(summed([[rows]], 1.0, 1.0), 1.0, step)
    monkeypatch.setattr(Tape, "ratios", planted)
    assert not norm_is_at_most(summed([[rows]], 1.0, 1.0), 1.0, step)


@pytest.mark.parametrize("norm", [7.0, 1.0, 0.1])
def test_a_mark_beside_a_gradient_that_was_clipped_as_without_it_is_seen(
    norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, adaptive = torch.full((1, 12), norm), AdaptiveClipping()
    step = Lattice.of(1.0, 1.0, 13, 1).step
    assert norm_is_at_most(summed([[rows]], 1.0, 1.0, adaptive), 1.0, step)
    monkeypatch.setattr(private_optimizer, "GRADIENT", 1.0)
    assert norm_is_at_most(summed([[rows]], 1.0, 1.0, adaptive), 1.0, step) == (norm < 0.2)


def test_a_patient_whose_records_count_one_by_one_is_seen() -> None:
    parameter, tape = nn.Parameter(torch.zeros(12)), Tape()
    optimizer = an_optimizer([parameter], 1.0, 1.0, tape)
    tape.open(RowOwners(torch.arange(3), CPU))
    tape.record_gradients(parameter, torch.full((3, 12), 7.0))
    optimizer.accumulate()
    assert not norm_is_at_most(whole(optimizer), 1.0, optimizer.lattice.step)


# -- models

DATA: dict[str, dict[str, Any]] = {
    "tabular": {"features": [{"name": n} for n in "abcd"]},
    "image": {"image": {"size": 12}},
    "sequence": {"series": {"variables": [{"name": "hr"}], "bins": 4, "step_minutes": 60}},
}
MODELS = {"logistic": "tabular", "mlp": "tabular", "gru": "sequence", "small-cnn": "image"}
INPUTS = {"tabular": (4,), "sequence": (4, 3), "image": (1, 12, 12)}


def a_study(model: str) -> Study:
    return studies.study({"name": model, "hidden": 8}, DATA[MODELS[model]], training={"expected_batch": 1})


@st.composite
def records(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each patient its inputs and classes."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for count in draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)):
        inputs = generator.standard_normal((count, *shape)) * 10.0 ** draw(st.integers(-20, 20))
        if draw(st.booleans()):
            inputs[draw(st.integers(0, count - 1))].flat[0] = draw(st.sampled_from(ODD))
        found.append((torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(generator.integers(0, 2, count))))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_whatever_a_patients_records_are_they_move_the_sum_by_at_most_the_bound(name: str) -> None:
    """One patient a physical batch; ``lattice`` says why."""
    model = build(a_study(name))
    parameters, wrapped, bound = list(model.parameters()), engines.wrap(model, "book-keeping"), 0.3

    def total(chosen: list[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
        optimizer = an_optimizer(parameters, bound, 1.0, wrapped.tape)
        for inputs, labels in chosen:
            wrapped.tape.open(RowOwners(torch.zeros(len(labels), dtype=torch.int64), CPU))
            wrapped.backward(nn.functional.cross_entropy(wrapped(inputs), labels, reduction="none"))
            optimizer.accumulate()
        return whole(optimizer)

    step = Lattice.of(bound, 1.0, sum(p.numel() for p in parameters), 1).step

    @given(records(INPUTS[MODELS[name]]), st.data())
    @settings(derandomize=True, deadline=None, max_examples=60)
    def holds(everyone: list[tuple[torch.Tensor, torch.Tensor]], data: st.DataObject) -> None:
        leaver = data.draw(st.integers(0, len(everyone) - 1))
        moved = minus(total(everyone), total(everyone[:leaver] + everyone[leaver + 1 :]))
        assert norm_is_at_most(moved, bound, step)

    holds()
