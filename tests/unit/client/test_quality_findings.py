"""`data check` warns where a person would, and stays silent where a person would."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.datasets import load
from typer.testing import CliRunner

from consilium_client.commands.cli import app
from consilium_client.data.asset import TableAsset
from consilium_client.data.profile import SAMPLE, Profile
from consilium_client.quality.fit import Finding, findings
from consilium_shared.inputs import Numeric
from consilium_shared.study import Study

GLUCOSE = {"name": "glucose", "center": 120, "scale": 40, "low": 20, "high": 1000}
CONTRACT: dict[str, Any] = {
    "study": "ward-study",
    "task": "tabular-classification",
    "model": {"name": "logistic"},
    "data": {
        "asset": "ward",
        "label": {"column": "ill", "classes": ["no", "yes"]},
        "features": [GLUCOSE, {"name": "chol", "center": 200, "scale": 50}],
        "missing": "center",
    },
    "training": {"rounds": 1, "steps_per_round": 1, "expected_batch": 8, "optimizer": {"lr": 1.0}},
    "privacy": {"mode": "none"},
}
STUDY = Study.model_validate(CONTRACT)
SITE = """
site: hospital-a
assets: {ward: {kind: table, path: ward.csv}}
policy: {budgets: {ward: {epsilon: 1.0, delta: 1.0e-5}}, minimum_patients: 10}
"""


def ward(count: int = 60) -> dict[str, list[str]]:
    """Columns of a table that fits the study, each person once."""
    draw = np.random.default_rng(5)
    return {
        "patient": [f"p{number}" for number in range(count)],
        "glucose": [f"{value:.1f}" for value in draw.normal(125, 35, count).clip(50)],
        "chol": [f"{value:.0f}" for value in draw.normal(205, 45, count).clip(90)],
        "ill": ["yes" if number % 3 else "no" for number in range(count)],
    }


def written(folder: Path, columns: dict[str, list[str]]) -> TableAsset:
    rows = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    (folder / "ward.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return TableAsset(kind="table", path=folder / "ward.csv")


def found(folder: Path, columns: dict[str, list[str]], minimum: int = 10) -> list[Finding]:
    return findings(STUDY, load(written(folder, columns), STUDY), minimum)


def test_data_that_fits_gives_no_warning(tmp_path: Path) -> None:
    assert found(tmp_path, ward()) == []


def times(column: str, factor: float, every: int = 1) -> dict[str, list[str]]:
    made = ward(120)
    made[column] = [
        f"{float(value) * factor:.2f}" if number % every == 0 else value for number, value in enumerate(made[column])
    ]
    return made


def replaced(column: str, value: str, every: int = 1) -> dict[str, list[str]]:
    made = ward()
    made[column] = [value if number % every == 0 else old for number, old in enumerate(made[column])]
    return made


@pytest.mark.parametrize(
    ("columns", "where", "says", "level"),
    [
        (times("glucose", 1 / 18.0156), "glucose", "as if in mmol/L in place of mg/dL", "misfit"),
        (times("chol", 1 / 38.665), "chol", "as if in mmol/L in place of mg/dL", "misfit"),
        (times("chol", 10), "chol", "one 10 times as large", "misfit"),
        (times("glucose", 1 / 18.0156, every=4), "glucose", "were they in mmol/L", "odd"),
        (replaced("chol", "0", every=7), "chol", "values are 0", "odd"),
        (replaced("chol", "-999", every=9), "chol", "values are -999", "odd"),
        (replaced("chol", "180"), "chol", "all 60 values are 180", "odd"),
        (replaced("chol", ""), "chol", "no record has a usable value", "misfit"),
        (replaced("ill", "no"), "classes", "only records of no", "misfit"),
        (replaced("ill", "maybe", every=5), "ill", "12 of 60 rows say 'maybe'", "odd"),
        (replaced("glucose", "5000", every=3), "glucose", "33.3% of the values are outside 20 … 1000", "odd"),
        (ward(9), "patients", "fewer than minimum_patients (10)", "misfit"),
    ],
    ids=str,
)
def test_each_trap_is_named_where_it_is(
    tmp_path: Path, columns: dict[str, list[str]], where: str, says: str, level: str
) -> None:
    told = [each for each in found(tmp_path, columns) if each.where == where and says in each.what]
    assert [each.level for each in told] == [level]


def test_a_placeholder_for_many_people_is_told(tmp_path: Path) -> None:
    columns = ward(90)
    columns["patient"] = ["ANONYMOUS" if number < 40 else name for number, name in enumerate(columns["patient"])]
    assert any("one patient has 40 records" in each.what for each in found(tmp_path, columns))


def test_a_profile_in_pieces_is_that_of_the_whole_and_keeps_a_bounded_sample() -> None:
    age, values = Numeric(name="age", low=20, high=80), np.random.default_rng(2).normal(50, 20, 90_001)
    values[::50] = np.nan
    whole, pieces = Profile(), Profile()
    whole.numbers(age, values)
    for piece in np.array_split(values, 37):
        pieces.numbers(age, piece)
    for spread in (whole.spreads()[0], pieces.spreads()[0]):
        assert (spread.rows, spread.values) == (len(values), np.isfinite(values).sum())
        assert (spread.below, spread.above) == ((values < 20).sum(), (values > 80).sum())
        assert (spread.low, spread.high) == (np.nanmin(values), np.nanmax(values))
        assert SAMPLE / 2 < len(spread.sample) <= 2 * SAMPLE
        assert abs(spread.median - np.nanmedian(values)) < 0.5


def test_the_page_is_for_this_account_alone_and_needs_nothing_else(tmp_path: Path) -> None:
    columns = ward()
    columns["ill"][4] = "<script>alert(1)</script>"
    twin = {name: [*values, values[0]] for name, values in columns.items()}
    twin["patient"][-1] = "somebody-else"
    written(tmp_path, twin)
    (tmp_path / "site.yaml").write_text(SITE, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(json.dumps(CONTRACT), encoding="utf-8")
    command = ["data", "check", str(tmp_path / "study.yaml"), "--home", str(tmp_path)]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    page = tmp_path / "data-check" / "ward-ward-study.html"
    assert (page.stat().st_mode & 0o777, page.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert max(map(len, shown.stdout.replace(str(page), "").splitlines())) <= 80
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://|@import|url\(", text)
    report = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert report["alike"]["patients"] == 2
    assert report["variables"]["glucose"]["values"] == 60
    assert report["page"] == str(page)
    for name in ("p17", "somebody-else"):
        assert name not in text + shown.stdout
