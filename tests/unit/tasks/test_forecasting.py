from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.unit.tasks.suite import TaskSuite

from consilium_shared import study_file, task
from consilium_shared.metrics import metrics
from consilium_shared.models import build
from consilium_shared.study import Study
from consilium_tasks.forecasting.loss import huber, pinball, within


class TestForecasting(TaskSuite):
    name = "forecasting"


def sample(**data: Any) -> Study:
    contract = study_file.read(task.get("forecasting").sample).contract
    return Study.model_validate({**contract, "data": {**contract["data"], **data}})


def test_metrics_of_counts_are_those_of_the_records() -> None:
    study, draw = sample(), np.random.default_rng(0)
    own, layout = task.of(study), task.of(study).layout(study, local=True)
    last = draw.normal(0, 0.7, 4000).clip(-1.8, 4)
    true = [(last * 0.8 + draw.normal(0, spread, 4000)).clip(-1.8, 4) for spread in (0.3, 0.5)]
    middle = [last * 0.8, last * 0.8 + 0.1]
    values = np.stack([each + at for each in middle for at in (-0.6, 0.0, 0.6)], axis=1)
    found = metrics(own.count(layout, values, [*true, last]), layout)
    errors = [np.abs(a - b) for a, b in zip(middle, true, strict=True)]

    def over(function: Any) -> float:
        return float(np.mean([function(at) for at in (0, 1)]))

    assert found["rmse"] == pytest.approx(80 * over(lambda at: np.sqrt((errors[at] ** 2).mean())), rel=5e-3)
    assert found["mae"] == pytest.approx(80 * over(lambda at: errors[at].mean()), rel=5e-3)
    assert found["r2"] == pytest.approx(over(lambda at: 1 - (errors[at] ** 2).mean() / true[at].var()), abs=5e-3)
    base = [((last - each) ** 2).mean() for each in true]
    assert found["skill"] == pytest.approx(over(lambda at: 1 - (errors[at] ** 2).mean() / base[at]), abs=1e-2)
    assert found["coverage"] == pytest.approx(over(lambda at: (errors[at] <= 0.6).mean()))


@pytest.mark.parametrize("loss", [huber(2), pinball(2, (0.1, 0.5, 0.9))], ids=["huber", "quantiles"])
def test_no_outcome_gives_a_record_a_larger_gradient_than_one(loss: Any) -> None:
    outputs = torch.zeros(3, 2 if loss.__qualname__.startswith("huber") else 6, requires_grad=True)
    far = torch.tensor([1e6, -1e6, 0.2])
    loss(outputs, far, -far).sum().backward()
    assert outputs.grad is not None
    assert bool((outputs.grad.abs().sum(1) <= 1.0).all())


def test_the_least_quantile_loss_is_at_the_quantile() -> None:
    true = torch.linspace(0, 1, 1001)
    tried = torch.linspace(0, 1, 101)
    losses = [pinball(1, (0.9,))(each.expand(1001, 1), true).sum().item() for each in tried]
    assert tried[int(np.argmin(losses))].item() == pytest.approx(0.9, abs=0.011)


def test_quantiles_never_fall_and_stay_in_the_targets_range() -> None:
    found = within([(-1.0, 1.0), (-2.0, 0.5)], 3)(torch.randn(50, 6) * 3).unflatten(1, (2, 3))
    assert bool((found[:, :, 1:] >= found[:, :, :-1]).all())
    assert bool((found[:, 0].abs() <= 1).all() and (found[:, 1] <= 0.5).all() and (found[:, 1] >= -2).all())


@pytest.mark.parametrize("name", ["linear-forecast", "mlp-forecast"])
def test_an_untrained_model_says_that_nothing_changes(name: str) -> None:
    study = sample(features=[{"name": "hours"}, {"name": "glucose", "center": 100, "scale": 40}])
    model = build(Study.model_validate({**study.contract, "model": {"name": name}}))
    found = model(torch.tensor([[3.0, 1.5]]))  # 160 mg/dL
    assert found.tolist()[0] == pytest.approx([(160 - 150) / 80] * 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"quantiles": [0.5, 0.1, 0.9]}, r"quantiles grow"),
        ({"quantiles": [0.1, 0.9]}, r"0\.5 is in the middle"),
        ({"quantiles": []}, r"coverage needs data\.quantiles"),
        ({"features": [{"name": "hours"}]}, "last is the name of a numeric feature"),
        ({"targets": [{"name": "hours", "low": 0, "high": 1}]}, "a target is no feature"),
        ({"targets": [{"name": "later", "low": 0, "high": 1}]}, "skill needs"),
        ({"targets": [{"name": "later", "low": 1, "high": 0}]}, "low is less than high"),
    ],
)
def test_a_contract_whose_parts_do_not_fit_says_what_to_change(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sample(**data)
