"""Irregular samples become bins: value, mask and time since the last sample, each record from itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import TimeseriesAsset
from consilium_client.data.timeseries import fill
from consilium_shared import limits
from consilium_shared.errors import DataError
from consilium_shared.study import Study
from consilium_tasks.classification.schema import Data


def study(statics: list[dict[str, Any]] | None = None, missing: str = "refuse") -> Study:
    return studies.study(
        "gru",
        {
            "asset": "icu",
            "label": {"column": "death", "classes": ["0", "1"]},
            "missing": missing,
            "series": {
                "variables": [
                    {"name": "HR", "center": 80, "scale": 10, "low": 20, "high": 300},
                    {"name": "SBP", "center": 120, "scale": 20},
                ],
                "bins": 4,
                "step_minutes": 60,
                "statics": statics or [],
            },
        },
        name="series",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
    )


def asset(folder: Path, series: str, table: str, **options: Any) -> TimeseriesAsset:
    (folder / "series.csv").write_text(series, encoding="utf-8")
    (folder / "table.csv").write_text(table, encoding="utf-8")
    spec = {"kind": "timeseries", "series": "series.csv", "table": "table.csv", **options}
    return TimeseriesAsset.model_validate(spec, strict=False).at(folder)


LONG = "patient,time,variable,value\na,0,HR,90\na,59,HR,70\na,130,HR,100\na,61,SBP,140\nb,10,HR,80\n"
TABLE = "patient,death,age\na,1,60\nb,0,\n"


def test_a_bin_holds_the_mean_then_the_last_known_value_with_mask_and_gap(tmp_path: Path) -> None:
    records = load(asset(tmp_path, LONG, TABLE), study())
    heart_rate, pressure = records.inputs[0][0][:, ::2].T, records.inputs[0][0][:, 1::2].T
    np.testing.assert_allclose(heart_rate, np.array([[0, 0, 2, 2], [1, 0, 1, 0], [0, 0.25, 0, 0.25]]))
    np.testing.assert_allclose(pressure, np.array([[0, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0.25, 0.5]]))
    assert records.inputs[0].dtype == np.float32
    assert records.labels[0].tolist() == [1, 0]
    assert records.report.missing == {"HR": 0, "SBP": 1}


def test_more_than_fits_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statics = [{"name": "age", "center": 60, "scale": 10}]
    needed = 2 * (4 * 3 * 2 + 1) * 4
    monkeypatch.setattr(limits, "INPUT_BYTES", needed)
    load(asset(tmp_path, LONG, TABLE), study(statics, missing="center"))
    monkeypatch.setattr(limits, "INPUT_BYTES", needed - 1)
    with pytest.raises(DataError, match="GiB of memory"):
        load(asset(tmp_path, LONG, TABLE), study(statics, missing="center"))


def test_wide_and_long_layouts_give_the_same_records(tmp_path: Path) -> None:
    wide = "patient,time,HR,SBP\nb,10,80,\na,130,100,\na,0,90,?\na,59,70,\na,61,,140\n"
    other = load(asset(tmp_path, wide, TABLE, layout="wide"), study())
    np.testing.assert_array_equal(other.inputs[0], load(asset(tmp_path, LONG, TABLE), study()).inputs[0])


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    head, *rows = LONG.strip().split("\n")
    turned = "\n".join([head, *reversed(rows)]) + "\n"
    expected = load(asset(tmp_path, LONG, TABLE), study()).inputs[0]
    np.testing.assert_array_equal(load(asset(tmp_path, turned, TABLE), study()).inputs[0], expected)


@pytest.mark.parametrize(("unit", "factor"), [("seconds", 60.0), ("hours", 1 / 60), ("days", 1 / 1440)])
def test_times_are_read_in_the_unit_of_the_site(tmp_path: Path, unit: str, factor: float) -> None:
    expected = load(asset(tmp_path, LONG, TABLE), study()).inputs[0]
    head, *rows = (line.split(",") for line in LONG.strip().split("\n"))
    text = "\n".join(",".join(row) for row in [head, *([p, repr(float(t) * factor), v, x] for p, t, v, x in rows)])
    np.testing.assert_array_equal(load(asset(tmp_path, text, TABLE, time_unit=unit), study()).inputs[0], expected)


def test_timestamps_count_from_the_start_in_the_label_table(tmp_path: Path) -> None:
    series = (
        "patient,time,variable,value\na,2024-03-01T10:30:00,HR,90\na,2024-03-01T12:00:00+00:00,HR,70\na,soon,HR,1\n"
    )
    table = "patient,death,admitted\na,1,2024-03-01T10:00:00\n"
    records = load(asset(tmp_path, series, table, time_unit="timestamp", start="admitted"), study())
    np.testing.assert_array_equal(records.inputs[0][0, :, 2], [1, 0, 1, 0])
    assert records.report.values.counts == {"time: missing or not a time": 1}


@pytest.mark.parametrize("moment", ["2500-01-01T00:00:00", "0001-01-01T00:00:00", "2024-03-01T10:30:00.123456789"])
def test_a_moment_of_one_patient_changes_nothing_of_another(tmp_path: Path, moment: str) -> None:
    """Neither one that no clock shows, as de-identified dates may be, nor one that is finer than the others."""
    series = "patient,time,variable,value\na,2024-03-01T10:30:00,HR,90\na,2024-03-01T12:00:00,HR,70\n"
    table = "patient,death,admitted\na,1,2024-03-01T10:00:00\n"
    about = {"time_unit": "timestamp", "start": "admitted"}
    (tmp_path / "alone").mkdir()
    alone = load(asset(tmp_path / "alone", series, table, **about), study())
    beside = load(
        asset(tmp_path, f"{series}b,2024-03-01T11:00:00,HR,60\nb,{moment},HR,60\n", f"{table}b,0,{moment}\n", **about),
        study(),
    )
    np.testing.assert_array_equal(beside.inputs[0][0], alone.inputs[0][0])
    np.testing.assert_array_equal(beside.patients == 0, np.arange(len(beside)) == 0)


def test_unusable_samples_are_counted_and_leave_no_trace(tmp_path: Path) -> None:
    bad = "a,240,HR,85\na,-1,HR,85\na,x,HR,85\na,70,HR,5\na,70,HR,fast\n,70,HR,85\nc,70,HR,85\nc,71,HR,85\na,70,RR,12\n"
    records = load(asset(tmp_path, LONG + bad, TABLE), study())
    np.testing.assert_array_equal(records.inputs[0], load(asset(tmp_path, LONG, TABLE), study()).inputs[0])
    assert records.report.values.counts == {
        "time: outside the study's window": 2,
        "time: missing or not a time": 1,
        "HR: outside 20 … 300": 1,
        "HR: not a number": 1,
    }
    assert records.report.set_aside.counts == {
        "sample without a patient or record": 1,
        "series record without a usable label row": 1,
    }


def test_a_record_without_samples_is_set_aside(tmp_path: Path) -> None:
    records = load(asset(tmp_path, LONG, TABLE + "c,0,50\n"), study())
    assert len(records) == 2
    assert records.report.set_aside.counts == {"no sample in the series table": 1}
    assert records.report.set_aside.first == {"no sample in the series table": "table.csv, line 4"}


def test_statics_follow_the_studys_rule_for_missing_values(tmp_path: Path) -> None:
    statics = [{"name": "age", "center": 50, "scale": 10}]
    refused = load(asset(tmp_path, LONG, TABLE), study(statics))
    assert (len(refused), refused.report.set_aside.counts) == (
        1,
        {"a static value is missing (the study refuses such records)": 1},
    )
    centered = load(asset(tmp_path, LONG, TABLE), study(statics, missing="center"))
    np.testing.assert_array_equal(centered.inputs[1], [[1.0], [0.0]])


def test_records_of_one_patient_are_told_apart_and_belong_to_that_patient(tmp_path: Path) -> None:
    series = "patient,stay,time,variable,value\na,1,0,HR,90\na,2,0,HR,70\nb,1,0,HR,80\n"
    table = "patient,stay,death\na,1,0\na,2,1\nb,1,0\n"
    records = load(asset(tmp_path, series, table, record="stay"), study())
    np.testing.assert_allclose(records.inputs[0][:, 0, 0], [1, -1, 0])
    assert records.patients.tolist() == [0, 0, 1]
    assert records.labels[0].tolist() == [0, 1, 0]


def test_samples_at_a_fraction_of_a_second_fall_each_into_their_own_bin(tmp_path: Path) -> None:
    data = study().data
    assert isinstance(data, Data) and data.series is not None
    series = data.series
    fast = study().model_copy(
        update={
            "data": study().data.model_copy(
                update={"series": series.model_copy(update={"bins": 128, "step_minutes": 1 / 180 / 60})}
            )
        }
    )
    frame = pd.DataFrame({"patient": "a", "time": (np.arange(128) / 180).astype(np.float32), "HR": 80.0, "SBP": 120.0})
    frame.to_parquet(tmp_path / "s.parquet")
    spec = asset(tmp_path, LONG, TABLE, layout="wide", time_unit="seconds")
    records = load(spec.model_copy(update={"series": tmp_path / "s.parquet"}), fast)
    assert records.inputs[0][0, :, 2].all()


def test_no_usable_record_is_a_data_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable record; .*no usable sample") as error:
        load(asset(tmp_path, "patient,time,variable,value\nSECRET,0,HR,900\n", "patient,death\nSECRET,1\n"), study())
    assert "SECRET" not in str(error.value)


def test_timestamps_need_a_start_and_a_start_needs_timestamps() -> None:
    for options in ({"time_unit": "timestamp"}, {"start": "admitted"}):
        with pytest.raises(ValueError, match="start"):
            TimeseriesAsset.model_validate({"kind": "timeseries", "series": "s", "table": "t", **options})


def test_filling_agrees_with_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    record, bin_ = generator.integers(0, 7, 60), generator.integers(0, 9, 60)
    value = generator.normal(size=60)
    total, count = np.zeros((7, 9)), np.zeros((7, 9), dtype=np.int32)
    np.add.at(total, (record, bin_), value)
    np.add.at(count, (record, bin_), 1)
    held, mask, gap = fill(total, count)
    for r in range(7):
        last, known = None, 0.0
        for b in range(9):
            here = value[(record == r) & (bin_ == b)]
            if len(here):
                last, known = b, here.mean()
            assert mask[r, b] == bool(len(here))
            assert held[r, b] == pytest.approx(known)
            assert gap[r, b] == pytest.approx(1.0 if last is None else (b - last) / 9)
