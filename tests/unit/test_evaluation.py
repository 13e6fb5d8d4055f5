"""Evaluation at a site: counts on the patients held back, and on nobody else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from consilium_client.data.records import Records
from consilium_client.evaluation import BATCH, evaluate
from consilium_shared.errors import DataError
from consilium_shared.metrics import counts_width, metrics
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import Study

STUDY = Study.model_validate(
    {
        "study": "test",
        "task": "tabular-classification",
        "model": {"name": "logistic"},
        "data": {
            "asset": "a",
            "label": {"column": "y", "classes": ["0", "1"]},
            "features": [{"name": "a"}, {"name": "b"}],
        },
        "training": {"rounds": 1, "steps_per_round": 1, "expected_batch": 4, "optimizer": {"lr": 0.1}},
        "privacy": {"mode": "none"},
    }
)
CPU = torch.device("cpu")
COUNT = 2 * BATCH + 6


def records() -> Records:
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((COUNT, 2)).astype(np.float32)
    return Records(
        inputs=inputs,
        statics=None,
        labels=(inputs[:, 0] > 0).astype(np.int64),
        patients=np.arange(COUNT),
        patient_count=COUNT,
        train=np.arange(COUNT) % 2 == 0,
    )


def model(*weights: float) -> bytes:
    return pack(np.array(weights, dtype=np.float32), STUDY)


def test_counts_those_held_back_alone() -> None:
    data = records()
    counts = evaluate(model(-1, 0, 1, 0, 0, 0), STUDY, data, CPU)
    assert counts.shape == (counts_width(2),)
    assert metrics(counts, 2)["n"] == COUNT // 2
    assert metrics(counts, 2)["accuracy"] == 1.0
    wrong = dataclasses.replace(data, labels=np.where(data.train, 1 - data.labels, data.labels))
    assert np.array_equal(evaluate(model(-1, 0, 1, 0, 0, 0), STUDY, wrong, CPU), counts)


def test_the_same_for_records_that_are_selected_already() -> None:
    data = records()
    start = pack(to_vector(build(STUDY)), STUDY)
    assert np.array_equal(evaluate(start, STUDY, data, CPU), evaluate(start, STUDY, data.select(held_back=True), CPU))


def test_nobody_held_back_is_zero_counts() -> None:
    data = dataclasses.replace(records(), train=np.ones(COUNT, dtype=bool))
    assert not evaluate(model(0, 0, 0, 0, 0, 0), STUDY, data, CPU).any()


def test_a_model_that_overflows_is_said_and_not_counted() -> None:
    with pytest.raises(DataError, match="no probability"):
        evaluate(model(3e38, 3e38, 3e38, 3e38, 0, 0), STUDY, records(), CPU)
