"""Suggested settings are a study that hospitals could approve, and each has a reason with a page that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from consilium_server.commands.cli import app
from consilium_shared import task
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.study import Study
from consilium_shared.suggestion import Asked

ROOT = Path(__file__).parents[3]
MEASURED = [name for name in task.names() if task.get(name).suggestion(Asked(3200, 4, 1.0)) is not None]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["suggest", *arguments])


def study_of(name: str, part: dict[str, Any]) -> Study:
    """The task's sample study with these settings in place of its own."""
    content = yaml.safe_load(task.get(name).sample.read_text())
    return Study.model_validate({**content, **part})


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("epsilon", [None, 0.5, 3.0])
def test_what_is_printed_is_a_part_of_a_study_that_a_hospital_can_afford(name: str, epsilon: float | None) -> None:
    wanted = [name, "--patients", "3200", "--sites", "20", *(["--epsilon", str(epsilon)] if epsilon else [])]
    printed = run(*wanted)
    study = study_of(name, yaml.safe_load(printed.stdout))
    plan = plan_of(study, 160)
    assert isinstance(plan, PrivacyPlan) == (epsilon is not None)
    if isinstance(plan, PrivacyPlan):
        assert study.privacy.sums is not None and plan.cost() <= plan.epsilon == epsilon
    found = json.loads(run(*wanted, "--json").stdout)
    assert found["settings"] == yaml.safe_load(printed.stdout)
    assert found["reasons"] and all((ROOT / each["source"]).is_file() and each["why"] for each in found["reasons"])


def test_the_more_noise_there_is_for_each_patient_the_lower_the_rate_and_the_more_doubts() -> None:
    much, little = (
        json.loads(run("tabular-classification", "--patients", "3200", "--json", *more).stdout)
        for more in (["--sites", "20", "--epsilon", "1"], ["--sites", "4", "--epsilon", "3"])
    )
    rates = [each["settings"]["training"]["optimizer"]["lr"] for each in (much, little)]
    assert rates[0] < rates[1]
    assert much["doubts"] and not little["doubts"]


@pytest.mark.parametrize(
    ("file", "patients"),
    [("pneumoniamnist/study-dp.yaml", 4708), ("physionet2012-summary/study.yaml", 3200)],
)
def test_the_sample_studies_have_the_settings_that_are_suggested_for_as_many_patients(file: str, patients: int) -> None:
    name, sample = file.split("/")
    study = load_yaml(task.studies()[name] / sample, Study)
    found = task.get(study.task).suggestion(Asked(patients, 4, study.privacy.epsilon))
    assert found is not None
    suggested = Study.model_validate({**study.contract, **found.part})
    for part in ("training", "privacy", "evaluation"):
        assert getattr(suggested, part).model_dump(exclude={"split", "split_column"}) == getattr(
            study, part
        ).model_dump(exclude={"split", "split_column"})
    assert suggested.model == study.model


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["tabular", "--patients", "900"], "no task 'tabular'"),
        (["survival", "--patients", "900", "--epsilon", "1"], "nothing was measured"),
        (["tabular-classification", "--patients", "39"], "fewer than ten"),
        (["tabular-classification", "--patients", "900", "--sites", "1"], "2 to"),
        (["tabular-classification", "--patients", "900", "--epsilon", "-1"], "positive"),
        (["tabular-classification", "--patients", "900", "--epsilon", "1e-9"], "ε 1e-09"),
    ],
)
def test_what_there_is_no_suggestion_for_is_said(arguments: list[str], why: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, ConfigurationError)
    assert why in str(error)
