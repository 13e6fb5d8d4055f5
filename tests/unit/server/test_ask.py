"""``consilium-server ask``: the answer of a question that was asked, from its published table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import published
from typer.testing import CliRunner

from consilium_server import registry
from consilium_server.commands.cli import app
from consilium_server.federation import Home
from consilium_server.state.study_folder import StudyFolder, folder
from consilium_shared import study_file, task
from consilium_shared.errors import ConfigurationError, ConsiliumError
from consilium_shared.models.vector import pack
from consilium_shared.study import Study

SAMPLE = task.get("cross-table").sample


@pytest.fixture
def study() -> Study:
    return study_file.read(SAMPLE)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return published.coordinator(tmp_path)


def answered(home: Home, study: Study, monkeypatch: pytest.MonkeyPatch, implausible: str | None = None) -> None:
    """A finished study, whose table has 40 patients in each cell."""
    weights = np.full(21, 0.1, np.float32)
    records: list[dict[str, Any]] = [published.record() | {"implausible": implausible, "metrics": None}]
    registry.publish(home, study, home.roster(), pack(weights, study), records, {})
    made = folder(home, study.study)
    made.create(study, home.roster_file.read_bytes())
    made.set_state("finished")
    monkeypatch.setattr(StudyFolder, "records", lambda *_: records)


def test_an_answered_question_is_shown_again_without_the_server(
    home: Home, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(home, study, monkeypatch)
    page = tmp_path / "answer.html"
    done = CliRunner().invoke(app, ["ask", study.study, "--home", str(home.root), "--json", "--page", str(page)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["sites"] == 2
    assert [table["name"] for table in found["tables"]] == ["everybody", "age", "sex"]
    assert all(count == pytest.approx(40) for table in found["tables"] for row in table["counts"] for count in row)
    text = page.read_text(encoding="utf-8")
    assert "0.25 to &lt; 0.5" in text
    assert "http" not in text


def test_a_study_that_trains_a_model_is_no_question(home: Home) -> None:
    other = task.get("survival").sample
    done = CliRunner().invoke(app, ["ask", str(other), "--home", str(home.root)])
    assert isinstance(done.exception, ConfigurationError)
    assert "is no question" in str(done.exception)


def test_an_implausible_sum_is_no_answer(home: Home, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(home, study, monkeypatch, "a sum too long")
    done = CliRunner().invoke(app, ["ask", study.study, "--home", str(home.root)])
    assert isinstance(done.exception, ConsiliumError)
    assert "a sum too long" in str(done.exception)


def test_a_question_that_waits_has_no_answer(home: Home, study: Study) -> None:
    folder(home, study.study).create(study, home.roster_file.read_bytes())
    done = CliRunner().invoke(app, ["ask", study.study, "--home", str(home.root)])
    assert isinstance(done.exception, ConfigurationError)
    assert "has no answer" in str(done.exception)
