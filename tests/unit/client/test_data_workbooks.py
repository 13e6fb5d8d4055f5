"""Workbooks that would take a site's memory or its days are refused as they are read, and say why."""

from __future__ import annotations

import zipfile
from pathlib import Path

import openpyxl
import pytest

from consilium_client.data import bounds, workbook, workbook_parts
from consilium_shared.errors import DataError

SHEET = "xl/worksheets/sheet1.xml"
MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
HEAD = '<row r="1"><c r="A1" t="inlineStr"><is><t>patient</t></is></c></row>'


def book(folder: Path, sheet: str, strings: str | None = None, how: int = zipfile.ZIP_DEFLATED) -> Path:
    """A workbook with the given XML as its first sheet and, where they are given, its shared texts."""
    parts = {SHEET: sheet} if strings is None else {SHEET: sheet, "xl/sharedStrings.xml": strings}
    path, plain = folder / "t.xlsx", folder / "plain.xlsx"
    openpyxl.Workbook().save(plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", how) as packed:
        for part in source.infolist():
            if part.filename not in parts:
                packed.writestr(part.filename, source.read(part))
        for name, content in parts.items():
            packed.writestr(name, content)
    return path


def rows(text: str, before: str = "", dimension: str = "") -> str:
    return f'{before}<worksheet xmlns="{MAIN}">{dimension}<sheetData>{HEAD}{text}</sheetData></worksheet>'


def cell(place: str, text: str = "p1") -> str:
    return f'<c r="{place}" t="inlineStr"><is><t>{text}</t></is></c>'


def read(path: Path) -> list[object]:
    return workbook.read_sheet(path, None, lambda _: None, ["patient"])["patient"].tolist()


def test_gaps_between_rows_and_cells_are_read_as_they_are(tmp_path: Path) -> None:
    text = f'<row r="3">{cell("A3")}{cell("C3")}</row><row>{cell("A4", "p2")}</row><row r="9000">{cell("A9000")}</row>'
    assert read(book(tmp_path, rows(text))) == ["p1", "p2", "p1"]


ENTITY = '<!DOCTYPE x [<!ENTITY a "p1">]>'
REFUSED = {
    "a row far away": (rows(f'<row r="2000000000">{cell("A2")}</row>'), "a row beyond the 1048576th"),
    "an empty row far away": (rows('<row r="1048577"/>'), "a row beyond the 1048576th"),
    "a row again": (rows(f'<row r="1">{cell("A1")}</row>'), "rows that are out of order"),
    "a row below zero": (rows(f'<row r="-7">{cell("A2")}</row>'), "rows that are out of order"),
    "a row of no number": (rows(f'<row r="1e3">{cell("A2")}</row>'), "a row whose number is none"),
    "cells turned round": (rows(f'<row r="2">{cell("B2")}{cell("A2")}</row>'), "cells of a row that are out of order"),
    "a cell of no place": (rows(f'<row r="2">{cell("A")}</row>'), "a cell whose place is none"),
    "an entity": (rows(f'<row r="2">{cell("A2", "&a;")}</row>', ENTITY), "a document type"),
    "one row of nothing": (rows("<row>" + "<c/>" * 160_001 + "</row>"), "a row or a text of more than 160000 elements"),
    "a tower": (rows("<a>" * 100 + "</a>" * 100), "elements more than 64 deep"),
    "one long text": (rows(f'<row r="2">{cell("A2", "x" * 2**21)}</row>'), "an element of more than 1 MiB"),
    "one long attribute": (rows(f'<row r="2" x="{"y" * 2**21}"/>'), "an element of more than 1 MiB"),
    "half a part": (rows("")[:-20], "is damaged"),
}


@pytest.mark.parametrize("bomb", REFUSED)
def test_what_no_workbook_has_is_refused_before_anything_is_built_of_it(tmp_path: Path, bomb: str) -> None:
    sheet, words = REFUSED[bomb]
    path = book(tmp_path, sheet)
    for ask in (read, lambda path: workbook.read_header(path, None)):
        with pytest.raises(DataError, match=words) as error:
            ask(path)
        assert "sheet1.xml" in str(error.value)


def test_what_stands_beside_rows_and_texts_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbook_parts, "ROWS", 2000)
    with pytest.raises(DataError, match="more than 2000 elements beside rows"):
        read(book(tmp_path, rows("<x/>" * 2001)))


def test_entities_are_refused_in_every_part(tmp_path: Path) -> None:
    strings = f'{ENTITY}<sst xmlns="{MAIN}"><si><t>&a;</t></si></sst>'
    with pytest.raises(DataError, match=r"sharedStrings\.xml' has a document type"):
        read(book(tmp_path, rows(""), strings))


def test_a_wide_row_a_false_dimension_and_a_rare_compression_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = book(tmp_path, rows(f'<row r="2">{cell("A2")}{cell("ZZZ2")}</row>'))
    with pytest.raises(DataError, match="18278 columns, more than 10000"):
        read(wide)
    with monkeypatch.context() as narrow:
        narrow.setattr(bounds, "TABLE_COLUMNS", 5)  # of which nothing is filled up to what the sheet says of itself
        claim = '<dimension ref="A1:XFD1048576"/>'
        assert read(book(tmp_path, rows(f'<row r="9000">{cell("A9000")}</row>', dimension=claim))) == ["p1"]
    with pytest.raises(DataError, match="compressed in a way"):
        read(book(tmp_path, rows(""), how=zipfile.ZIP_LZMA))
