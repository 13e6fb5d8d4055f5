"""Reading named columns of a CSV or Parquet file: as text exactly as written, or as numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from consilium_shared.errors import DataError

MOST_NAMES = 20
"""Of a table's columns, in an error."""
_READ = pacsv.ReadOptions(use_threads=False)  # with threads a parser's error does not say which row
_PARSE = pacsv.ParseOptions(newlines_in_values=True)

MISSING = ("", "?")
MISSING_NUMBERS = (*MISSING, "NA", "N/A", "NaN", "nan", "NULL", "null")


def read_columns(path: Path, text: Collection[str], numbers: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of a table, and no other, in the file's row order.

    Args:
        path: a ``.csv`` (comma, UTF-8, header; may be ``.csv.gz``) or ``.parquet`` file.
        text: columns to read as text, stripped of surrounding blanks; ``?`` and nothing are missing.
        numbers: columns that hold numbers. Those that do so throughout are float64, the others stay text for
            ``to_numbers`` to sort out.

    Raises:
        DataError: no such file, not readable, or without one of the columns. Never quotes the table's content.
    """
    wanted = list(dict.fromkeys([*text, *numbers]))
    numbers = [name for name in numbers if name not in text]
    require(path, wanted, header(path))
    with _complaining(path):
        table = pq.read_table(path, columns=wanted) if _is_parquet(path) else _csv(path, wanted, numbers)
    # Whole numbers beside a missing one stay whole: float64 would make two identifiers beyond 2^53 one.
    frame = pd.DataFrame(table.to_pandas(integer_object_nulls=True))
    for name in text:
        frame[name] = as_text(frame[name])
    return frame


def as_text(column: pd.Series) -> pd.Series:
    """Text of a column, stripped; ``?`` and nothing become missing; a whole number reads the same in every format.

    Each value by itself: what one row holds never changes how another patient's identifier reads.
    """
    if not isinstance(column.dtype, pd.StringDtype):
        column = column.map(_word, na_action="ignore")
    words = column.astype("string").str.strip()
    return words.mask(words.isin(MISSING))


def _word(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def plain(words: pd.Series) -> pd.Series:
    """Text in which ``1.0`` and ``1`` are the same word: class and category names are compared in this form."""
    return words.astype("string").str.replace(r"^([+-]?\d+)\.0+$", r"\1", regex=True)


def to_numbers(column: pd.Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """float64 values (NaN where missing) and a mask of what stands there but is not a finite number."""
    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = np.isinf(values)
    else:
        words = column.astype("string").str.strip()
        absent = (words.isna() | words.isin(MISSING_NUMBERS)).to_numpy(dtype=bool)
        parsed = pd.to_numeric(words.astype(object).where(~absent), errors="coerce")
        values = parsed.to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~absent & ~np.isfinite(values)
    return np.where(wrong, np.nan, values), wrong


def header(path: Path) -> list[str]:
    """The names of a table's columns; little more of it is read.

    Raises:
        DataError: no such file, a folder, not readable by this account, or no table.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, where a table is meant")
    with _complaining(path):
        if _is_parquet(path):
            return list(pq.read_schema(path).names)
        with pacsv.open_csv(path, _READ, _PARSE) as reader:
            return list(reader.schema.names)


def require(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    """Raises DataError unless a table has each of the columns, once.

    The text lists the table's own names only where some are as expected: else its first line may be a patient's.
    """
    twice = next((name for name in wanted if present.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice!r}")
    missing = [name for name in wanted if name not in present]
    if not missing:
        return
    what = f"{path}: no column {', '.join(map(repr, missing))}"
    near = difflib.get_close_matches(missing[0], present, n=1, cutoff=0.7)
    if len(missing) == len(wanted) and not near:
        raise DataError(f"{what}; is the first line the header, with commas between names?")
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if len(missing) < len(wanted):
        rest = [name for name in present if name not in wanted]
        others = ", ".join(map(repr, rest[:MOST_NAMES])) + (", …" if len(rest) > MOST_NAMES else "")
        hint += f"; the table's other columns are {others or 'none'}"
    raise DataError(f"{what}{hint}. Where this site's name is another, say so under columns: of the asset in site.yaml")


def _is_parquet(path: Path) -> bool:
    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise DataError(f"{path}: expected a .csv, .csv.gz or .parquet file")
    return path.name.endswith(".parquet")


@contextmanager
def _complaining(path: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise DataError(_complaint(path, error)) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'damaged'}") from None


def _csv(path: Path, wanted: Sequence[str], numbers: Sequence[str]) -> pa.Table:
    """The wanted columns of a CSV file, whose rows must all have as many fields as its header."""

    def convert(types: dict[str, pa.DataType]) -> pa.Table:
        options = pacsv.ConvertOptions(
            include_columns=list(wanted), column_types=types, null_values=list(MISSING), strings_can_be_null=True
        )
        return pacsv.read_csv(path, _READ, _PARSE, options)

    try:
        return convert({name: pa.float64() if name in numbers else pa.string() for name in wanted})
    except pa.ArrowInvalid as error:
        if "to double" not in str(error):
            raise
        return convert(dict.fromkeys(wanted, pa.string()))  # a word among the numbers: the caller sorts them out


def _complaint(path: Path, error: pa.ArrowException) -> str:
    """What is wrong with a table, without the parser's own words, which quote the row."""
    row = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error))
    if row:
        return f"{path}, line {row.group(1)}: {row.group(3)} fields where the header has {row.group(2)}"
    if "UTF8" in str(error):
        return f"{path}: not UTF-8 text; export the table as UTF-8"
    return f"{path}: not a readable table (empty, damaged, or an open quotation mark)"
