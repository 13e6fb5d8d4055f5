"""A study's file is checked without a server: its digest is the one that would be approved, a mistake has its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from consilium_server.commands.cli import app
from consilium_shared import study_file
from consilium_shared.errors import ConfigurationError

SAMPLE = Path(__file__).parents[3] / "shared/consilium_tasks/tabular_classification/studies/heart-disease/study-dp.yaml"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["study", "check", *arguments])


def test_the_digest_is_the_contracts_and_the_plan_that_of_a_hospital() -> None:
    found = json.loads(run(str(SAMPLE), "--json", "--patients", "500", "--patients", "4", "--sites", "4").stdout)
    study = study_file.read(SAMPLE)
    assert (found["digest"], found["rounds"]) == (study.digest, study.training.rounds)
    assert found["least_sites"] == 4
    few, none = found["plans"]
    assert few["epsilon"] <= 3.0 and few["noise_multiplier"] > 0
    assert none["patients"] == 4 and "sampling" in none.get("why", "sampling")
    text = run(str(SAMPLE)).stdout
    assert study.digest in text.replace("\n", "") and "what it asks of a hospital" in text


def test_a_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(SAMPLE.read_text().replace("rounds:", "runds:"))
    with pytest.raises(ConfigurationError, match=r"study.yaml:\d+: .*runds"):
        raise run(str(file)).exception
