"""Patients are split one by one and sampled by a Poisson process, one record each."""

from __future__ import annotations

import numpy as np
import pytest

from consilium_client.data.patients import PatientSampler, held_back, number_patients


def test_who_is_held_back_depends_on_study_and_patient_alone() -> None:
    names = [f"p{number}" for number in range(4000)]
    first = [held_back("study-a", name, 0.2) for name in names]
    assert first == [held_back("study-a", name, 0.2) for name in names]
    other = [held_back("study-b", name, 0.2) for name in names]
    # 4000 patients at .2: the share has a standard deviation of .0063.
    assert 0.17 < np.mean(first) < 0.23
    assert 0.02 < np.mean(np.logical_and(first, other)) < 0.06


def test_a_larger_fraction_only_adds_patients() -> None:
    for number in range(500):
        if held_back("s", str(number), 0.1):
            assert held_back("s", str(number), 0.3)


def test_patients_are_numbered_in_the_order_of_their_first_record() -> None:
    numbers, names = number_patients(["b", "a", "b", "c"])
    assert numbers.tolist() == [0, 1, 0, 2]
    assert names == ["b", "a", "c"]


PATIENTS = np.array([2, 0, 1, 2, 2, 0], dtype=np.int64)


def batches(rate: float, steps: int, seed: int = 0) -> list[np.ndarray]:
    return list(PatientSampler(PATIENTS, 3, rate, steps, np.random.default_rng(seed)))


def test_a_step_has_at_most_one_record_of_a_patient() -> None:
    for batch in batches(0.9, 300):
        assert batch.dtype == np.int64
        patients = PATIENTS[batch]
        assert len(set(patients)) == len(patients)


def test_every_step_is_yielded_even_when_nobody_is_chosen() -> None:
    steps = batches(0.05, 200)
    assert len(steps) == 200
    assert any(len(batch) == 0 for batch in steps)


def test_at_rate_one_every_patient_is_in_every_step() -> None:
    assert all(sorted(PATIENTS[batch]) == [0, 1, 2] for batch in batches(1.0, 50))


def test_patients_are_included_independently_at_the_rate_and_records_uniformly() -> None:
    rate, steps = 0.3, 20_000
    included = np.zeros((steps, 3), dtype=bool)
    records = np.zeros(len(PATIENTS))
    for step, batch in enumerate(batches(rate, steps)):
        included[step, PATIENTS[batch]] = True
        records[batch] += 1
    # Five standard errors of a mean of 20,000 draws at .3 are .016; of a product of two, less.
    assert np.abs(included.mean(axis=0) - rate).max() < 0.017
    assert abs((included[:, 0] & included[:, 2]).mean() - rate**2) < 0.017
    of_last = records[PATIENTS == 2] / records[PATIENTS == 2].sum()
    assert np.abs(of_last - 1 / 3).max() < 0.035


def test_a_seeded_generator_gives_the_same_steps_again() -> None:
    for one, two in zip(batches(0.5, 20, seed=3), batches(0.5, 20, seed=3), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("patients", "count", "rate", "says"),
    [([0, 1], 2, 0.0, "sampling_rate"), ([0, 1], 2, 1.1, "sampling_rate"), ([0, 2], 2, 0.5, "out of range"),
     ([-1, 0], 1, 0.5, "out of range"), ([0, 2], 3, 0.5, "no record")],
)  # fmt: skip
def test_what_would_break_the_accounting_is_refused(patients: list[int], count: int, rate: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PatientSampler(np.array(patients, dtype=np.int64), count, rate, 1, np.random.default_rng())
