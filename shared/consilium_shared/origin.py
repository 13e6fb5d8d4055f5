"""Card of weights that a study starts from: whose data made them, in the words of the person who imported them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from consilium_shared.config import Strict
from consilium_shared.fields import Hex32


def _line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("a single line of printable text, without spaces at its ends")
    return text


Words = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_line)]


class Origin(Strict):
    """Card of imported weights. It stands in the contract, so a hospital approves its words with the digest.

    Nobody but the person who imported them has checked it.
    """

    source: Words
    """Publisher of the weights, and their name."""
    licence: Words
    data: Words
    """Data that made the weights, and whose data they are."""
    url: Words | None = None
    imported_by: Words
    imported: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """Date, in UTC."""
    file: Hex32
    """SHA-256 of the file that was imported."""

    def lines(self) -> Iterator[str]:
        """Lines that say it to people."""
        yield f"made of: {self.data}"
        yield f"from: {self.source}" + (f", {self.url}" if self.url else "")
        yield f"licence: {self.licence}"
        yield f"imported by {self.imported_by} on {self.imported}, of the file with SHA-256 {self.file}"


UNKNOWN = "nothing is said of whose data made them"
"""Words for weights that have no card."""
