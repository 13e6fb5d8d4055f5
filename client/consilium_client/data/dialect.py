"""Dialect of a site's tables: how its CSV files are written, and which sheet of a workbook is meant."""

from __future__ import annotations

import codecs
import io
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from consilium_shared.config import Strict


def _encoding(name: str) -> str:
    """Name of a text encoding that Python knows."""
    try:
        found = codecs.lookup(name)
        "a".encode(name)
    except (LookupError, ValueError, TypeError):
        raise ValueError(f"no encoding {name!r} is known; for example utf-8, cp1252, latin-1, utf-16") from None
    return found.name


class Dialect(Strict):
    """Dialect of an asset's tables, the ``csv:`` of an asset in ``site.yaml``.

    >>> Dialect(delimiter=";", decimal=",", encoding="cp1252").plain
    False
    """

    delimiter: Annotated[str, Field(pattern=r"^[\t !#$%&*+,/:;<=>?@^_|~-]$")] = ","
    """Character between two fields."""
    decimal: Literal[".", ","] = "."
    """Mark before a number's decimals. With a comma a point in a number is an error, never a thousand."""
    encoding: Annotated[str, AfterValidator(_encoding)] = "utf-8"
    """Encoding of the text, as Python names it."""
    sheet: str | None = None
    """Sheet of an Excel workbook; its first where none is named."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.delimiter == self.decimal:
            raise ValueError("delimiter and decimal are the same character")
        return self

    @property
    def plain(self) -> bool:
        """True for CSV with commas, points and UTF-8."""
        return (self.delimiter, self.decimal, self.encoding) == (",", ".", "utf-8")


PLAIN = Dialect()


class Transcoded(io.RawIOBase):
    """Stream of UTF-8 from a file in another encoding, decoded piece by piece; raises UnicodeDecodeError."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        super().__init__()
        self.fileobj = file
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._rest = b""

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with UTF-8; returns how many bytes, 0 at the end."""
        while not self._rest:
            block = self.fileobj.read(max(len(buffer), 4096))
            self._rest = self._decoder.decode(block, final=not block).encode()
            if not block:
                break
        piece, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)
