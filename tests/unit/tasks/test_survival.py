from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import assets
from tests.unit.tasks.suite import TaskSuite

from consilium_client.data import load
from consilium_shared import study_file, task
from consilium_shared.errors import DataError
from consilium_shared.intervals import noised_metrics, variances
from consilium_shared.metrics import metrics
from consilium_shared.study import Study
from consilium_tasks.survival.counts import SurvivalLayout, count
from consilium_tasks.survival.loss import cumulative, hazard_loss

EDGES = (1.0, 2.0, 4.0)


class TestSurvival(TaskSuite):
    name = "survival"


def exact(times: np.ndarray, events: np.ndarray, risks: np.ndarray) -> float:
    right = pairs = 0.0
    for i in np.flatnonzero(events):
        later = times > times[i]
        pairs += later.sum()
        right += (risks[i] > risks[later]).sum() + 0.5 * (risks[i] == risks[later]).sum()
    return right / pairs


def test_a_site_that_names_one_column_for_time_and_event_is_told_before_anything_is_charged(tmp_path: Path) -> None:
    """Else the loss would have one target in place of two, and every charged step would be noise alone."""
    study = study_file.read(task.get("survival").sample)
    asset = assets.write(study, tmp_path)
    same = asset.model_copy(update={"columns": {**asset.columns, "status": "days"}})
    with pytest.raises(DataError, match="two of them are one here"):
        load(same, study)


def test_a_rate_of_the_event_which_no_model_would_start_from_is_refused() -> None:
    contract = study_file.read(task.get("survival").sample).model_dump()
    contract["data"]["event"]["prior"] = [0.8, 0.2]
    with pytest.raises(ValidationError, match=r"event\.prior does nothing"):
        Study.model_validate(contract)


def test_the_index_from_counts_is_that_of_all_pairs_of_patients_of_all_hospitals() -> None:
    draw = np.random.default_rng(0)
    risks = draw.random(600)
    times = draw.exponential(3 * np.exp(-2 * (risks - 0.5)))
    events = (draw.random(600) < 0.6).astype(np.int64)
    layout = SurvivalLayout(tuple(np.linspace(0.25, 10, 40)), noised=False)
    sites = np.array_split(np.arange(600), 3)
    summed = np.sum([count(times[some], events[some], risks[some], layout) for some in sites], axis=0)
    found = metrics(summed, layout)["c-index"]
    assert found is not None
    assert abs(found - exact(times, events, risks)) < 0.005


def test_the_index_of_noised_counts_lies_in_its_interval_also_over_many_time_bins() -> None:
    draw, layout = np.random.default_rng(1), SurvivalLayout(tuple(float(edge) for edge in range(1, 51)), noised=True)
    times, events = draw.random(2000) * 60, draw.integers(0, 2, 2000)
    risks = np.clip(1 - times / 60 + draw.normal(0, 0.2, 2000), 0, 1)
    counts, variance = count(times, events, risks, layout), variances(layout, 3.0, sites=3)
    for _ in range(20):
        noised = counts + np.rint(draw.normal(0, np.sqrt(variance))).astype(np.int64)
        values, found = noised_metrics(noised, layout, variance)
        value, (low, high) = values["c-index"], found["c-index"]
        assert value is not None
        assert low <= value <= high


def test_a_patient_counts_in_the_intervals_lived_through_and_in_that_of_the_event() -> None:
    logits = torch.zeros(6, 3, requires_grad=True)
    times = torch.tensor([0.5, 0.5, 1.5, 1.5, 9.0, 9.0])
    events = torch.tensor([0, 1, 0, 1, 0, 1])
    losses = hazard_loss(EDGES)(logits, times, events)
    assert torch.allclose(losses / np.log(2), torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 3.0]))
    losses.sum().backward()
    assert torch.equal(logits.grad[1].sign(), torch.tensor([-1.0, 0.0, 0.0]))  # type: ignore[index]


def test_risks_until_each_edge_never_fall() -> None:
    found = cumulative(torch.randn(50, 3) * 5, torch.zeros(50), torch.zeros(50))
    assert bool(((found[:, 1:] >= found[:, :-1]) & (found[:, 1:] <= 1)).all())
