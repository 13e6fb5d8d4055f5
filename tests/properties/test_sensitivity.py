"""Adding or removing one patient moves the sum before noise by at most the clipping norm, exactly.

Sums are compared as whole numbers, so no tolerance stands in any assertion.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from consilium_client.training import clipping
from consilium_client.training.clipping import PrivateOptimizer, clipping_factors
from consilium_client.training.independence import per_sample
from consilium_client.training.lattice import Lattice
from consilium_client.training.noise import Noise
from consilium_shared.models import build
from consilium_shared.study import Study

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

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


def an_optimizer(parameters: list[nn.Parameter], bound: float, sigma: float) -> PrivateOptimizer:
    plain = torch.optim.SGD(parameters, 1.0)
    return PrivateOptimizer(
        plain, clipping_norm=bound, noise_multiplier=sigma, expected_batch=1, noise=Noise(bytes(32))
    )


def summed(batches: list[Patients], bound: float, sigma: float) -> list[int]:
    """The sum before noise, in steps of the lattice."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = an_optimizer(parameters, bound, sigma)
    for batch in batches:
        rows, owners = torch.cat(batch), torch.repeat_interleave(torch.tensor([len(p) for p in batch]))
        parts = rows.split([math.prod(shape) for shape in SHAPES], dim=1)
        for parameter, part, shape in zip(parameters, parts, SHAPES, strict=True):
            parameter.grad_sample = part.reshape(-1, *shape)
        optimizer.accumulate(owners)
    return whole(optimizer)


def whole(optimizer: PrivateOptimizer) -> list[int]:
    numbers = optimizer._sum.tolist()
    assert all(number.is_integer() and abs(number) < 2**53 for number in numbers)
    return [int(number) for number in numbers]


def norm_is_at_most(vector: list[int], bound: float, step: float) -> bool:
    most = int(bound / step)  # step is a power of two: exact but for the fraction, which may only be lost
    return sum(number**2 for number in vector) <= most**2


def minus(one: list[int], other: list[int]) -> list[int]:
    return [a - b for a, b in zip(one, other, strict=True)]


BOUNDS = st.floats(1e-3, 1e3)
SIGMAS = st.floats(0.0, 50.0)


@given(patients(), BOUNDS, SIGMAS, st.data())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_one_patient_moves_the_sum_by_its_own_clipped_gradient_and_no_other(
    everyone: Patients, bound: float, sigma: float, data: st.DataObject
) -> None:
    leaver = data.draw(st.integers(0, len(everyone) - 1))
    others = everyone[:leaver] + everyone[leaver + 1 :]
    before, after = (summed([batch] if batch else [], bound, sigma) for batch in (everyone, others))
    alone = summed([[everyone[leaver]]], bound, sigma)
    assert minus(before, after) == alone
    assert norm_is_at_most(alone, bound, Lattice.of(bound, sigma, 12).step)


@given(patients(), BOUNDS, st.data())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_order_and_physical_batches_do_not_matter_to_the_last_bit(
    everyone: Patients, bound: float, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(everyone))
    cut = data.draw(st.integers(1, len(everyone)))
    batches = [batch for batch in (order[:cut], order[cut:]) if batch]
    assert summed(batches, bound, 1.0) == summed([everyone], bound, 1.0)


@given(patients(), BOUNDS)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_patient_below_the_bound_counts_as_the_mean_of_its_records(everyone: Patients, bound: float) -> None:
    for rows in everyone:
        mean = rows.double().mean(dim=0)
        found, step = summed([[rows]], bound, 1.0), Lattice.of(bound, 1.0, 12).step
        if not torch.isfinite(mean).all():
            assert found == [0] * 12
        elif torch.linalg.vector_norm(mean) < 0.999 * bound:
            assert np.array(found) * step == pytest.approx(mean.numpy(), abs=0.51 * step, rel=1e-12)
        else:
            assert not norm_is_at_most(found, 0.999 * bound, step)  # clipped, but by no more than needed


def no_clipping(gradients: list[torch.Tensor], bound: float, owners: torch.Tensor) -> torch.Tensor:
    return torch.ones(int(owners[-1]) + 1, dtype=torch.float64)


def a_little_less_clipping(gradients: list[torch.Tensor], bound: float, owners: torch.Tensor) -> torch.Tensor:
    return clipping_factors(gradients, bound * 1.00001, owners)


def by_the_largest_tensor(gradients: list[torch.Tensor], bound: float, owners: torch.Tensor) -> torch.Tensor:
    return torch.stack([clipping_factors([g], bound, owners) for g in gradients]).amin(dim=0)


@pytest.mark.parametrize("planted", [no_clipping, a_little_less_clipping, by_the_largest_tensor])
def test_a_wrong_clipper_is_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rows = Lattice.of(1.0, 1.0, 12).step, torch.full((1, 12), 7.0)
    assert norm_is_at_most(summed([[rows]], 1.0, 1.0), 1.0, step)
    monkeypatch.setattr(clipping, "clipping_factors", planted)
    assert not norm_is_at_most(summed([[rows]], 1.0, 1.0), 1.0, step)


def test_a_patient_whose_records_count_one_by_one_is_seen() -> None:
    optimizer = an_optimizer([nn.Parameter(torch.zeros(12))], 1.0, 1.0)
    optimizer.params[0].grad_sample = torch.full((3, 12), 7.0)
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
    return Study.model_validate(
        {
            "study": "test",
            "task": f"{MODELS[model]}-classification",
            "model": {"name": model, "hidden": 8},
            "data": {"asset": "a", "label": {"column": "y", "classes": ["0", "1"]}, **DATA[MODELS[model]]},
            "training": {"rounds": 1, "steps_per_round": 1, "expected_batch": 1, "optimizer": {"lr": 0.1}},
            "privacy": {"mode": "none"},
        }
    )


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
    parameters, wrapped, bound = list(model.parameters()), per_sample(model), 0.3

    def total(chosen: list[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
        optimizer = an_optimizer(parameters, bound, 1.0)
        for inputs, labels in chosen:
            losses = nn.functional.cross_entropy(wrapped(inputs), labels, reduction="none")
            losses.sum().backward()
            optimizer.accumulate(torch.zeros(len(labels), dtype=torch.int64))
        return whole(optimizer)

    step = Lattice.of(bound, 1.0, sum(p.numel() for p in parameters)).step

    @given(records(INPUTS[MODELS[name]]), st.data())
    @settings(derandomize=True, deadline=None, max_examples=60)
    def holds(everyone: list[tuple[torch.Tensor, torch.Tensor]], data: st.DataObject) -> None:
        leaver = data.draw(st.integers(0, len(everyone) - 1))
        moved = minus(total(everyone), total(everyone[:leaver] + everyone[leaver + 1 :]))
        assert norm_is_at_most(moved, bound, step)

    holds()
