"""The constants on which a private sum's sensitivity rests: each is needed, and they fit together."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpsgd import layer_records, tape
from dpsgd.lattice import Lattice
from dpsgd.row_owners import RowOwners
from dpsgd.tape import ERROR, REACH, SLACK, Tape

CPU = torch.device("cpu")


def opened(patients: int) -> Tape:
    found = Tape()
    found.open(RowOwners(torch.arange(patients), CPU))
    return found


def exact_square(row: torch.Tensor) -> Fraction:
    return sum((Fraction(float(x)) ** 2 for x in row.flatten()), Fraction(0))


def test_the_errors_that_the_lattice_allows_for_are_the_sum_of_what_can_go_wrong() -> None:
    terms = 2 * tape._TERMS * 2.0**-53 * REACH
    factors = tape._DIMENSIONS * 2.0**-52 * REACH**2
    batches = 2.0**20 * 2.0**-53 / 2
    assert terms + factors + batches <= ERROR
    numbers = 2**30  # in one norm
    assert numbers * 2.0**-53 <= SLACK - 1 - 2.0**-30


@pytest.mark.parametrize("batch", [1, 64, 10_000])
def test_what_rounding_may_add_is_taken_off_the_clipping_norm(batch: int) -> None:
    lattice = Lattice.of(2.0, 1.5, 1000, batch)
    rounding = lattice.patients * ERROR * 2.0 + lattice.step * math.sqrt(1000)
    assert lattice.row_bound <= 2.0 - rounding * (1 - 1e-9)
    assert lattice.patients >= 2 * batch + 1000


def test_a_clipped_row_is_never_longer_than_the_bound() -> None:
    """Also where float32 has no room for its squares, or rounds most of them down."""
    draw = np.random.default_rng(0)
    rows = [draw.standard_normal(333) * 10.0 ** draw.integers(-15, 30) for _ in range(40)]
    rows += [np.concatenate([[1.0], np.full(332, 2.4e-4)]), np.full(333, 1e19), np.full(333, 0.1)]
    values = torch.from_numpy(np.array(rows, dtype=np.float32))
    parameter, found = nn.Parameter(torch.zeros(333)), opened(len(values))
    found.record_gradients(parameter, values)
    factors = found.factors(1e-20)
    clipped = [Fraction(float(f)) ** 2 * exact_square(row) for f, row in zip(factors, values, strict=True)]
    bound = Fraction(1e-20) ** 2
    assert all(bound * Fraction(1 - 1e-5) <= square <= bound for square in clipped)


@pytest.mark.parametrize("numbers", [1, 333, 2**14 - 1, 2**14, 2**17 + 5])
def test_a_rows_norm_depends_on_neither_its_place_nor_its_neighbours(numbers: int) -> None:
    values = torch.randn(9, numbers, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([layer_records.row_squares(row[None]) for row in values])
    places = torch.tensor([8, 3, 0, 1, 7])
    assert torch.equal(layer_records.row_squares(values[places]), alone[places])
    assert torch.allclose(alone, values.double().square().sum(1), rtol=1e-13, atol=0.0)
    for loud in (float("nan"), 1e25):
        values[7] = loud
        rest = torch.arange(9) != 7
        assert torch.equal(layer_records.row_squares(values)[rest], alone[rest])


def cancelling(steps: int, left: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and deltas ``[1, T, 8]`` whose products cancel down to ``left`` of what they are."""
    generator = torch.Generator().manual_seed(1)
    inputs, deltas = (torch.randn(1, steps // 2, 8, generator=generator) for _ in range(2))
    return torch.cat([inputs, inputs * (1 + left)], dim=1), torch.cat([deltas, -deltas], dim=1)


def gradient_square(inputs: torch.Tensor, deltas: torch.Tensor) -> Fraction:
    exact = [[[Fraction(float(x)) for x in row] for row in side[0]] for side in (inputs, deltas)]
    total = Fraction(0)
    for column in range(8):
        for row in range(8):
            total += sum((a[column] * d[row] for a, d in zip(*exact, strict=True)), Fraction(0)) ** 2
    return total


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-6])
def test_a_norm_from_gram_matrices_is_never_too_small(left: float) -> None:
    inputs, deltas = cancelling(16, left)
    found = opened(1)
    found.record_factors((nn.Parameter(torch.zeros(8, 8)),), inputs, deltas)
    square = Fraction(float(found._records[0].squares()[0]))
    exact = gradient_square(inputs, deltas)
    assert square >= exact
    if left > 1e-2:
        assert square <= exact * Fraction(1 + 1e-10)


def test_where_more_cancels_than_float64_holds_the_norm_is_still_not_too_small() -> None:
    """Without what is added for rounding it would be nothing."""
    inputs, deltas = torch.ones(1, 2, 8), torch.ones(1, 2, 8)
    inputs[0, 1], deltas[0, 1] = 1.0 + 2.0**-23, -1.0
    inputs, deltas = inputs.double() * (1.0 + 2.0**-40), deltas.double()
    found = opened(1)
    found.record_factors((nn.Parameter(torch.zeros(8, 8)),), inputs, deltas)
    square = Fraction(float(found._records[0].squares()[0]))
    reach = 4.0 * 8**2
    assert square >= gradient_square(inputs, deltas)
    assert square >= Fraction(2.0**-52 * reach)


def test_a_patient_whose_gradient_is_what_is_left_of_much_more_is_held_by_what_cancelled() -> None:
    inputs, deltas = cancelling(16, 1e-6)
    found = opened(1)
    found.record_factors((nn.Parameter(torch.zeros(8, 8)),), inputs, deltas)
    reach = float((inputs.norm(dim=2) * deltas.norm(dim=2)).sum())
    norm = math.sqrt(gradient_square(inputs, deltas))
    assert reach > 1e3 * norm
    assert float(found.factors(norm)) == pytest.approx(REACH * norm / reach, rel=1e-5)
    assert float(found.factors(norm)) * norm < 0.2 * norm


def test_a_gram_sum_too_large_for_its_shape_to_be_nobodys_is_not_taken() -> None:
    found = Tape()
    found.open(RowOwners(torch.tensor([0, 0, 1]), CPU, limit=2))
    assert not found.materializes(1, 4096, 2048)
    assert found.materializes(1, 16384, 4096)
    found.open(RowOwners(torch.arange(3), CPU, limit=1))
    assert not found.materializes(1, 16384, 4096)


BESIDE = {
    "nobody": ([0], 32),
    "nobody, when memory had run out": ([0], 1),
    "others": ([0, 1, 2, 3], 32),
    "one of several records": ([0, 1, 1], 32),
    "one of as many as there may be": ([0, *[1] * 25], 32),
    "another, of a long series": ([0, 1], 64),
    "nobody, with many records of its own": ([0] * 200, 256),
}


@pytest.mark.parametrize("limit", [1, 2, 25, 31, 32, 200])
def test_whoever_is_beside_a_patient_its_gradients_have_the_same_form(limit: int) -> None:
    """Of one form more may be left after clipping than of the other."""
    sizes = [(steps, p, d) for steps in (1, 16, 64, 128, 400) for p in (4, 64, 512, 4096) for d in (9, 576, 4608)]
    seen = set()
    for owners, batch in BESIDE.values():
        if max(owners.count(0), owners.count(1)) > limit:
            continue
        found = Tape()
        found.open(RowOwners(torch.tensor(owners), CPU, batch, limit))
        seen.add(tuple(found.materializes(*size) for size in sizes))
    (forms,) = seen
    assert {True, False} == set(forms)


def test_a_patient_of_more_records_than_the_study_allows_is_no_batch() -> None:
    with pytest.raises(RuntimeError, match="3 rows in a step, and the study allows 2"):
        RowOwners(torch.tensor([0, 1, 1, 1]), CPU, 32, 2)


@pytest.mark.parametrize("form", ["rows", "product", "scattered"])
@pytest.mark.parametrize(("alone", "beside_others"), [([0], [0, 1, 2]), ([0, 0], [0, 0, 1, 2, 2])])
def test_a_patients_row_of_a_tied_weight_is_formed_the_same_whoever_is_beside_it(
    alone: list[int], beside_others: list[int], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a kernel that rounds by how many there are: of rows that cancel, rounding may be all that is left."""
    whole = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda one, other: whole(one, other) * (1 + len(one) * 2.0**-40))
    generator = torch.Generator().manual_seed(0)
    inputs, deltas = torch.randn(8, 2, 3, generator=generator), torch.randn(8, 2, 4, generator=generator)
    weight, found = nn.Parameter(torch.zeros(4, 3)), Tape()

    def row(owners: list[int]) -> torch.Tensor:
        found.open(RowOwners(torch.tensor(owners), CPU, 8))
        found.record_factors((weight,), inputs, deltas)
        if form == "rows":
            found.record_gradients(weight, whole(deltas.transpose(1, 2), inputs))
        elif form == "product":
            found.record_factors((weight,), inputs, -deltas / 3)
        else:
            found.record_sparse(weight, torch.arange(16).view(8, 2) % 4, inputs, None)
        return found.gradients()[weight][0]

    assert torch.equal(row(alone), row(beside_others))


@pytest.mark.parametrize("leave", ["record_gradients", "record_outer_product", "record_factors", "record_sparse"])
def test_what_has_not_one_row_for_each_sample_is_refused(leave: str) -> None:
    found, weight, five = opened(4), nn.Parameter(torch.zeros(3, 3)), torch.zeros(5, 2, 3)
    given: dict[str, tuple[Any, ...]] = {
        "record_gradients": (weight, torch.zeros(5, 3, 3)),
        "record_outer_product": ((weight,), five, five),
        "record_factors": ((weight,), five, five),
        "record_sparse": (weight, torch.zeros(5, 2, dtype=torch.int64), five, None),
    }
    with pytest.raises(RuntimeError, match="5 rows and the batch has 4"):
        getattr(found, leave)(*given[leave])
