"""Reading named columns of a table in batches of rows: memory holds a batch, however long the table is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from consilium_client.data import bounds, columns
from consilium_client.data.dialect import PLAIN, Dialect
from consilium_client.data.lines import Lines, read_lines
from consilium_client.data.report import SetAside
from consilium_shared.errors import DataError

ROWS = 2**18
"""Rows of a batch of a Parquet file; one of a CSV file is a block of text."""


def read_batches(
    path: Path,
    text: Collection[str],
    numbers: Sequence[str],
    notes: SetAside,
    on_progress: Callable[[int, int], None] | None = None,
    dialect: Dialect = PLAIN,
) -> Iterator[pd.DataFrame]:
    """Batches of a table's rows, in the file's order: together what ``columns.read_columns`` gives.

    Args:
        path: the file; ``text``, ``numbers``, ``notes``: as for ``columns.read_columns``.
        on_progress: called with ``(done, total)`` in bytes of a CSV file while its lines are counted, then in rows.
        dialect: of CSV files, and the sheet of a workbook, which is one batch.

    Raises:
        DataError: as ``columns.read_columns``, where the damage lies before the next batch.
    """
    wanted = list(dict.fromkeys([*text, *numbers]))
    numbers = [name for name in numbers if name not in text]
    done = 0
    if columns.is_workbook(path):
        yield columns.read_columns(path, text, numbers, notes, on_progress, dialect)
        return
    if columns.is_parquet(path):
        rows, index_of = columns.check_parquet(path, wanted), _rows_from_one
        tables = _parquet(path, wanted)
    else:
        lines = read_lines(path, on_progress, dialect)
        columns.require(path, wanted, lines.header)
        if not lines.rows:
            raise DataError(f"{path}: no row below the header")
        columns.note_quoted(lines, notes)
        rows, index_of = lines.rows, lines.index
        tables = _csv(lines, wanted, numbers)
    for table in tables:
        if table.num_rows:
            frame = columns.frame_of(table, text)
            frame.index = index_of(done, done + len(frame))
            done += len(frame)
            yield frame
            if on_progress is not None:
                on_progress(min(done, rows), rows)
    if done != rows:
        raise DataError(f"{path}: {rows} rows were meant, and {done} were read; it is damaged")


def _rows_from_one(start: int, end: int) -> pd.Index:
    return pd.RangeIndex(start + 1, end + 1)


def _csv(lines: Lines, wanted: Sequence[str], numbers: Sequence[str]) -> Iterator[pa.Table]:
    """Blocks of a CSV file. From the first word among the numbers on, all columns are text, which ``to_numbers`` reads
    as the same numbers, bit for bit."""
    read = 0
    with columns.complaining_csv(lines):
        try:
            for batch in columns.csv_blocks(lines, wanted, numbers):
                read += batch.num_rows
                yield pa.Table.from_batches([batch])
            return
        except pa.ArrowInvalid as error:
            if "to double" not in str(error):
                raise
        skip = read
        for batch in columns.csv_blocks(lines, wanted, ()):
            if batch.num_rows > skip:
                yield pa.Table.from_batches([batch.slice(skip)])
            skip = max(0, skip - batch.num_rows)


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[pa.Table]:
    """Batches of a Parquet file, whose repeated text is measured before it is unpacked."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
    words = [name for name in wanted if columns.is_text(schema.field(name).type)]
    # Read ahead, a file's pieces would all stay in memory until its end.
    with pq.ParquetFile(path, read_dictionary=words, pre_buffer=False) as file, columns.complaining(path):
        for batch in file.iter_batches(batch_size=ROWS, columns=list(wanted)):
            found: dict[str, pa.ChunkedArray] = {}
            size = 0
            for name in wanted:
                column = pa.chunked_array([batch.column(name)])
                size += columns.text_bytes(column)
                if size > bounds.BATCH_BYTES:
                    raise DataError(f"{path}: {ROWS} rows take more than {bounds.BATCH_BYTES >> 20} MiB once unpacked")
                found[name] = column.cast(schema.field(name).type) if pa.types.is_dictionary(column.type) else column
            yield pa.table(found)
