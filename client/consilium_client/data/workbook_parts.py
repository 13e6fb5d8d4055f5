"""Parts of a workbook, looked through once before anything is built of them: a bomb is found as a stream, in no memory.

A workbook is a zip file of XML. The library that reads it builds a tree of each row, fills gaps between the numbers of
rows, leaves out rows and cells that are out of order, and takes the entities of a document type. So a part is refused
if it has a document type, an element deeper or longer than any workbook has, more rows, cells or strings than fit, or
rows or cells out of order.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO
from xml.parsers import expat

from consilium_client.data import bounds
from consilium_shared.errors import DataError

ROWS = 2**20
"""Rows of a sheet, as Excel has it; also the most elements beside rows and strings."""
STRINGS = 2**25
"""Texts that cells share."""
INSIDE = 16 * bounds.TABLE_COLUMNS
"""Elements in one row or in one shared text."""
DEPTH = 64
ELEMENT_BYTES = 2**20
"""From one element to the next. A cell of Excel has 32,767 characters at most."""
SHEETS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_PIECE = 2**16
_CELL = re.compile("([A-Z]{1,3})[0-9]+")


def check(path: Path, packed: zipfile.ZipFile) -> None:
    """Look through the parts of a workbook.

    Args:
        path: of the workbook, for the error.
        packed: the workbook, whose unpacked size was looked at.

    Raises:
        DataError: a part of it is refused; the text says which and why.
        zipfile.BadZipFile, OSError, zlib.error: it is damaged.
    """
    for part in packed.infolist():
        if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path}: compressed in a way that workbooks are not")
        if part.filename.lower().endswith((".xml", ".rels")):
            with packed.open(part) as file:
                try:
                    _Part().read(file)
                except _Refused as error:
                    raise DataError(f"{path}: its part {Path(part.filename).name!r} has {error}") from None
                except expat.ExpatError:
                    raise DataError(f"{path}: its part {Path(part.filename).name!r} is damaged") from None


class _Refused(Exception):
    """Something in a part that no workbook has."""


class _Part:
    """One part, while it is read."""

    def __init__(self) -> None:
        self._depth = self._rows = self._strings = self._others = self._inside = 0
        self._at, self._cell, self._row = 0, (0, ""), 0
        self._record = 0  # depth of the row or shared text that is open; 0 for none
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.StartDoctypeDeclHandler = self._type
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end

    def read(self, file: IO[bytes]) -> None:
        """Read to the end; raises _Refused or ExpatError."""
        fed = 0
        while piece := file.read(_PIECE):
            fed += len(piece)
            self._parser.Parse(piece, False)
            if max(fed - self._parser.CurrentByteIndex, self._parser.CurrentByteIndex - self._at) > ELEMENT_BYTES:
                raise _Refused(f"an element of more than {ELEMENT_BYTES >> 20} MiB")
        self._parser.Parse(b"", True)

    def _type(self, *_: object) -> None:
        raise _Refused("a document type, which may define entities")

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth, self._at = self._depth + 1, self._parser.CurrentByteIndex
        if self._depth > DEPTH:
            raise _Refused(f"elements more than {DEPTH} deep")
        space, _, name = tag.rpartition(" ")
        if self._record:
            self._inside += 1
            if self._inside > INSIDE:
                raise _Refused(f"a row or a text of more than {INSIDE} elements")
            if name == "c" and (place := attributes.get("r")):
                self._order(place)
        elif name == "row" and space == SHEETS:
            self._open()
            self._count(attributes.get("r"))
        elif name == "si" and space == SHEETS:
            self._open()
            self._strings += 1
            if self._strings > STRINGS:
                raise _Refused(f"more than {STRINGS} texts")
        else:
            self._others += 1
            if self._others > ROWS:
                raise _Refused(f"more than {ROWS} elements beside rows and texts")

    def _end(self, _: str) -> None:
        if self._depth == self._record:
            self._record = 0
        self._depth -= 1

    def _open(self) -> None:
        self._record, self._inside, self._cell = self._depth, 0, (0, "")

    def _count(self, number: str | None) -> None:
        """The row's number, counted on where it has none."""
        try:
            row = self._row + 1 if number is None else int(number)
        except ValueError:
            raise _Refused("a row whose number is none") from None
        if row <= self._row:
            raise _Refused("rows that are out of order")
        if row > ROWS:
            raise _Refused(f"a row beyond the {ROWS}th")
        self._row = row

    def _order(self, place: str) -> None:
        found = _CELL.fullmatch(place)
        if found is None:
            raise _Refused("a cell whose place is none")
        column = len(found[1]), found[1]
        if column <= self._cell:
            raise _Refused("cells of a row that are out of order")
        self._cell = column
