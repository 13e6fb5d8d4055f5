"""One person is one unit however files write the identifier, or is set aside; what is nearly the same is told."""

from __future__ import annotations

import logging
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import TableAsset, TimeseriesAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.identity import EXPONENT, NOTHING, canonical, near, strangers
from consilium_client.data.report import NothingUsable
from consilium_client.quality.assessment import assess, reasons
from consilium_shared.errors import DataError
from consilium_shared.study import Study

AGE = {"name": "age", "center": 50, "scale": 10}


def study(**data: Any) -> Study:
    return studies.study(
        "gru" if "series" in data else "logistic",
        {"asset": "ward", "label": {"column": "ill", "classes": ["0", "1"]}, **data},
        name="people",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
    )


TABULAR = study(features=[AGE])
SERIES = study(series={"variables": [{"name": "HR", "center": 80, "scale": 10}], "bins": 2, "step_minutes": 60})


def table(folder: Path, identifiers: list[str]) -> ArrayDataset:
    rows = "".join(f'"{name}",{n},0\n' for n, name in enumerate(identifiers))
    (folder / "t.csv").write_text(f"patient,age,ill\n{rows}", encoding="utf-8")
    return load(TableAsset(kind="table", path=folder / "t.csv"), TABULAR)


SPELLINGS = [
    ("7", ["7.0", "7.00", " 7", "7\u00a0", "\ufeff7", "7\u200b", "7\x00", "7\u2060"]),
    ("007", ["007.0", "\u200e007"]),
    ("Müller 3", ["Mu\u0308ller 3", "Müller \u200b 3", "Müller\u00a03", "Müller  3", "Mül\u00adler 3", "Müller\t3"]),
]


@pytest.mark.parametrize(("name", "others"), SPELLINGS)
def test_spellings_of_one_identifier_are_one_patient_in_one_part(tmp_path: Path, name: str, others: list[str]) -> None:
    alone = table(tmp_path, [name])
    records = table(tmp_path, [name, *others])
    assert (len(records), records.patient_count) == (len(others) + 1, 1)
    assert records.train.tolist() == alone.train.tolist()
    for other in others:
        assert table(tmp_path, [other]).train.tolist() == alone.train.tolist()


def test_halves_of_a_merged_export_are_one_unit(tmp_path: Path) -> None:
    records = table(tmp_path, [f"{n}{end}" for end in ("", ".0") for n in range(100)])
    assert records.patient_count == 100
    assert records.patients.tolist() == [*range(100), *range(100)]
    assert not records.report.notes.counts


@pytest.mark.parametrize(
    "word", ["nan", "NaN", "NULL", "None", "NA", "n/a", "#N/A", "<NA>", "NaT", "unknown", "Unknown ", "-", "\u200b"]
)
def test_a_word_for_nothing_is_nobodys_identifier(tmp_path: Path, word: str) -> None:
    records = table(tmp_path, [word, "a", word])
    assert records.patient_count == 1
    assert dict(records.report.set_aside.counts) == {f"label table: patient is {NOTHING}": 2}
    assert list(records.report.set_aside.first.values()) == ["t.csv, lines 2, 4"]


def test_a_word_in_one_patients_row_changes_no_other_patients_records(tmp_path: Path) -> None:
    """A column with a word in it is read as text, in which 60 and 60.0 differ."""
    found = []
    for more in ("", "b,soon,0\nb,50,0\n"):
        (tmp_path / "t.csv").write_text(f"patient,age,ill\na,60,1\na,60.0,1\n{more}", encoding="utf-8")
        found.append(load(TableAsset(kind="table", path=tmp_path / "t.csv"), TABULAR))
    assert [int((each.patients == 0).sum()) for each in found] == [1, 1]


def test_identifiers_that_lost_their_last_digits_are_set_aside(tmp_path: Path) -> None:
    records = table(tmp_path, ["1.23457E+11", "1.23457E+11", "1,2e+05", "12E5", "a"])
    assert records.patient_count == 2
    assert dict(records.report.set_aside.counts) == {f"label table: patient is {EXPONENT}": 3}
    kept, lost = 2.0**53 - 1, 2.0**53
    frame = {"patient": pa.array([kept, lost, None, 3.0]), "age": [1.0] * 4, "ill": [0] * 4}
    pq.write_table(pa.table(frame), tmp_path / "t.parquet")
    records = load(TableAsset(kind="table", path=tmp_path / "t.parquet"), TABULAR)
    assert records.patient_count == 2
    assert dict(records.report.set_aside.counts) == {
        "label table: no patient": 1,
        f"label table: patient is {EXPONENT}": 1,
    }
    assert records.report.set_aside.first["label table: no patient"] == "t.parquet, row 3"


def test_identifiers_that_are_nearly_the_same_stay_apart_and_are_told(tmp_path: Path) -> None:
    records = table(tmp_path, ["00123", "123", "b", "A7", "a7", "x\u00a0y", "xy", "c"])
    assert records.patient_count == 8
    (told,) = records.report.notes.counts.items()
    assert told == ("patients alike but for leading zeros, case, blanks or width: counted apart", 6)
    assert list(records.report.notes.first.values()) == ["t.csv, lines 2, 3, 5, 6, 7, …"]
    tables = {each.title: each.rows for each in assess(records, TABULAR).tables()}
    assert tables["Used, but look at it"] == ((told[0], "6", "t.csv, lines 2, 3, 5, 6, 7, …"),)


def series(folder: Path, samples: str, labels: str, **options: Any) -> ArrayDataset:
    (folder / "s.csv").write_text(samples, encoding="utf-8")
    (folder / "l.csv").write_text(labels, encoding="utf-8")
    spec = {"kind": "timeseries", "series": "s.csv", "table": "l.csv", **options}
    return load(TimeseriesAsset.model_validate(spec, strict=False).at(folder), SERIES)


def test_two_tables_link_whatever_each_makes_of_a_number(tmp_path: Path) -> None:
    samples = "patient,stay,time,variable,value\n7,1,0,HR,90\n8.0,2.0,0,HR,70\nnan,1,0,HR,1\n1E+05,1,0,HR,1\n"
    records = series(tmp_path, samples, "patient,stay,ill\n7.0,1.0,0\n8,2,1\n", record="stay")
    assert (len(records), records.patient_count) == (2, 2)
    assert dict(records.report.set_aside.counts) == {
        f"sample whose patient is {NOTHING}": 1,
        f"sample whose patient is {EXPONENT}": 1,
    }
    assert list(records.report.set_aside.first.values()) == ["s.csv, line 4", "s.csv, line 5"]


def test_a_series_that_would_link_without_leading_zeros_says_so(tmp_path: Path) -> None:
    samples = "patient,time,variable,value\na,0,HR,90\n123,0,HR,70\n123,9,HR,70\nzz,0,HR,70\n"
    records = series(tmp_path, samples, "patient,ill\na,0\n00123,1\n")
    assert dict(records.report.set_aside.counts) == {
        "series record without a usable label row": 2,
        "no sample in the series table": 1,
    }
    assert records.report.set_aside.first["series record without a usable label row"] == "s.csv, lines 3, 5"
    what = "patients of s.csv that would match the label table without leading zeros, case or blanks"
    assert (dict(records.report.notes.counts), dict(records.report.notes.first)) == ({what: 1}, {what: "s.csv, line 3"})


@given(st.text(max_size=12))
def test_an_identifier_has_one_spelling(word: str) -> None:
    one = canonical(word)
    assert canonical(one) == one
    assert canonical(f" \ufeff{word}\u00a0") == one
    assert canonical(unicodedata.normalize("NFD", word)) == one or canonical(unicodedata.normalize("NFC", word)) == one


def test_where_nothing_is_usable_the_places_are_for_the_screen_and_not_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(NothingUsable) as error:
        table(tmp_path, ["nan", "1E+07", "nan"])
    assert "line" not in str(error.value).removeprefix(str(tmp_path))
    (shown,) = reasons(error.value, TABULAR)
    assert [row[1:] for row in shown.rows] == [("2", "t.csv, lines 2, 4"), ("1", "t.csv, line 3")]


def test_near_ones_are_sought_among_different_ones_only() -> None:
    assert near(["1", "1", "01", "2"]) == [["1", "01"]]
    assert strangers(["01", "1", "3"], ["1", "2"]) == ["01"]
    assert near(["10", "1", "100", "A-1", "B-1"]) == []


def test_no_identifier_reaches_an_error_a_log_or_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        records = table(tmp_path, ["SECRET1", "secret01", "9.9E+09", "nan"])
        with pytest.raises(DataError) as error:
            table(tmp_path, ["9.9E+09", "nan"])
    assert str(error.value).endswith(f"1 × label table: patient is {NOTHING}; 1 × label table: patient is {EXPONENT}")
    for text in (str(error.value), caplog.text, str(assess(records, TABULAR).to_json())):
        assert "secret" not in text.lower()
        assert "9.9E+09" not in text


@pytest.mark.parametrize("value", ["1e308", "-1e40", "4e39"])
def test_a_value_that_32_bits_cannot_hold_is_missing_and_counted(tmp_path: Path, value: str) -> None:
    (tmp_path / "t.csv").write_text(f"patient,age,ill\na,{value},0\nb,60,1\nc,1e38,1\n", encoding="utf-8")
    records = load(TableAsset(kind="table", path=tmp_path / "t.csv"), TABULAR)
    assert dict(records.report.values.counts) == {"age: too large for a 32-bit number": 1}
    assert dict(records.report.values.first) == {"age: too large for a 32-bit number": "t.csv, line 2"}
    assert len(records) == 2
    assert pd.notna(records.inputs[0]).all() and (abs(records.inputs[0]) < float("inf")).all()


@pytest.mark.parametrize(
    ("start", "time", "sampled"),
    [
        ("2024-03-01T10:00:00", "2024-03-01T10:30:00", True),
        ("2024-03-01T10:00:00+01:00", "2024-03-01T09:30:00Z", True),
        ("2024-03-01T10:00:00+01:00", "2024-03-01 11:30:00+0200", True),
        ("2024-03-01T10:00:00", "2024-03-01T11:30:00+01:00", False),
        ("2024-03-01T10:00:00+01:00", "2024-03-01T09:30:00", False),
        ("2024-03-01", "2024-03-01T01:30:00+01", False),
    ],
)
def test_a_moment_with_a_zone_is_not_compared_with_one_without(
    tmp_path: Path, start: str, time: str, sampled: bool
) -> None:
    samples = f"patient,time,variable,value\na,{time},HR,90\nb,2024-03-01T10:00:00,HR,90\n"
    labels = f"patient,ill,came\na,0,{start}\nb,1,2024-03-01T10:00:00\n"
    records = series(tmp_path, samples, labels, time_unit="timestamp", start="came")
    assert len(records) == 1 + sampled
    reason = "time: one of time and start has a zone, the other has none"
    assert dict(records.report.values.counts) == ({} if sampled else {reason: 1})
    assert dict(records.report.values.first) == ({} if sampled else {reason: "s.csv, line 2"})


def test_a_moment_in_utc_beside_one_without_a_zone_is_taken_as_utc_and_told(tmp_path: Path) -> None:
    samples = "patient,time,variable,value\na,2024-03-01T10:30:00Z,HR,90\n"
    records = series(
        tmp_path, samples, "patient,ill,came\na,0,2024-03-01T10:00:00\n", time_unit="timestamp", start="came"
    )
    assert records.inputs[0][0, :, 1].tolist() == [1, 0]
    what = "time: one of time and start is in UTC, the other without a zone: taken as UTC"
    assert dict(records.report.notes.counts) == {what: 1}


def test_a_record_without_a_start_is_set_aside_for_that_reason(tmp_path: Path) -> None:
    samples = "patient,time,variable,value\na,2024-03-01T10:30:00,HR,90\nb,2024-03-01T10:30:00,HR,90\n"
    labels = "patient,ill,came\na,0,soon\nb,1,2024-03-01T10:00:00\n"
    records = series(tmp_path, samples, labels, time_unit="timestamp", start="came")
    assert dict(records.report.set_aside.counts) == {"came: missing or not a moment": 1}
    assert not records.report.values.counts


def test_a_variable_that_no_row_names_is_told_with_the_name_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row of s\.csv has the variable 'HR'; did you mean 'hr'\?"):
        series(tmp_path, "patient,time,variable,value\na,0,hr,90\n", "patient,ill\na,0\n")
    with pytest.raises(DataError, match=r"no row of s\.csv has the variable 'HR'$") as error:
        series(tmp_path, "patient,time,variable,value\na,0,SECRET,90\n", "patient,ill\na,0\n")
    assert "SECRET" not in str(error.value)
    both = series(tmp_path, "patient,time,variable,value\na,0,HR,90\na,1,hr,90\na,2,Hr,9\n", "patient,ill\na,0\n")
    assert sorted(both.report.notes.first.items()) == [
        ("rows with the variable 'Hr', which is not 'HR': not read", "s.csv, line 4"),
        ("rows with the variable 'hr', which is not 'HR': not read", "s.csv, line 3"),
    ]
    records = series(
        tmp_path, "patient,time,variable,value\na,0,8867.0,90\n", "patient,ill\na,0\n", columns={"HR": "8867"}
    )
    assert records.inputs[0][0, 0, 0] == 1
