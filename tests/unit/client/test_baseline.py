"""What a site reaches alone is to be held against what the federation reached: it is trained the same way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support import studies
from tests.support.records import dataset

from consilium_client.commands.baseline import train_alone
from consilium_client.data.dataset import ArrayDataset
from consilium_client.training import trainer
from consilium_shared.errors import ConfigurationError
from consilium_shared.models import build
from consilium_shared.models.vector import unpack
from consilium_shared.study import Study


def study(rounds: int, *, average: float = 0.0, **model: Any) -> Study:
    return studies.study(
        {"name": "mlp", "hidden": 4, **model},
        {"features": [{"name": n} for n in "abc"]},
        training={"rounds": rounds, "steps_per_round": 2, "expected_batch": 16, "optimizer": {"lr": 0.5}, "seed": 1},
        aggregation={"weight_average": average},
    )


def records() -> ArrayDataset:
    draw = np.random.default_rng(0)
    return dataset(
        inputs=draw.standard_normal((40, 3)).astype(np.float32),
        statics=None,
        labels=draw.integers(0, 2, 40),
        patients=np.arange(40),
        patient_count=40,
        train=np.ones(40, dtype=bool),
    )


def reached(given: Study) -> np.ndarray:
    return unpack(train_alone(given, records(), "cpu"), build(given), given)


@pytest.mark.parametrize("model", [{}, {"trainable": "head"}])
def test_a_study_whose_model_is_an_average_over_rounds_is_compared_with_such_an_average(model: dict[str, Any]) -> None:
    models = [reached(study(rounds, **model)).astype(np.float64) for rounds in (1, 2, 3)]
    assert not np.array_equal(models[1], models[2])
    by_hand = (0.25 * models[0] + 0.5 * models[1] + models[2]) / 1.75
    assert reached(study(3, average=0.5, **model)) == pytest.approx(by_hand, rel=1e-6, abs=1e-7)


def test_a_baseline_computes_as_the_sites_rounds_do(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ways = trainer.train, []

    def train(*args: Any, **kept: Any) -> Any:
        ways.append(kept["engine"])
        return whole(*args, **kept)

    monkeypatch.setattr(trainer, "train", train)
    train_alone(study(1), records(), "cpu", engine="opacus")
    assert ways == ["opacus"]


def test_private_sums_are_compared_with_all_data_in_one_place_also_where_that_is_more_than_the_contract_expects() -> (
    None
):
    given = studies.study(
        {"name": "mlp", "hidden": 4},
        {"features": [{"name": n} for n in "abc"]},
        training={"rounds": 2, "steps_per_round": 1, "expected_batch": 19, "optimizer": {"lr": 0.5}},
        privacy={"mode": "dp", "epsilon": 5.0, "delta": 1e-2, "clipping_norm": 1.0, "sums": {"sampling_rate": 0.5}},
    )
    assert np.isfinite(reached(given)).all()
    loose = Study.model_validate({**given.contract, "privacy": {**given.contract["privacy"], "delta": 0.05}})
    with pytest.raises(ConfigurationError, match="delta"):
        reached(loose)


def test_without_an_average_it_is_the_last_rounds_model() -> None:
    first = reached(study(3))
    assert np.array_equal(first, reached(study(3)))
    assert not np.array_equal(first, reached(study(3, average=0.5)))
