"""`data check` shows a site's people where everything is that is not as it should be; the agent's log never does."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from click.testing import Result
from tests.support.datasets import load
from typer.testing import CliRunner

from consilium_client.agent.refusals import reason_of
from consilium_client.commands.cli import app
from consilium_client.data.asset import TableAsset
from consilium_client.data.report import NothingUsable
from consilium_shared.config import load_yaml
from consilium_shared.study import Study

SITE = """
site: hospital-a
assets:
  ward: {kind: table, path: ward.csv}
  other: {kind: table, path: other.csv}
policy: {budgets: {ward: {epsilon: 1.0, delta: 1.0e-5}}}
"""
STUDY = """
study: ward-study
task: tabular-classification
model: {name: logistic}
data:
  asset: ward
  label: {column: ill, classes: ["0", "1"]}
  features: [{name: age, center: 50, scale: 10, low: 0, high: 120}]
  missing: center
training: {rounds: 1, steps_per_round: 1, expected_batch: 1, optimizer: {lr: 1.0}}
privacy: {mode: none}
"""
WARD = 'patient,age,ill,note\nSECRET-1,60,0,"a\nb"\nsecret-1,61,1,\nnan,50,0,\n7.0,150,1,\n7,x,0,\n'
NOBODY = "patient,age,ill\nnan,60,0\n1.2E+07,61,1\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, text in {"site.yaml": SITE, "study.yaml": STUDY, "ward.csv": WARD, "other.csv": NOBODY}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def check(home: Path, *options: str) -> Result:
    wide = {"COLUMNS": "300"}
    return CliRunner().invoke(app, ["data", "check", str(home / "study.yaml"), "--home", str(home), *options], env=wide)


def test_every_reason_comes_with_its_lines(home: Path) -> None:
    shown = check(home, "--json")
    report = json.loads(shown.stdout)
    assert (report["records"], report["patients"]) == (4, 3)
    assert [line for _, line in report["set_aside"].values()] == ["ward.csv, line 5"]
    assert report["values_set_aside"] == {
        "age: not a number": [1, "ward.csv, line 7"],
        "age: outside 0 … 120": [1, "ward.csv, line 6"],
    }
    assert sorted(line for _, line in report["notes"].values()) == ["ward.csv, line 2", "ward.csv, lines 2, 4"]
    assert "secret" not in shown.stdout.lower()
    for title in ("Set aside", "Values taken as missing", "Used, but look at it"):
        assert title in check(home).stdout


def test_another_asset_is_shown_under_its_own_name_and_says_why_nothing_is_left(home: Path) -> None:
    shown = check(home, "--asset", "other")
    assert isinstance(shown.exception, NothingUsable)
    assert "other.csv, line 2" in shown.stdout
    assert "other.csv, line 3" in shown.stdout
    assert not check(home, "--asset", "other", "--json").stdout
    (home / "other.csv").write_text("patient,age,ill\na,60,0\n", encoding="utf-8")
    assert json.loads(check(home, "--asset", "other", "--json").stdout)["asset"] == "other"


def test_the_agents_log_of_the_same_has_reasons_and_counts_alone(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    asset, study = TableAsset(kind="table", path=home / "other.csv"), load_yaml(home / "study.yaml", Study)
    with pytest.raises(NothingUsable) as error:
        load(asset, study)
    with caplog.at_level(logging.DEBUG):
        code, sentence = reason_of(error.value)
    assert (code, sentence) == ("data", "the site's data cannot be used as the study asks")
    assert "1 × label table: patient is a number with an exponent" in caplog.text
    assert "1.2E+07" not in caplog.text
    assert "line 3" not in caplog.text


ODD = [
    "nan,60,1,1", "1.2E+11,60,1,1", "007,60,1,1", "7.0,60,1,1", ",60,1,1", "p1,60,1,1", "P1,1e300,1,1", "b,x,1,maybe",
    "\ufeffz,60,9,0", "p1\u200b,200,1,1", 'q,60,1,0"', '"r, s",60,1,0', '"r\ns",60,1,0', "unknown,,,",
]  # fmt: skip


@pytest.mark.parametrize("row", ODD)
@pytest.mark.parametrize("first", [True, False])
def test_whatever_one_persons_row_says_nobody_elses_record_changes(home: Path, row: str, first: bool) -> None:
    """One person more or less changes that person's unit alone: what the privacy guarantee is about."""
    others = ["a,41,1,0", "7,52,1,1", "c,63,1,0"]
    asset, study = TableAsset(kind="table", path=home / "ward.csv"), load_yaml(home / "study.yaml", Study)

    def records(rows: list[str]) -> list[tuple[float, int, bool]]:
        (home / "ward.csv").write_text("patient,age,x,ill\n" + "\n".join(rows) + "\n", encoding="utf-8")
        found = load(asset, study)
        train = found.train[found.patients]
        return [(float(x[0]), int(y), bool(t)) for x, y, t in zip(found.inputs[0], found.labels[0], train, strict=True)]

    alone = records(others)
    both = records([row, *others] if first else [*others, row])
    assert len(alone) == 3
    assert [each for each in both if each in alone] == alone
    assert len(both) <= len(alone) + 1
