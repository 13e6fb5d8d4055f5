"""Sheets of Excel workbooks (``.xlsx``, ``.xlsm``) as tables: values alone, no formula is computed, no macro is run."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pandas as pd

from consilium_client.data import bounds, workbook_parts
from consilium_shared.errors import DataError

SUFFIXES = (".xlsx", ".xlsm")


def read_header(path: Path, sheet: str | None) -> list[str]:
    """Names of a sheet's columns, its first row that is not empty; raises DataError."""
    with _opened(path, sheet) as rows:
        return _header(path, rows)[1]


def read_sheet(
    path: Path, sheet: str | None, require: Callable[[Sequence[str]], None], wanted: Sequence[str]
) -> pd.DataFrame:
    """Columns of a sheet; the index is the row in the sheet.

    Args:
        path: the workbook.
        sheet: name of the sheet, the first where it is None.
        require: raises DataError where the sheet's columns are not those that are wanted.
        wanted: columns to read, each as the cells have it: text, numbers, or moments as ISO 8601.

    Raises:
        DataError: no workbook, damaged, larger than ``bounds`` allows, without that sheet, or without a row.
    """
    with _opened(path, sheet) as rows:
        first, names = _header(path, rows)
        require(names)
        places = [names.index(name) for name in wanted]
        index: list[int] = []
        cells: list[list[Any]] = [[] for _ in wanted]
        for number, row in enumerate(rows, first + 1):
            if all(value is None for value in row):
                continue
            _require_width(path, row)
            index.append(number)
            for place, column in zip(places, cells, strict=True):
                column.append(_value(row[place]) if place < len(row) else None)
    if not index:
        raise DataError(f"{path}: no row below the header")
    columns = {name: pd.Series(column, index=index, dtype=object) for name, column in zip(wanted, cells, strict=True)}
    return pd.DataFrame(columns, index=pd.Index(index))


@contextmanager
def _opened(path: Path, sheet: str | None) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Rows of a sheet, as they are read; whatever fails is a DataError."""
    import openpyxl  # most sites have no workbook

    size = bounds.require_file(path, "a table")
    most = min(bounds.TABLE_BYTES, max(bounds.UNPACKED_FREELY, bounds.UNPACKED_TIMES * size))
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(part.file_size for part in packed.infolist()) > most:
                raise DataError(f"{path}: more than {most >> 20} MiB once unpacked")
            workbook_parts.check(path, packed)
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        try:
            if sheet is not None and sheet not in book.sheetnames:
                raise DataError(f"{path} has no sheet {sheet!r} (sheets: {', '.join(map(repr, book.sheetnames))})")
            found: Any = book[sheet or book.sheetnames[0]]
            found.reset_dimensions()  # which the sheet says of itself: a gap would be filled with so many empty cells
            yield found.iter_rows(values_only=True)
        finally:
            book.close()
    except DataError:
        raise
    except Exception as error:  # openpyxl raises whatever its parts raise; the cause may quote a cell
        raise DataError(f"{path}: not a readable Excel workbook ({type(error).__name__})") from None


def _header(path: Path, rows: Iterator[tuple[Any, ...]]) -> tuple[int, list[str]]:
    """Number of the sheet's first row that is not empty, and its names."""
    for number, row in enumerate(rows, 1):
        if any(value is not None for value in row):
            _require_width(path, row)
            return number, ["" if value is None else str(_value(value)).strip() for value in row]
    raise DataError(f"{path}: an empty sheet, where a table is meant")


def _require_width(path: Path, row: tuple[Any, ...]) -> None:
    if len(row) > bounds.TABLE_COLUMNS:
        raise DataError(f"{path}: {len(row)} columns, more than {bounds.TABLE_COLUMNS}")


def _value(value: Any) -> Any:
    """Cell as the readers take it: a moment as ISO 8601, a day at midnight as a date, all else as it is."""
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat()
    if isinstance(value, date | time):
        return value.isoformat()
    return value
