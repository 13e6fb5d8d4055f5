"""Evaluation at a site: counts on the patients held back, and on nobody else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.support import studies
from tests.support.records import dataset

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training.evaluation import evaluate, noised_counts
from consilium_shared.errors import DataError
from consilium_shared.metrics import Layout, metrics
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import Study
from consilium_tasks.classification.counts import ClassLayout
from dpsgd.isolation import ROWS

STUDY = studies.study("logistic", {"features": [{"name": "a"}, {"name": "b"}]})
CPU = torch.device("cpu")
ALL = ClassLayout.local(2)
COUNT = 16 * ROWS + 6


PRIVATE = Study.model_validate(
    {
        **STUDY.model_dump(),
        "privacy": {"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0},
        "evaluation": {"epsilon": 1.0, "metrics": ["auroc", "accuracy", "loss"]},
    }
)
NOISED = Layout.of(PRIVATE)
SEED = bytes(range(32))


def records() -> ArrayDataset:
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((COUNT, 2)).astype(np.float32)
    return dataset(
        inputs=inputs,
        statics=None,
        labels=(inputs[:, 0] > 0).astype(np.int64),
        patients=np.arange(COUNT),
        patient_count=COUNT,
        train=np.arange(COUNT) % 2 == 0,
    )


def model(*weights: float, study: Study = STUDY) -> bytes:
    return pack(np.array(weights, dtype=np.float32), study)


def test_counts_those_held_back_alone() -> None:
    data = records()
    counts = evaluate(model(-1, 0, 1, 0, 0, 0), STUDY, data, CPU, ALL)
    assert counts.shape == (ALL.width,)
    assert metrics(counts, ALL)["n"] == COUNT // 2
    assert metrics(counts, ALL)["accuracy"] == 1.0
    wrong = dataclasses.replace(data, labels=(np.where(data.train, 1 - data.labels[0], data.labels[0]),))
    assert np.array_equal(evaluate(model(-1, 0, 1, 0, 0, 0), STUDY, wrong, CPU, ALL), counts)


def test_counts_of_those_for_validation_are_of_nobody_else() -> None:
    data, start = records(), model(-1, 0, 1, 0, 0, 0)
    third = dataclasses.replace(data, validation=~data.train & (np.arange(COUNT) % 3 == 0))
    found = {of: evaluate(start, STUDY, third, CPU, ALL, of=of) for of in ("validation", "test")}
    assert metrics(found["validation"], ALL)["n"] == third.patients_of("validation").sum()
    assert np.array_equal(found["validation"] + found["test"], evaluate(start, STUDY, data, CPU, ALL))


def test_the_same_for_records_that_are_selected_already() -> None:
    data = records()
    start = pack(to_vector(build(STUDY)), STUDY)
    assert np.array_equal(
        evaluate(start, STUDY, data, CPU, ALL), evaluate(start, STUDY, data.select(held_back=True), CPU, ALL)
    )


def test_nobody_held_back_is_zero_counts() -> None:
    data = dataclasses.replace(records(), train=np.ones(COUNT, dtype=bool))
    assert not evaluate(model(0, 0, 0, 0, 0, 0), STUDY, data, CPU, ALL).any()


def test_a_model_that_overflows_is_said_and_not_counted() -> None:
    with pytest.raises(DataError, match="no number"):
        evaluate(model(3e38, 3e38, 3e38, 3e38, 0, 0), STUDY, records(), CPU, ALL)


def noised(data: ArrayDataset, noise: float, seed: bytes = SEED, weights: bytes | None = None) -> np.ndarray:
    weights = model(-1, 0, 1, 0, 0, 0, study=PRIVATE) if weights is None else weights
    return noised_counts(weights, PRIVATE, data, CPU, noise_multiplier=noise, seed=seed)


def test_the_same_seed_gives_the_same_noised_counts_and_another_seed_others() -> None:
    assert np.array_equal(noised(records(), 2.0), noised(records(), 2.0))
    assert not np.array_equal(noised(records(), 2.0), noised(records(), 2.0, bytes(32)))


def test_the_noise_of_every_part_has_the_deviation_that_is_charged() -> None:
    """And half of it, or twice as much, would be noticed."""
    data, sigma, runs = records(), 3.0, 400
    exactly = noised(data, 1e-9)
    drawn = np.stack([noised(data, sigma, run.to_bytes(32, "big")) - exactly for run in range(runs)])
    z = drawn / np.concatenate([np.full(NOISED.sizes[p], d) for p, d in NOISED.deviations(sigma).items()])
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    for part, values in zip(
        NOISED.sizes, np.split(z, np.cumsum(list(NOISED.sizes.values()))[:-1], axis=1), strict=True
    ):
        assert values.std() == pytest.approx(1.0, abs=5 / np.sqrt(2 * values.size)), part
    assert not 0.9 < (2 * z).std() < 1.1
    assert not 0.9 < (z / 2).std() < 1.1


def test_a_patient_with_many_records_counts_once_with_privacy() -> None:
    data = records()
    many = dataclasses.replace(data, patients=np.arange(COUNT) % 8, patient_count=8, train=np.array([True, False] * 4))
    assert metrics(noised(many, 1e-9), NOISED)["n"] == 4


def test_adding_a_patient_moves_only_what_that_patient_adds() -> None:
    data, few = records(), dataclasses.replace(records(), train=np.arange(COUNT) % 2 == 0)
    few = dataclasses.replace(few, train=np.where(np.arange(COUNT) == 1, True, few.train))
    moved = NOISED.parts(noised(data, 1e-9) - noised(few, 1e-9))
    units = NOISED.deviations(1.0)
    assert 0 < sum(np.sum((moved[part] / units[part]) ** 2) for part in moved) <= 1 + 1e-9


def test_a_crafted_model_that_overflows_for_some_patients_is_not_told_of_it() -> None:
    crafted = model(3e38, 3e38, 3e38, 3e38, 0, 0, study=PRIVATE)
    assert metrics(noised(records(), 1e-9, weights=crafted), NOISED)["n"] == COUNT // 2
