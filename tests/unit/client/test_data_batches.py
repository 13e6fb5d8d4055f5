"""A table of samples read in many batches is the same data set, bit for bit, with the same report, as in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data import batches, columns, lines
from consilium_client.data.asset import TimeseriesAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.report import SetAside
from consilium_shared.errors import DataError
from consilium_shared.study import Study

VARIABLES = ("HR", "SBP", "lactate")


def study() -> Study:
    series = {"variables": [{"name": "HR", "high": 300}, *({"name": n} for n in VARIABLES[1:])], "bins": 6}
    label = {"column": "death", "classes": ["0", "1"]}
    return studies.study("gru", {"asset": "icu", "label": label, "series": {**series, "step_minutes": 60}}, name="s")


def samples(rows: int = 3000) -> pd.DataFrame:
    """Samples of forty patients, in no order: some unknown, some at no time, some no number, some spelt otherwise."""
    draw = np.random.default_rng(3)
    people = np.array([f"p{number}" for number in range(40)] + ["x1", "x2", "P3"])
    frame = pd.DataFrame(
        {
            "patient": draw.choice(people, rows),
            "time": draw.uniform(-30, 400, rows).round(2).astype(str),
            "variable": draw.choice([*VARIABLES, "hr", "glucose"], rows),
            "value": [repr(float(value)) for value in draw.normal(90, 80, rows) * 10.0 ** draw.integers(-3, 4, rows)],
        }
    )
    frame.loc[2500] = ["p1", "70.0", "lactate", "clotted"]
    frame.loc[[17, 1900], "time"] = ""
    return frame


def write(folder: Path, kind: str, frame: pd.DataFrame) -> TimeseriesAsset:
    table = folder / "labels.csv"
    table.write_text("patient,death\n" + "".join(f"p{number},{number % 2}\n" for number in range(40)))
    file = folder / f"samples.{kind}"
    frame.to_csv(file, index=False) if kind == "csv" else frame.to_parquet(file)
    return TimeseriesAsset(kind="timeseries", series=file, table=table)


def in_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make batches small; returns where their sizes go."""
    monkeypatch.setattr(lines, "_BLOCK", 1000)
    monkeypatch.setattr(columns, "BLOCK_BYTES", 100)
    monkeypatch.setattr(batches, "ROWS", 97)
    sizes: list[int] = []
    frame_of = columns.frame_of

    def counted(table: Any, text: Any) -> pd.DataFrame:
        sizes.append(table.num_rows)
        return frame_of(table, text)

    monkeypatch.setattr(columns, "frame_of", counted)
    return sizes


def counts(found: ArrayDataset) -> list[dict[str, int]]:
    return [part.counts for part in (found.report.set_aside, found.report.values, found.report.notes)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_many_batches_are_one_table(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = write(tmp_path, kind, samples())
    whole = load(asset, study())
    sizes = in_batches(monkeypatch)
    found = load(asset, study())
    assert len(sizes) > 20 and max(sizes) < 200
    np.testing.assert_array_equal(found.inputs[0], whole.inputs[0])
    np.testing.assert_array_equal(found.patients, whole.patients)
    assert counts(found) == counts(whole) and found.report.missing == whole.report.missing
    told = found.report.set_aside.counts | found.report.values.counts | found.report.notes.counts
    assert told["series record without a usable label row"] == 3
    assert told["time: missing or not a time"] == 2 and told["lactate: not a number"] == 1
    assert any("'hr', which is not 'HR'" in reason for reason in told)
    for reason, place in found.report.values.first.items():
        first = re.search(r"\d+", place.partition(",")[2]), re.search(r"\d+", whole.report.values.first[reason])
        assert first[0] is not None and first[1] is not None and first[0][0] == first[1][0]


def test_a_damaged_row_far_down_is_told_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = write(tmp_path, "csv", samples())
    text = asset.series.read_text().split("\n")
    text[2001] += ",more"
    asset.series.write_text("\n".join(text))
    in_batches(monkeypatch)
    with pytest.raises(DataError, match=r"samples\.csv, line 2002: 5 fields where the header has 4"):
        load(asset, study())


def test_repeated_text_of_one_batch_is_measured_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = samples(3000)
    frame["patient"] = "p1" + "x" * 1000
    asset = write(tmp_path, "parquet", frame)
    monkeypatch.setattr("consilium_client.data.bounds.BATCH_BYTES", 100_000)
    with pytest.raises(DataError, match="once unpacked"):
        list(batches.read_batches(asset.series, ["patient"], [], SetAside()))
