"""A public rate of the outcome is what the untrained model predicts on average, in whatever model the task has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support import studies
from tests.support.published import IMAGE, SERIES, TABLE

from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.models.vector import to_vector
from consilium_shared.study import Study


def study(model: str, data: dict[str, Any], prior: list[float] | None) -> Study:
    label = {"column": "y", "classes": ["0", "1"], **({} if prior is None else {"prior": prior})}
    return studies.study({"name": model, "hidden": 8}, {**data, "label": label})


@pytest.mark.parametrize(
    ("name", "data"), [("logistic", TABLE), ("mlp", TABLE), ("small-cnn", IMAGE), ("gru", SERIES), ("lstm", SERIES)]
)
def test_an_untrained_model_predicts_about_the_public_rate(name: str, data: dict[str, Any]) -> None:
    given, without = study(name, data, [0.86, 0.14]), study(name, data, None)
    inputs = task.of(given).invented(given, 64, np.random.default_rng(0)).inputs
    with torch.no_grad():
        found = torch.softmax(build(given).eval()(*map(torch.from_numpy, inputs)), dim=1).mean(0)
    assert float(found[1]) == pytest.approx(0.14, abs=0.06)
    differ = to_vector(build(given)) != to_vector(build(without))
    assert 1 <= differ.sum() <= 2, "the last bias alone"


@pytest.mark.parametrize("prior", [[0.5], [0.5, 0.3], [0.9, 0.05, 0.05], [1.0, 0.0]])
def test_rates_that_are_none_are_refused(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="prior"):
        study("logistic", TABLE, prior)


def test_a_contract_without_the_key_begins_as_before() -> None:
    given = study("logistic", TABLE, None)
    assert given.contract["data"]["label"]["prior"] is None
    old = given.contract
    del old["data"]["label"]["prior"]
    assert np.array_equal(to_vector(build(Study.from_contract(old))), to_vector(build(given)))
