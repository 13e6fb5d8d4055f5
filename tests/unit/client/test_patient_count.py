"""The number of patients leaves with noise, drawn once a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilium_client.state.patient_count import PatientCounts
from consilium_shared.errors import IntegrityError
from consilium_shared.study import Study


def studies(contract: dict[str, Any], count: int = 1) -> list[Study]:
    return [Study.model_validate({**contract, "study": f"study-{number}"}) for number in range(count)]


def test_asking_again_does_not_average_the_noise_away(tmp_path: Path, contract: dict[str, Any]) -> None:
    (study,) = studies(contract)
    first = PatientCounts(tmp_path).noised(study, 500, 1)
    assert {PatientCounts(tmp_path).noised(study, patients, 1) for patients in (500, 500, 501, 900)} == {first}


def test_the_noise_has_the_deviation_that_the_study_names_and_never_shows_fewer_than_the_minimum(
    tmp_path: Path, contract: dict[str, Any]
) -> None:
    sizes, many = PatientCounts(tmp_path), studies(contract, 400)
    noise = np.array([sizes.noised(study, 500, 1) for study in many]) - 500.0
    assert abs(noise.mean()) < 5 * 10 / np.sqrt(len(noise))
    assert noise.std() == pytest.approx(many[0].privacy.count_noise, rel=5 / np.sqrt(2 * len(noise)))
    assert min(PatientCounts(tmp_path / "few").noised(study, 51, 50) for study in many[:50]) == 50


def test_without_privacy_there_is_no_noise(tmp_path: Path, contract: dict[str, Any]) -> None:
    open_study = Study.model_validate({**contract, "privacy": {"mode": "none"}, "evaluation": {}})
    assert PatientCounts(tmp_path).noised(open_study, 123, 1) == 123
    assert not list(tmp_path.iterdir())


def test_a_damaged_number_is_not_drawn_again(tmp_path: Path, contract: dict[str, Any]) -> None:
    (study,), sizes = studies(contract), PatientCounts(tmp_path)
    sizes.noised(study, 500, 1)
    (tmp_path / f"{study.digest}.json").write_bytes(b"{")
    with pytest.raises(IntegrityError, match="damaged"):
        sizes.noised(study, 500, 1)
