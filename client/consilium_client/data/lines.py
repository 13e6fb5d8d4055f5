"""The lines of a CSV file held against its rows: where each row stands, and what a quotation mark swallowed."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pandas as pd

from consilium_client.data import bounds
from consilium_client.data.dialect import PLAIN, Dialect, Transcoded
from consilium_shared.errors import DataError

_BLOCK = 2**20
_NO_TABLES = {
    b"\x1f\x8b": "compressed with gzip; its name must end in .csv.gz",
    b"PK\x03\x04": "a zip file or an Excel workbook; the name of a workbook must end in .xlsx",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; export it as CSV",
    b"\xff\xfe": "UTF-16 text; export it as UTF-8, or say csv: {encoding: utf-16} of the asset in site.yaml",
    b"\xfe\xff": "UTF-16 text; export it as UTF-8, or say csv: {encoding: utf-16} of the asset in site.yaml",
    b"PAR1": "a Parquet file; its name must end in .parquet",
    b"\0": "damaged: it begins with zero bytes",
}
_MARKS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_COMMAS = 4
"""Lines in one quoted field that all have as many commas as a row, and so many in all, are no note of anybody's."""


_QUOTING = "A field that holds a quotation mark must stand in quotation marks, with the one that it holds doubled"
_UNCLOSED = "a quotation mark opens a field here, and nothing closes it"


@dataclass
class Lines:
    """Rows of a CSV file as its lines make them.

    Attributes:
        path: the file.
        dialect: how it is written.
        header: names of the columns.
        rows: number of rows below the header.
        longest: bytes that hold any of its rows.
        quoted: lines that stand inside a quoted field, as part of a row that began above them.
        first_quoted: the line at which the first such row begins.
    """

    path: Path
    dialect: Dialect = PLAIN
    header: list[str] = field(default_factory=list)
    rows: int = -1
    longest: int = 0
    quoted: int = 0
    first_quoted: int = 0
    _row: array[int] = field(default_factory=lambda: array("q"))
    _line: array[int] = field(default_factory=lambda: array("q"))

    def _begin(self, line: int) -> None:
        """A row begins at a line; what follows from the row before is not kept."""
        self.rows += 1
        if not self._row or line - self._line[-1] != self.rows - self._row[-1]:
            self._row.append(self.rows)
            self._line.append(line)

    def index(self, start: int = 0, end: int | None = None) -> pd.Index:
        """The line, from 1, of each row below the header from ``start`` to before ``end``, by default of all."""
        end = self.rows if end is None else end
        if len(self._row) <= 1:
            first = (self._line[0] if self._line else 1) + 1
            return pd.RangeIndex(first + start, first + end)
        rows, lines = np.asarray(self._row), np.asarray(self._line)
        wanted = np.arange(1 + start, end + 1)
        at = np.searchsorted(rows, wanted, side="right") - 1
        index: pd.Index = pd.Index(lines[at] + wanted - rows[at])
        return index

    def of(self, row: int) -> int:
        """The line of the row of that number, the header being 0."""
        at = int(np.searchsorted(np.asarray(self._row), row, side="right")) - 1
        return int(self._line[at] + row - self._row[at])


def read_lines(path: Path, on_progress: Callable[[int, int], None] | None = None, dialect: Dialect = PLAIN) -> Lines:
    """The lines of a whole CSV file against the rows that they make.

    Args:
        path: the file.
        on_progress: told ``(done, total)`` in bytes of the file.
        dialect: how the file is written.

    Raises:
        DataError: not a regular file, no text, larger than ``bounds`` allows, a quotation mark that nothing closes, or
            one that has swallowed rows. Names lines and counts, never the table's content.
    """
    found, mark = Lines(path, dialect), dialect.delimiter.encode()
    row: list[bytes] = []
    size, line = 0, 0
    with opened(path, dialect) as file:
        for chunk in _chunks(path, file, on_progress):
            found.longest = max(found.longest, min(len(chunk), bounds.ROW_BYTES))
            if not row and found.header and b'"' not in chunk and b"\n\n" not in chunk and chunk[:1] != b"\n":
                count = chunk.count(b"\n")  # nothing to look at: as many rows as lines
                found._begin(line + 1)
                found.rows, line = found.rows + count - 1, line + count
                continue
            for each in chunk[:-1].split(b"\n"):
                line += 1
                if not row and not each:
                    continue
                if not row:
                    found._begin(line)
                    size = 0
                row.append(each)
                size += len(each) + 1
                if size > bounds.ROW_BYTES:
                    raise DataError(f"{path}, line {line - len(row) + 1}: {_too_long(row)}")
                if b'"' in each or len(row) > 1:
                    end = _end_of_field(each, len(row) > 1, mark)
                    if end is None:
                        continue
                    if len(row) > 1:
                        _check_swallowed(found, row, line, spoilt=end)
                if not found.header:
                    found.header = _names(path, row, dialect)
                found.longest = max(found.longest, size)
                row = []
            if found.rows > bounds.TABLE_ROWS:
                raise DataError(f"{path}: more than {bounds.TABLE_ROWS} rows")
    if row:
        raise DataError(f"{path}, line {line - len(row) + 1}: {_UNCLOSED}; {len(row) - 1} lines follow it. {_QUOTING}")
    if not found.header:
        raise DataError(f"{path}: an empty file, where a table is meant")
    return found


def read_names(path: Path, dialect: Dialect = PLAIN) -> list[str]:
    """The names of a CSV file's columns, of which little more than the first row is read; raises as ``read_lines``."""
    row: list[bytes] = []
    mark = dialect.delimiter.encode()
    with opened(path, dialect) as file:
        for chunk in _chunks(path, file):
            for each in chunk[:-1].split(b"\n"):
                if not row and not each:
                    continue
                row.append(each)
                if _end_of_field(each, len(row) > 1, mark) is not None:
                    return _names(path, row, dialect)
    if row:
        raise DataError(f"{path}, line 1: {_UNCLOSED}. {_QUOTING}")
    raise DataError(f"{path}: an empty file, where a table is meant")


@contextmanager
def opened(path: Path, dialect: Dialect = PLAIN) -> Iterator[BinaryIO]:
    """A CSV file's bytes, unpacked where it is compressed; whatever fails is a DataError with the true cause."""
    bounds.require_file(path, "a table")
    packed = path.name.lower().endswith(".gz")
    try:
        with cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb") as file:
            yield file if dialect.encoding == "utf-8" else cast(BinaryIO, Transcoded(file, dialect.encoding))
    except UnicodeError:  # of UTF-16 without a byte order mark not the narrower one
        raise DataError(f"{path}: not {dialect.encoding} text, as site.yaml says") from None
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise DataError(f"cannot read {path}: no gzip file, damaged or cut off") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'damaged'}") from None


def _chunks(path: Path, file: BinaryIO, on_progress: Callable[[int, int], None] | None = None) -> Iterator[bytes]:
    """Whole lines, each ended by one newline, whatever ends them in the file; bounded in size."""
    packed = path.name.lower().endswith(".gz")
    most, whole = bounds.TABLE_BYTES, path.stat().st_size
    if packed:
        most = min(most, max(bounds.UNPACKED_FREELY, bounds.UNPACKED_TIMES * whole))
    rest, total, lines = b"", 0, 0
    while block := file.read(_BLOCK):
        if not total:
            wrong = next((why for magic, why in _NO_TABLES.items() if block.startswith(magic)), None)
            if wrong is not None:
                raise DataError(f"{path} is {wrong}")
            block = block.removeprefix(b"\xef\xbb\xbf")
        total += len(block)
        if on_progress is not None:
            on_progress(min(_position(file), whole), whole)
        if total > most:
            raise DataError(f"{path}: more than {most >> 20} MiB of text{_UNPACK if packed else ''}")
        rest += block
        held = rest.endswith(b"\r")  # the next block may begin with its newline
        text = rest[:-1] if held else rest
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = text.rfind(b"\n") + 1
        rest = text[cut:] + (b"\r" if held else b"")
        if len(rest) > bounds.ROW_BYTES:
            raise DataError(f"{path}, line {lines + 1}: longer than {bounds.ROW_BYTES >> 20} MiB")
        if cut:
            lines += text.count(b"\n")
            yield text[:cut]
    if rest:
        yield rest.replace(b"\r", b"\n") if rest.endswith(b"\r") else rest + b"\n"


def _position(file: BinaryIO) -> int:
    """Bytes of the file itself that were read, below what unpacks and recodes them."""
    while inner := getattr(file, "fileobj", None):
        file = inner
    return file.tell()


_UNPACK = f", more than {bounds.UNPACKED_TIMES} times the file; where that is right, unpack it and name the unpacked"


def _end_of_field(line: bytes, quoted: bool, mark: bytes) -> bool | None:
    """None where a line ends inside a quoted field; else whether text follows the mark that closed its first.

    A quotation mark opens a field only as its first character, and what follows a closed one is text: as the parser
    has it.
    """
    at, first, spoilt = 0, quoted, False
    while True:
        if quoted:
            at = line.find(b'"', at)
            if at < 0:
                return None
            if line[at + 1 : at + 2] == b'"':
                at += 2
                continue
            quoted, at = False, at + 1
            spoilt |= first and line[at : at + 1] not in (b"", mark)
            first = False
        elif line[at : at + 1] == b'"':
            quoted, at = True, at + 1
            continue
        at = line.find(mark, at) + 1
        if not at:
            return spoilt


def _check_swallowed(found: Lines, row: list[bytes], line: int, spoilt: bool) -> None:
    """Counts the lines inside a quoted field; raises DataError where they were rows before a stray mark took them."""
    inside, begin = len(row) - 1, line - len(row) + 1
    found.quoted += inside
    found.first_quoted = found.first_quoted or begin
    columns, mark = len(found.header), found.dialect.delimiter.encode()
    alike = inside * (columns - 1) >= _COMMAS and all(each.count(mark) == columns - 1 for each in row)
    if spoilt or alike:
        why = "text follows the mark that closes it" if spoilt else f"each has {columns} fields, as a row has"
        raise DataError(
            f"{found.path}, line {begin}: a quotation mark opens a field here that ends in line {line}, and {why}; it "
            f"would swallow {inside} lines. {_QUOTING}"
        )


def _too_long(row: list[bytes]) -> str:
    what = f"a row longer than {bounds.ROW_BYTES >> 20} MiB"
    return f"{what}: {_UNCLOSED}. {_QUOTING}" if len(row) > 1 else what


def _names(path: Path, row: list[bytes], dialect: Dialect) -> list[str]:
    try:
        text = b"\n".join(row).decode()
        names = next(csv.reader((line + "\n" for line in text.split("\n")), delimiter=dialect.delimiter))
    except (UnicodeDecodeError, csv.Error, StopIteration):
        raise DataError(
            f"{path}: its first line is no header in UTF-8; export the table as UTF-8 text, or say its "
            "encoding under csv: of the asset in site.yaml"
        ) from None
    if len(names) > bounds.TABLE_COLUMNS:
        raise DataError(f"{path}: {len(names)} columns, more than {bounds.TABLE_COLUMNS}")
    if len(names) == 1 and (marks := re.findall(r"[,;\t|]", names[0])):
        meant = _MARKS.get(dialect.delimiter, repr(dialect.delimiter))
        raise DataError(
            f"{path}: {_MARKS[marks[0]]} stand between the names of its first line, where {meant} are meant; say "
            f"csv: {{delimiter: {json.dumps(marks[0])}}} of the asset in site.yaml"
        )
    return names
