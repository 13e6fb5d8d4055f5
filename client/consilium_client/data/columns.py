"""Reading named columns of a CSV or Parquet file: as text exactly as written, or as numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from consilium_client.data import bounds, workbook
from consilium_client.data.dialect import PLAIN, Dialect
from consilium_client.data.lines import Lines, opened, read_lines, read_names
from consilium_client.data.report import PLACES, SetAside
from consilium_shared.errors import DataError

MOST_NAMES = 20
"""Largest number of a table's column names that an error lists."""

BLOCK_BYTES = 2**20
"""Least text of a block, beside two rows that are longer than all others."""
_EXACT = 2**53

MISSING = ("", "?")
MISSING_NUMBERS = (*MISSING, "NA", "N/A", "NaN", "nan", "NULL", "null")


def read_columns(
    path: Path,
    text: Collection[str],
    numbers: Sequence[str] = (),
    notes: SetAside | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    dialect: Dialect = PLAIN,
) -> pd.DataFrame:
    """Read these columns of a table and no others, in the file's row order; ``place`` takes the index.

    Args:
        path: a ``.csv`` (with a header; may be ``.csv.gz``), ``.parquet`` or ``.xlsx`` file.
        text: columns to read as text, stripped of surrounding blanks; ``?`` and nothing are missing.
        numbers: columns that hold numbers. Those that do so throughout are float64, the others stay text for
            ``to_numbers`` to sort out.
        notes: counts the lines that stand inside quoted fields.
        on_progress: called with ``(done, total)``, in bytes of a CSV file, while its lines are counted.
        dialect: of CSV files, and the sheet of a workbook.

    Raises:
        DataError: no such file, not readable, more than ``bounds`` allows, without one of the columns, or of fewer rows
            than its lines make. Never quotes the table's content.
    """
    wanted = list(dict.fromkeys([*text, *numbers]))
    numbers = [name for name in numbers if name not in text]
    if is_parquet(path):
        table = _parquet(path, wanted)
        index: pd.Index = pd.RangeIndex(1, table.num_rows + 1)
    elif is_workbook(path):
        sheet = workbook.read_sheet(path, dialect.sheet, lambda names: require(path, wanted, names), wanted)
        for name in text:
            sheet[name] = as_text(sheet[name])
        return sheet
    else:
        lines = read_lines(path, on_progress, dialect)
        require(path, wanted, lines.header)
        if not lines.rows:
            raise DataError(f"{path}: no row below the header")
        table = _csv(lines, wanted, numbers)
        index = lines.index()
        if notes is not None:
            note_quoted(lines, notes)
    frame = frame_of(table, text)
    frame.index = index
    return frame


def note_quoted(lines: Lines, notes: SetAside) -> None:
    """Counts the lines that stand inside quoted fields."""
    name = lines.path.name
    notes.add(
        f"{name}: line inside a quoted field, no row of its own", lines.quoted, f"{name}, line {lines.first_quoted}"
    )


def frame_of(table: pa.Table, text: Collection[str]) -> pd.DataFrame:
    """A table's rows as a frame, the columns ``text`` as text."""
    # Whole numbers beside a missing one stay whole: float64 would make two identifiers beyond 2^53 one.
    frame = pd.DataFrame(table.to_pandas(integer_object_nulls=True))
    for name in text:
        frame[name] = as_text(frame[name])
    return frame


def place(path: Path, index: pd.Index) -> str:
    """Places of rows as a person finds them: line numbers of a CSV file, row numbers of a Parquet file, files of a
    folder whose paths are the rows."""
    unit = "file" if path.is_dir() else "row" if is_parquet(path) or is_workbook(path) else "line"
    shown = [str(number) for number in list(index)[:PLACES]]
    return (
        f"{path.name}, {unit}{'s' if len(shown) > 1 else ''} {', '.join(shown)}{', …' if len(index) > PLACES else ''}"
    )


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
        # From 2^53 a float may have lost digits: with its exponent nobody takes it for the identifier that it was.
        return str(int(value)) if abs(float(value)) < _EXACT else f"{float(value):.16e}"
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


def plain(words: pd.Series) -> pd.Series:
    """Text in which ``1.0`` and ``1`` are the same word: class and category names are compared in this form."""
    return words.astype("string").str.replace(r"^([+-]?\d+)\.0+$", r"\1", regex=True)


def to_numbers(column: pd.Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values float64 (NaN where missing), and a mask of cells that hold something other than a finite number."""
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


def header(path: Path, dialect: Dialect = PLAIN) -> list[str]:
    """Names of a table's columns, from the head of the file alone.

    Raises:
        DataError: no such file, no regular one, not readable by this account, or no table.
    """
    if is_workbook(path):
        return workbook.read_header(path, dialect.sheet)
    if not is_parquet(path):
        return read_names(path, dialect)
    with _opened_parquet(path) as file:
        return list(file.schema_arrow.names)


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


def is_parquet(path: Path) -> bool:
    """True for a Parquet file by its name; raises DataError for the name of no table."""
    name = path.name.lower()
    if not name.endswith((".csv", ".csv.gz", ".parquet", *workbook.SUFFIXES)):
        raise DataError(f"{path}: expected a .csv, .csv.gz, .parquet or .xlsx file")
    return name.endswith(".parquet")


def is_workbook(path: Path) -> bool:
    """True for a workbook by its name."""
    return path.name.lower().endswith(workbook.SUFFIXES)


@contextmanager
def _opened_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    bounds.require_file(path, "a table")
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_columns > bounds.TABLE_COLUMNS:
                raise DataError(f"{path}: {file.metadata.num_columns} columns, more than {bounds.TABLE_COLUMNS}")
            yield file
    except pa.ArrowException:
        raise DataError(f"{path}: no Parquet file, damaged or cut off") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'damaged'}") from None


def check_parquet(path: Path, wanted: Sequence[str]) -> int:
    """Number of rows of a Parquet file; raises DataError where it lacks a column, or holds more than ``bounds``."""
    with _opened_parquet(path) as file:
        schema = file.schema_arrow
        require(path, wanted, schema.names)
        for name in wanted:
            if pa.types.is_nested(schema.field(name).type):
                raise DataError(
                    f"{path}: column {name!r} is of type {schema.field(name).type}, where one value is meant"
                )
        rows = file.metadata.num_rows
        if rows > bounds.TABLE_ROWS:
            raise DataError(f"{path}: {rows} rows, more than {bounds.TABLE_ROWS}")
        if not rows:
            raise DataError(f"{path}: no row")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        if (
            sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in wanted)
            > bounds.TABLE_BYTES
        ):
            raise DataError(f"{path}: its columns take more than {bounds.TABLE_BYTES >> 20} MiB once unpacked")
    return int(rows)


def _parquet(path: Path, wanted: Sequence[str]) -> pa.Table:
    """The wanted columns of a Parquet file, one value a row; repeated text is measured before it is unpacked."""
    rows = check_parquet(path, wanted)
    with _opened_parquet(path) as file:
        schema = file.schema_arrow
    words = [name for name in wanted if is_text(schema.field(name).type)]
    with pq.ParquetFile(path, read_dictionary=words) as file, complaining(path):
        size = rows * 8 * len(wanted)
        columns: dict[str, pa.ChunkedArray] = {}
        for name in wanted:
            column = file.read(columns=[name]).column(name)
            size += text_bytes(column)
            if size > bounds.TABLE_BYTES:
                raise DataError(f"{path}: its columns take more than {bounds.TABLE_BYTES >> 20} MiB once unpacked")
            columns[name] = column.cast(schema.field(name).type) if pa.types.is_dictionary(column.type) else column
        return pa.table(columns)


def is_text(kind: pa.DataType) -> bool:
    """True for a column of text or bytes."""
    tests = pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary
    return any(test(kind) for test in tests)


def text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes that a column's text takes when every row has its own."""
    total = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type) and is_text(chunk.type.value_type):
            lengths = pc.binary_length(chunk.dictionary)
            total += pc.sum(pc.cast(lengths.take(chunk.indices), pa.int64())).as_py() or 0
    return total


@contextmanager
def complaining(path: Path) -> Iterator[None]:
    """Context in which Arrow's errors become errors of the file."""
    try:
        yield
    except pa.ArrowException:
        raise DataError(f"{path}: damaged or cut off") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'damaged'}") from None


def _csv(lines: Lines, wanted: Sequence[str], numbers: Sequence[str]) -> pa.Table:
    """The wanted columns of a CSV file, whose rows must all have as many fields as its header."""

    def read(numbers: Sequence[str]) -> pa.Table:
        return pa.Table.from_batches(csv_blocks(lines, wanted, numbers), _csv_schema(wanted, numbers))

    with complaining_csv(lines):
        try:
            table = read(numbers)
        except pa.ArrowInvalid as error:
            if "to double" not in str(error):
                raise
            table = read(())  # a word among the numbers: the caller sorts them out
    if table.num_rows != lines.rows:
        raise DataError(
            f"{lines.path}: its lines make {lines.rows} rows, and {table.num_rows} were read; it is damaged"
        )
    return table


def csv_blocks(lines: Lines, wanted: Sequence[str], numbers: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The wanted columns of a CSV file, block by block; raises Arrow's errors."""
    # A row must fit into a block; with threads a parser's error does not say which row.
    reading = pacsv.ReadOptions(use_threads=False, block_size=2 * lines.longest + BLOCK_BYTES)
    packing, dialect = "gzip" if lines.path.name.lower().endswith(".gz") else None, lines.dialect
    parsing = pacsv.ParseOptions(newlines_in_values=True, delimiter=dialect.delimiter)
    options = pacsv.ConvertOptions(
        include_columns=list(wanted),
        column_types=_csv_schema(wanted, numbers),
        null_values=list(MISSING),
        strings_can_be_null=True,
        decimal_point=dialect.decimal,
    )
    if dialect.encoding == "utf-8":
        with pa.input_stream(str(lines.path), compression=packing) as stream:
            yield from pacsv.open_csv(stream, reading, parsing, options)
    else:
        with opened(lines.path, dialect) as recoded:
            yield from pacsv.open_csv(pa.PythonFile(recoded, mode="r"), reading, parsing, options)


def _csv_schema(wanted: Sequence[str], numbers: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, pa.float64() if name in numbers else pa.string()) for name in wanted])


@contextmanager
def complaining_csv(lines: Lines) -> Iterator[None]:
    """Context in which Arrow's errors become errors of the file, without the parser's own words."""
    try:
        yield
    except pa.ArrowException as error:
        raise DataError(_complaint(lines, error)) from None
    except OSError as error:
        raise DataError(f"cannot read {lines.path}: {error.strerror or 'damaged'}") from None


def _complaint(lines: Lines, error: pa.ArrowException) -> str:
    """Complaint about a table, without the parser's own words, which quote the row."""
    row = re.search(r"Row #(\d+): Expected (\d+) columns, got (\d+)", str(error))
    if row:
        line = lines.of(int(row.group(1)) - 1)
        return f"{lines.path}, line {line}: {row.group(3)} fields where the header has {row.group(2)}"
    if "UTF8" in str(error):
        return (
            f"{lines.path}: not UTF-8 text; export the table as UTF-8, or say its encoding under csv: of the asset in "
            "site.yaml"
        )
    return f"{lines.path}: not a readable table (damaged)"
