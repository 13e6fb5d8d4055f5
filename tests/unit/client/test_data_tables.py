"""A table becomes records: scaled by the study's constants, with every row accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import DicomAsset, TableAsset
from consilium_client.data.columns import read_columns
from consilium_client.quality.assessment import assess
from consilium_shared import limits
from consilium_shared.errors import DataError
from consilium_shared.study import Study

FEATURES = [
    {"name": "age", "center": 50, "scale": 10, "low": 0, "high": 120},
    {"name": "pain", "categories": ["1", "2", "3"]},
]


def study(**data: Any) -> Study:
    evaluation = data.pop("evaluation", {"split": 0.5})
    return studies.study(
        "logistic",
        {"asset": "heart", "label": {"column": "ill", "classes": ["no", "yes"]}, "features": FEATURES, **data},
        name="tables",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
        evaluation=evaluation,
    )


def table(folder: Path, text: str) -> TableAsset:
    (folder / "patients.csv").write_text(text, encoding="utf-8")
    return TableAsset(kind="table", path=Path("patients.csv")).at(folder)


def test_numbers_are_scaled_by_the_studys_constants_and_categories_are_one_hot(tmp_path: Path) -> None:
    records = load(table(tmp_path, "patient,age,pain,ill\na,60,1,no\nb,40,3.0,yes\n"), study())
    assert records.inputs[0].dtype == np.float32
    np.testing.assert_array_equal(records.inputs[0], [[1, 1, 0, 0], [-1, 0, 0, 1]])
    np.testing.assert_array_equal(records.labels[0], [0, 1])
    assert records.patient_count == 2
    assert not records.report.set_aside.counts


@pytest.mark.parametrize("others", [[], [2.5], [None], [7], [2.5, None]])
@pytest.mark.parametrize(
    ("value", "word"), [(1.0, "1"), (1, "1"), (True, "true"), (0.5, "0.5"), (2**53 + 1, "9007199254740993")]
)
def test_an_identifier_reads_the_same_whatever_stands_in_other_rows(
    tmp_path: Path, value: Any, word: str, others: list[Any]
) -> None:
    """Whole columns change their type with one value; the split must not move with another patient's identifier."""
    others = [other for other in others if other is None or isinstance(other, type(value))]
    pq.write_table(pa.table({"patient": pa.array([value, *others])}), tmp_path / "x.parquet")
    assert read_columns(tmp_path / "x.parquet", ["patient"])["patient"].iloc[0] == word


def test_more_than_fits_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "patient,age,pain,ill\na,60,1,no\nb,40,3,yes\n"
    monkeypatch.setattr(limits, "INPUT_BYTES", 2 * 4 * 4)
    load(table(tmp_path, text), study())
    monkeypatch.setattr(limits, "INPUT_BYTES", 2 * 4 * 4 - 1)
    with pytest.raises(DataError, match="GiB of memory"):
        load(table(tmp_path, text), study())


def test_one_patients_value_changes_nobody_elses_input(tmp_path: Path) -> None:
    before = load(table(tmp_path, "patient,age,pain,ill\na,60,1,no\nb,40,3,yes\n"), study())
    after = load(table(tmp_path, "patient,age,pain,ill\na,60,1,no\nb,119,2,no\nc,10,1,yes\n"), study())
    np.testing.assert_array_equal(before.inputs[0][0], after.inputs[0][0])
    assert before.train[0] == after.train[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",50,1,no", "label table: no patient"),
        ("?,50,1,no", "label table: no patient"),
        ("b,50,1,", "label table: no ill"),
        ("b,50,1,maybe", "label table: ill is none of the study's classes"),
        ("a,60,1,no", "label table: the same row again"),
        ("b,?,1,no", "a value is missing (the study refuses such records)"),
        ("b,old,1,no", "a value is missing (the study refuses such records)"),
        ("b,150,1,no", "a value is missing (the study refuses such records)"),
        ("b,50,4,no", "a value is missing (the study refuses such records)"),
        ("b,inf,1,no", "a value is missing (the study refuses such records)"),
    ],
)
def test_a_row_that_cannot_be_used_is_set_aside_with_its_reason(tmp_path: Path, row: str, reason: str) -> None:
    records = load(table(tmp_path, f"patient,age,pain,ill\na,60,1,no\n{row}\n"), study())
    assert len(records) == 1
    assert dict(records.report.set_aside.counts) == {reason: 1}


def test_the_first_places_of_a_reason_are_lines_of_the_file(tmp_path: Path) -> None:
    records = load(table(tmp_path, "patient,age,pain,ill\na,60,1,no\nb,50,1,maybe\nc,50,1,maybe\n"), study())
    assert list(records.report.set_aside.first.values()) == ["patients.csv, lines 3, 4"]


def test_a_missing_value_stands_at_the_center_where_the_study_says_so(tmp_path: Path) -> None:
    records = load(table(tmp_path, "patient,age,pain,ill\na,?,,no\nb,x,9,yes\n"), study(missing="center"))
    np.testing.assert_array_equal(records.inputs[0], np.zeros((2, 4)))
    assert records.report.missing == {"age": 2, "pain": 2}
    assert records.report.values.counts == {"age: not a number": 1, "pain: none of the study's categories": 1}


def test_a_patient_may_have_several_rows_and_is_counted_once(tmp_path: Path) -> None:
    records = load(table(tmp_path, "patient,age,pain,ill\na,60,1,no\na,61,1,yes\nb,40,3,yes\n"), study())
    assert records.patients.tolist() == [0, 0, 1]
    assert records.patient_count == 2


def test_rows_that_disagree_about_one_record_are_both_set_aside(tmp_path: Path) -> None:
    text = "patient,visit,age,pain,ill\na,1,60,1,no\na,1,60,1,yes\na,2,60,1,no\nb,1,50,1,no\n"
    asset = table(tmp_path, text).model_copy(update={"record": "visit"})
    records = load(asset, study())
    assert len(records) == 2
    assert records.report.set_aside.counts == {"label table: rows for the same record with different labels": 2}


def test_a_split_column_says_who_is_held_back(tmp_path: Path) -> None:
    text = (
        "patient,age,pain,ill,part\na,60,1,no,train\nb,60,1,no,test\n"
        "c,60,1,no,other\nd,60,1,no,train\nd,61,1,no,test\ne,60,1,no,train\n"
    )
    records = load(table(tmp_path, text), study(evaluation={"split": None, "split_column": "part"}))
    assert records.train.tolist() == [True, False, True]
    assert records.report.set_aside.counts == {
        "label table: part is neither train nor test": 1,
        "label table: the patient is both in train and in test": 2,
    }
    held_back = records.select(held_back=True)
    assert (len(held_back), held_back.patient_count, held_back.patients.tolist()) == (1, 1, [0])
    assert records.select(held_back=False).patients.tolist() == [0, 1]


def test_parquet_gives_the_same_records_as_csv(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"patient": [1, 2, 3], "age": [60.0, np.nan, 30.0], "pain": [1.0, 2.0, np.nan], "ill": ["no", "yes", "no"]}
    )
    frame.to_parquet(tmp_path / "p.parquet")
    frame.to_csv(tmp_path / "p.csv", index=False)
    loaded = [
        load(TableAsset(kind="table", path=tmp_path / f"p.{end}"), study(missing="center"))
        for end in ("parquet", "csv")
    ]
    np.testing.assert_array_equal(loaded[0].inputs[0], loaded[1].inputs[0])
    np.testing.assert_array_equal(loaded[0].train, loaded[1].train)


def test_a_site_may_name_its_columns_otherwise(tmp_path: Path) -> None:
    asset = table(tmp_path, "Pat-ID,Alter,Schmerz,krank\na,60,1,no\n").model_copy(
        update={"patient": "Pat-ID", "columns": {"age": "Alter", "pain": "Schmerz", "ill": "krank"}}
    )
    np.testing.assert_array_equal(load(asset, study()).inputs[0], [[1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patient,age,ill\nSECRET,60,no\n", "no column 'pain'"),
        ("patient,agee,pain,ill\nSECRET,60,1,no\n", "did you mean 'agee'"),
        ("patient,age,pain,ill,age\nSECRET,60,1,no,3\n", "two columns are called 'age'"),
        ("patient,age,pain,ill\nSECRET,60,1,perhaps\n", "no usable row; 1 × label table: ill is none"),
        ("patient,age,pain,ill\nSECRET,60,1,no\nSECRET,1,2,3,4,5\n", "line 3: 6 fields where the header has 4"),
        ("patient,age,pain,ill\nSECRET,?,1,no\n", "no usable record; 1 × a value is missing"),
        ("", "an empty file"),
        ('patient,age,pain,ill\n"SECRET', "line 2: a quotation mark opens a field here, and nothing closes it"),
    ],
)
def test_an_unusable_table_is_a_data_error_without_its_content(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(DataError) as error:
        load(table(tmp_path, text), study())
    assert says in str(error.value)
    assert "SECRET" not in str(error.value)


def test_files_that_are_not_tables_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"patient,age,pain,ill\n\xff\xfe,1,1,no\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    for name in ("x.csv", "x.parquet", "x.xlsx", "absent.csv", "absent.parquet"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            load(TableAsset(kind="table", path=tmp_path / name), study())


def test_an_asset_of_another_kind_is_refused_by_name() -> None:
    asset = DicomAsset(kind="dicom", path=Path("a"), table=Path("b"))
    with pytest.raises(DataError, match="needs an asset of kind table; heart is of kind dicom"):
        load(asset, study())


def test_the_quality_report_counts_everything_and_names_nobody(tmp_path: Path) -> None:
    asset = table(tmp_path, "patient,age,pain,ill\nSECRET,60,1,no\nSECRET,61,1,yes\nb,?,1,no\nc,1,1,maybe\n")
    report = assess(load(asset, study(missing="center")), study(missing="center"))
    assert (report.records, report.patients) == (3, 2)
    assert report.labels == {"no": (2, 2, 1), "yes": (1, 1, 0)}
    assert report.missing == {"age": 1, "pain": 0}
    titles = [each.title for each in report.tables()]
    assert titles == ["heart for tables", "Look at", "Classes", "Values", "Set aside"]
    assert "SECRET" not in str(report.to_json())
