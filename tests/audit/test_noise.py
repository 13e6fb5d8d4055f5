"""A record says how much noise its sum has, and no study goes on where some is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.audit.conftest import FOUR, PRIVATE, a_federation

from consilium_shared.protocol.records import RECORD_DOMAIN
from consilium_shared.study import Study

Evidence = Any


def a_study_of_sums(rounds: int = 3, **sums: Any) -> Study:
    return Study.model_validate(
        {
            "study": "sepsis",
            "task": "tabular-classification",
            "model": {"name": "logistic"},
            "data": {
                "asset": "icu",
                "label": {"column": "died", "classes": ["no", "yes"]},
                "features": [{"name": "age"}],
            },
            "training": {
                "rounds": rounds,
                "steps_per_round": 1,
                "expected_batch": 5000,
                "optimizer": {"name": "sgd", "lr": 0.1},
            },
            "privacy": {**PRIVATE, "noise_multiplier": 3.0, "sums": {"empty_coordinates": 1024, **sums}},
        }
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Evidence]:
    whole = a_federation(tmp_path_factory.mktemp("noise") / "f", a_study_of_sums(), FOUR, eventful=False)
    whole.verified()
    return lambda target: whole.copy(target / "evidence")


def test_sums_that_measure_the_contracts_noise_verify_and_the_report_says_so(
    measured: Callable[[Path], Evidence], tmp_path: Path
) -> None:
    found = measured(tmp_path).verified()
    assert "noise is as the contract has it (+0.0 deviations)" in found.steps[3].says


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (None, "does not say how much noise"),
        ({"coordinates": 12}, "of 12 coordinates, and 1024 are empty"),
        ({"expected": 0.75}, "expects a mean square"),
    ],
)
def test_a_record_that_tells_of_other_noise_than_contract_and_survivors_give_is_found(
    measured: Callable[[Path], Evidence], tmp_path: Path, changed: dict[str, Any] | None, why: str
) -> None:
    evidence = measured(tmp_path)
    noise = evidence.body(evidence.record(3))["noise"]
    scaled = {key: noise[key] * value if key == "expected" else value for key, value in (changed or {}).items()}
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, noise=None if changed is None else {**noise, **scaled})
    assert why in evidence.fails(4, evidence.record(3))


def test_a_study_that_went_on_after_a_sum_without_a_sites_noise_is_found(
    measured: Callable[[Path], Evidence], tmp_path: Path
) -> None:
    evidence = measured(tmp_path)
    noise = evidence.body(evidence.record(2))["noise"]
    evidence.resign(r2={"noise": {**noise, "found": 0.75 * noise["expected"]}})
    assert "the study went on although" in evidence.fails(4, evidence.record(3))
