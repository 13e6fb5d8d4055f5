"""Patients are split one by one and sampled by a Poisson process, with some of their records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import TableAsset
from consilium_client.data.patients import Draw, PatientSampler, number_patients
from consilium_shared.split import Part


def test_patients_are_numbered_in_the_order_of_their_first_record() -> None:
    numbers, names = number_patients(["b", "a", "b", "c"])
    assert numbers.tolist() == [0, 1, 0, 2]
    assert names == ["b", "a", "c"]


PATIENTS = np.array([2, 0, 1, 2, 2, 0], dtype=np.int64)


def draws(rate: float, steps: int, seed: int = 0, records: int = 1) -> list[Draw]:
    return list(PatientSampler(PATIENTS, 3, rate, steps, seed.to_bytes(32), records))


def test_a_step_has_at_most_so_many_records_of_a_patient_as_wanted() -> None:
    for most in (1, 2, 5):
        for draw in draws(0.9, 300, records=most):
            assert draw.records.dtype == draw.owners.dtype == np.int64
            patients, counts = np.unique(PATIENTS[draw.records], return_counts=True)
            assert counts.tolist() == [min(most, np.count_nonzero(patient == PATIENTS)) for patient in patients]
            assert len(set(draw.records)) == len(draw.records)  # without replacement


def test_the_records_of_a_patient_stand_together_and_are_counted_from_0() -> None:
    for draw in draws(0.7, 300, records=2):
        steps = np.diff(draw.owners, prepend=-1)
        assert set(steps) <= {0, 1}
        assert (np.diff(PATIENTS[draw.records]) != 0).tolist() == (steps[1:] == 1).tolist()


def test_every_step_is_yielded_even_when_nobody_is_chosen() -> None:
    steps = draws(0.05, 200)
    assert len(steps) == 200
    assert any(len(draw.records) == 0 for draw in steps)


def test_at_rate_one_every_patient_is_in_every_step() -> None:
    assert all(sorted(PATIENTS[draw.records]) == [0, 1, 2] for draw in draws(1.0, 50))


def test_each_record_of_a_patient_is_drawn_equally_often() -> None:
    for most in (1, 2):
        records = np.zeros(len(PATIENTS))
        for draw in draws(0.3, 20_000, records=most):
            records[draw.records] += 1
        assert stats.chisquare(records[PATIENTS == 2]).pvalue > 1e-3  # the seed is fixed: it never flakes


def test_the_same_seed_gives_the_same_steps_again_and_another_seed_others() -> None:
    one, two, other = (np.concatenate([d.records for d in draws(0.5, 50, seed)]) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def test_which_patients_are_drawn_does_not_depend_on_how_many_records_are() -> None:
    for one, many in zip(draws(0.5, 50, records=1), draws(0.5, 50, records=3), strict=True):
        assert set(PATIENTS[one.records]) == set(PATIENTS[many.records])


@pytest.mark.parametrize(
    ("patients", "count", "rate", "records", "says"),
    [([0, 1], 2, 0.0, 1, "sampling_rate"), ([0, 1], 2, 1.1, 1, "sampling_rate"), ([0, 2], 2, 0.5, 1, "out of range"),
     ([-1, 0], 1, 0.5, 1, "out of range"), ([0, 2], 3, 0.5, 1, "no record"), ([0, 1], 2, 0.5, 0, "at least 1")],
)  # fmt: skip
def test_what_would_break_the_accounting_is_refused(
    patients: list[int], count: int, rate: float, records: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        PatientSampler(np.array(patients, dtype=np.int64), count, rate, 1, bytes(32), records)


# Is it Poisson sampling? Every test statistic has a known distribution if it is; the same tests see what is not.

N, RATE, STEPS = 200, 0.15, 4000


def failed(included: np.ndarray) -> set[str]:
    """Which properties of Poisson sampling the inclusions ``[STEPS, N]`` lack, each at 1 in 100,000."""
    steps, patients = included.shape
    sizes, often = included.sum(axis=1), included.sum(axis=0)
    expected = RATE * (1 - RATE)
    centred = included - RATE
    together = centred.T @ centred / (expected * np.sqrt(steps))  # off the diagonal: about N(0, 1) each
    after = (centred[1:] * centred[:-1]).sum() / (expected * np.sqrt(patients * (steps - 1)))
    tests = {
        "rate": stats.binomtest(int(included.sum()), included.size, RATE).pvalue,
        "rate of each": stats.chi2.sf(((often - steps * RATE) ** 2).sum() / (steps * expected), patients),
        "batch size varies": 2 * min(
            stats.chi2.cdf(spread := ((sizes - patients * RATE) ** 2).sum() / (patients * expected), steps),
            stats.chi2.sf(spread, steps),
        ),
        "patients independent": 2 * stats.norm.sf(np.abs(together[np.triu_indices(patients, 1)]).max()) * patients**2,
        "steps independent": 2 * stats.norm.sf(abs(after)),
    }  # fmt: skip
    return {name for name, pvalue in tests.items() if pvalue < 1e-5}


def inclusions(batches: Iterator[np.ndarray]) -> np.ndarray:
    found = np.zeros((STEPS, N))
    for step in range(STEPS):
        found[step, next(batches)] = 1
    return found


def fixed_size(draw: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield draw.choice(N, int(N * RATE), replace=False)


def shuffled(draw: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        order = draw.permutation(N)
        yield from (order[start : start + 30] for start in range(0, N - 29, 30))


def households(draw: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield np.flatnonzero(np.repeat(draw.random(N // 2) < RATE, 2))


def at_rate(rate: float, draw: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield np.flatnonzero(draw.random(N) < rate)


def repeating(draw: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield from [np.flatnonzero(draw.random(N) < RATE)] * 2


def test_the_sampler_is_poisson() -> None:
    sampler = PatientSampler(np.arange(N), N, RATE, STEPS, bytes(32))
    assert failed(inclusions(draw.records for draw in sampler)) == set()


@pytest.mark.parametrize(
    ("planted", "lacks"),
    [(fixed_size, "batch size varies"), (shuffled, "batch size varies"), (shuffled, "steps independent"),
     (households, "patients independent"), (lambda draw: at_rate(RATE * 1.05, draw), "rate"),
     (lambda draw: at_rate(RATE / 1.05, draw), "rate"), (repeating, "steps independent")],
)  # fmt: skip
def test_what_is_not_poisson_sampling_is_told_apart(planted, lacks: str) -> None:
    assert lacks in failed(inclusions(planted(np.random.default_rng(0))))


def test_the_generator_of_the_planted_ones_would_pass_if_it_sampled_rightly() -> None:
    assert failed(inclusions(at_rate(RATE, np.random.default_rng(0)))) == set()


def test_the_rate_is_never_above_the_stated_one() -> None:
    """It is rounded down to a multiple of 2^-64, here to 0."""
    assert not any(len(d.records) for d in PatientSampler(np.arange(N), N, 2.0**-65, 100, bytes(32)))


def test_the_same_patients_are_held_back_in_every_study_of_one_label(tmp_path: Path) -> None:
    rows = ["patient,a,b,y", *(f"p{number},1,2,{number % 2}" for number in range(200))]

    def parts(name: str, count: int, **evaluation: Any) -> dict[int, bool]:
        (tmp_path / "t.csv").write_text("\n".join(rows[: count + 1]) + "\n", encoding="utf-8")
        of = studies.study(name=name, evaluation=evaluation)
        return dict(enumerate(load(TableAsset(kind="table", path=tmp_path / "t.csv"), of).train.tolist()))

    first = parts("one", 200)
    assert parts("two", 200) == first
    assert parts("two", 120) == {patient: part for patient, part in first.items() if patient < 120}  # others came later
    assert parts("two", 200, split_label="another") != first
    by_name = [parts(name, 200, split_label=None) for name in ("one", "two")]
    assert by_name[0] != by_name[1]
    assert by_name[0] == parts("x", 200, split_label="one")  # as contracts without the key have it: by their name


def test_a_validation_part_is_neither_trained_on_nor_for_test_and_stays_when_others_come(tmp_path: Path) -> None:
    rows = [f"p{number % 200},{number},2,{number % 2}" for number in range(400)]  # two records of each
    study = studies.study(evaluation={"split": 0.2, "validation_fraction": 0.25})

    def parts(count: int) -> list[list[int]]:
        (tmp_path / "t.csv").write_text("\n".join(["patient,a,b,y", *rows[:count]]) + "\n", encoding="utf-8")
        found = load(TableAsset(kind="table", path=tmp_path / "t.csv"), study)
        names: tuple[Part, ...] = ("train", "validation", "test")
        every = [found.part(name) for name in names]
        assert sorted(np.concatenate([each.records for each in every]).tolist()) == list(range(len(found)))
        assert [each.patient_count for each in every] == [int(found.patients_of(name).sum()) for name in names]
        return [np.flatnonzero(found.patients_of(name)).tolist() for name in names]

    few, many = parts(120), parts(400)
    assert few == [[patient for patient in each if patient < 120] for each in many]
    assert min(map(len, many)) > 10
