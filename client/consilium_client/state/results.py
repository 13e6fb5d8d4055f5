"""Store of a round's update and counts, from before the charge is settled until the secure sum was opened.

So that an attempt which was abandoned unopened can be repeated with the very same update, on the same charge. The file
is the one place where an update lies readable: in this site's own store, mode 0600.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.config import Strict
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.fields import Hex32
from consilium_shared.files import remove_leftovers, write_pieces_atomically
from consilium_shared.secagg.terms import Purpose

PIECE_BYTES = 1 << 20
DIGEST_BYTES = 32


class About(Strict):
    """Subject of a result.

    ``attempt`` is the first that it was made for; ``counted`` whether the counts are this site's, or zeros since
    it lets none leave; ``epsilon`` what the coordinator is told (``messages.Update``).
    """

    purpose: Purpose
    round: Annotated[int, Field(ge=1, le=limits.ROUNDS)]
    attempt: Annotated[int, Field(ge=1, le=limits.ATTEMPTS)]
    model: Hex32
    weight: Annotated[int, Field(ge=0, le=limits.WEIGHT)]
    counted: bool
    epsilon: float | None
    parameters: Annotated[int, Field(ge=0, le=limits.PARAMETERS)]
    counts: Annotated[int, Field(ge=0)]
    """Length of the counts; 0 where none were asked for."""
    integers: bool = False
    """Mark of an update that is the integers of a study with ``privacy.sums``, to be masked as they are."""


@dataclass(frozen=True)
class Result:
    """A result on the disk.

    Attributes:
        sha256: of the whole file but itself.
    """

    about: About
    sha256: str
    _file: Path
    _start: int

    def update(self, start: int, length: int) -> npt.NDArray[np.float32]:
        """Coordinates of the bounded update, float32 [length]."""
        return np.fromfile(self._file, dtype="<f4", count=length, offset=self._start + 4 * start)

    def integers(self, start: int, length: int) -> npt.NDArray[np.uint32]:
        """Integers of a study with ``privacy.sums``, uint32 [length]."""
        return np.fromfile(self._file, dtype="<u4", count=length, offset=self._start + 4 * start)

    def counts(self) -> npt.NDArray[np.int64]:
        """The counts, int64; empty where none were asked for."""
        at = self._start + 4 * self.about.parameters
        return np.fromfile(self._file, dtype="<i8", count=self.about.counts, offset=at)


class Results:
    """At most one result a study and purpose: that of the round that was worked on last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_leftovers(folder)

    def put(
        self,
        study: str,
        about: About,
        update: npt.NDArray[np.float32] | npt.NDArray[np.uint32],
        counts: npt.NDArray[np.int64] | None,
    ) -> Result:
        """Keep a result durably; whatever was kept before for the purpose is gone."""
        line = canonical_bytes(about.model_dump(mode="json")) + b"\n"
        pieces: list[bytes | memoryview] = [line, update.astype("<u4" if about.integers else "<f4", copy=False).data]
        if counts is not None:
            pieces.append(counts.astype("<i8").data)
        hashing = hashlib.sha256()
        write_pieces_atomically(self._file(study, about.purpose), _with_digest(pieces, hashing))
        return Result(about, hashing.hexdigest(), self._file(study, about.purpose), len(line))

    def get(self, study: str, purpose: Purpose, number: int) -> Result | None:
        """The result of a round, its file verified; None where it is of another round, or there is none.

        Raises:
            IntegrityError: it is damaged.
        """
        file, (about, start) = self._file(study, purpose), self._first_line(study, purpose)
        if about is None or about.round != number:
            return None
        size = start + 4 * about.parameters + 8 * about.counts + DIGEST_BYTES
        sha256 = _verified(file)
        if sha256 is None or file.stat().st_size != size:
            raise IntegrityError(
                f"the stored result {file} is damaged; move it away, and the round's next attempt is worked on anew"
            )
        return Result(about, sha256, file, start)

    def about(self, study: str, purpose: Purpose) -> About | None:
        """Subject of a result, as it says itself, before it is verified; None where there is none that can be read."""
        return self._first_line(study, purpose)[0]

    def _first_line(self, study: str, purpose: Purpose) -> tuple[About | None, int]:
        """Contents of the first line, and its length in bytes."""
        try:
            with self._file(study, purpose).open("rb") as stream:
                line = stream.readline(PIECE_BYTES)
            return About.model_validate(parse_canonical(line.rstrip(b"\n"))), len(line)
        except (FileNotFoundError, PeerError, ValidationError):
            return None, 0

    def forget(self, study: str) -> None:
        """Delete what is kept of a study."""
        for file in self.folder.glob(f"{study}.*"):
            file.unlink()

    def drop(self, study: str, purpose: Purpose) -> None:
        """Delete a result that must not be used any more."""
        self._file(study, purpose).unlink(missing_ok=True)

    def _file(self, study: str, purpose: Purpose) -> Path:
        return self.folder / f"{study}.{purpose}"


def _with_digest(pieces: Iterable[bytes | memoryview], hashing: hashlib._Hash) -> Iterator[bytes | memoryview]:
    for piece in pieces:
        hashing.update(piece)
        yield piece
    yield hashing.digest()


def _verified(file: Path) -> str | None:
    """The digest that the file ends with, if it is that of all before it."""
    hashing = hashlib.sha256()
    with file.open("rb") as stream:
        left = file.stat().st_size - DIGEST_BYTES
        while left > 0:
            piece = stream.read(min(PIECE_BYTES, left))
            hashing.update(piece)
            left -= len(piece)
        return hashing.hexdigest() if stream.read() == hashing.digest() else None
