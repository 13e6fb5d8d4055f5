"""A site declares how its tables are written: the records are those of the plain table of the same patients."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import TableAsset, TimeseriesAsset, Unit
from consilium_client.data.dialect import Dialect
from consilium_client.data.head import look
from consilium_shared.errors import DataError
from consilium_shared.study import Study

GLUCOSE = {"name": "glucose", "center": 120, "scale": 40, "low": 20, "high": 800, "unit": "mg/dL"}
SEX = {"name": "sex", "categories": ["f", "m"]}
STUDY = studies.study(
    data={"label": {"column": "ill", "classes": ["no", "yes"]}, "features": [GLUCOSE, SEX], "missing": "center"}
)
ROWS = [("Müller", 90.5, "f", "no"), ("007", 1.5, "m", "yes"), ("7", 200.0, "f", "yes"), ("ß", -9, "m", "no")]
COLUMNS = ("patient", "glucose", "sex", "ill")


def reference(folder: Path, **declared: Any) -> Any:
    text = "\n".join(",".join(map(str, row)) for row in (COLUMNS, *ROWS))
    (folder / "plain.csv").write_text(text + "\n", encoding="utf-8")
    return load(TableAsset(kind="table", path=folder / "plain.csv", **declared), STUDY)


def same(one: Any, other: Any) -> None:
    for a, b in zip((*one.inputs, *one.labels, one.train), (*other.inputs, *other.labels, other.train), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_any_delimiter_decimal_and_encoding_by_declaration(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [[str(cell).replace(".", ",") for cell in row] for row in (COLUMNS, *ROWS)]
    rows[1].append(f'a "note"{delimiter} of\r\ntwo lines')
    text = "".join(
        delimiter.join([*row[:4], '"' + (row[4] if len(row) > 4 else "").replace('"', '""') + '"']) + "\r\n"
        for row in rows
    )
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    asset = TableAsset(kind="table", path=path, csv=Dialect(delimiter=delimiter, decimal=",", encoding=encoding))
    found = load(asset, STUDY)
    same(found, reference(tmp_path))
    assert found.report.notes.counts["t.csv: line inside a quoted field, no row of its own"] == 1
    assert found.report.values.first == {"glucose: outside 20 … 800": "t.csv, lines 4, 6"}
    assert look(asset) == 4


def test_a_row_that_a_stray_mark_swallows_is_found_whatever_the_delimiter(tmp_path: Path) -> None:
    rows = ["patient;glucose;sex;ill", *(f"p{n};9{n % 10};f;no" for n in range(20))]
    rows[3], rows[9] = 'p2;"92;f;no', 'p8;98";f;no'
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"line 4: a quotation mark opens a field here that ends in line 10"):
        load(TableAsset(kind="table", path=tmp_path / "t.csv", csv=Dialect(delimiter=";")), STUDY)


@pytest.mark.parametrize(
    ("text", "dialect", "says"),
    [
        (b"patient;glucose;sex;ill\np;1;f;no\n", {}, r'say csv: {delimiter: ";"} of the asset'),
        (b"patient,glucose,sex,ill\np,1,f,no\n", {"delimiter": ";"}, r'say csv: {delimiter: ","}'),
        ("patient,glucose,sex,ill\nMüller,1,f,no\n".encode("cp1252"), {}, "say its encoding under csv"),
        ("patient,glucose,sex,ill\nMüller,1,f,no\n".encode("cp1252"), {"encoding": "utf-16"}, "not utf-16 text"),
        ("patient,glucose,sex,ill\np,1,f,no\n".encode("utf-16"), {}, "encoding: utf-16"),
    ],
)
def test_an_error_names_the_declaration_that_is_missing(
    tmp_path: Path, text: bytes, dialect: dict[str, str], says: str
) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(DataError, match=says):
        load(TableAsset(kind="table", path=tmp_path / "t.csv", csv=Dialect.model_validate(dialect)), STUDY)


def test_a_point_in_a_number_with_decimal_commas_is_no_thousand(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("patient;glucose;sex;ill\na;90,5;f;no\nb;1.200;f;yes\n")
    asset = TableAsset(kind="table", path=tmp_path / "t.csv", csv=Dialect(delimiter=";", decimal=","))
    assert load(asset, STUDY).report.values.counts == {"glucose: not a number": 1}


def test_a_sheet_of_a_workbook_reads_as_the_table(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["notes"])
    sheet = book.create_sheet("Export")
    sheet.append([])
    sheet.append([*COLUMNS, "born"])
    for name, *cells in ROWS:
        sheet.append([int(name) if name == "7" else name, *cells, date(1950, 1, 2)])
    book.save(tmp_path / "t.xlsx")
    asset = TableAsset(kind="table", path=tmp_path / "t.xlsx", csv=Dialect(sheet="Export"))
    found = load(asset, STUDY)
    same(found, reference(tmp_path))
    assert found.report.values.first == {"glucose: outside 20 … 800": "t.xlsx, rows 4, 6"}
    assert look(asset) == 4
    with pytest.raises(DataError, match=r"no sheet 'Exprt' \(sheets: 'Sheet', 'Export'\)"):
        load(TableAsset(kind="table", path=tmp_path / "t.xlsx", csv=Dialect(sheet="Exprt")), STUDY)
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04 SECRET")
    with pytest.raises(DataError, match="not a readable Excel workbook") as error:
        load(asset, STUDY)
    assert "SECRET" not in str(error.value)


def test_codes_words_and_units_are_the_studys(tmp_path: Path) -> None:
    lines = ["patient,glucose,sex,ill", "Müller,5.0234,W,nein", "007,-9,M,ja", "7,11.1015,2,ja", "ß,-99.0,1.0,nein"]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asset = TableAsset(
        kind="table",
        path=tmp_path / "t.csv",
        missing=("-9",),
        missing_in={"glucose": ("-99",)},
        units={"glucose": Unit(unit="mmol/L", molar_mass=180.156)},
        values={"sex": {"W": "f", "2": "f", "M": "m", "1": "m"}, "ill": {"ja": "yes", "nein": "no"}},
    )
    found = load(asset, STUDY)
    expected = (np.array([90.5, np.nan, 200.0, np.nan]) - 120) / 40
    np.testing.assert_allclose(found.inputs[0][:, 0], np.nan_to_num(expected), atol=1e-3)
    assert found.inputs[0][:, 2].tolist() == [0, 1, 0, 1]
    assert found.labels[0].tolist() == [0, 1, 1, 0]
    assert found.report.values.counts == {}
    assert found.report.missing == {"glucose": 2, "sex": 0}


def test_units_and_codes_hold_for_the_variables_of_a_series(tmp_path: Path) -> None:
    heart = {"name": "hr", "center": 80, "scale": 20, "low": 20, "high": 250, "unit": "/min"}
    study = studies.study("lstm", {"series": {"variables": [GLUCOSE, heart], "bins": 2, "step_minutes": 60}})
    series = ["patient,time,variable,value", "a,5,glucose,5.0", "a,70,glucose,-9", "a,10,hr,90", "b,10,hr,-9"]
    (tmp_path / "s.csv").write_text("\n".join([*series, "b,1,hr,70", ""]))
    (tmp_path / "t.csv").write_text("patient,y\na,0\nb,1\n")
    asset = TimeseriesAsset(
        kind="timeseries",
        series=tmp_path / "s.csv",
        table=tmp_path / "t.csv",
        missing=("-9",),
        units={"glucose": Unit(unit="mmol/L", molar_mass=180.156)},
    )
    found = load(asset, study)
    assert found.inputs[0][0, :, 0].tolist() == pytest.approx([(5.0 * 18.0156 - 120) / 40] * 2)
    assert found.inputs[0][:, :, 2].tolist() == [[1, 0], [0, 0]]
    assert found.report.values.counts == {}


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ({"glucose": "mmol/L"}, "mmol/L cannot become mg/dL"),
        ({"glucose": "furlong"}, "none of UCUM's"),
        ({"dose": "mg"}, "the study says none that it could be converted to"),
    ],
)
def test_a_unit_that_cannot_be_converted_is_an_error_before_anything_is_trained(
    tmp_path: Path, units: dict[str, Any], says: str
) -> None:
    study = Study.model_validate(
        {**STUDY.contract, "data": {**STUDY.contract["data"], "features": [GLUCOSE, {"name": "dose"}]}}
    )
    (tmp_path / "t.csv").write_text("patient,glucose,dose,ill\na,5,1,no\nb,6,1,yes\n")
    with pytest.raises(DataError, match=says):
        load(TableAsset(kind="table", path=tmp_path / "t.csv", units=units), study)
