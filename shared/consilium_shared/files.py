"""Durable files: what was written is there after a crash, whole, or the old content is."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

_TEMPORARY = re.compile(r"\.(?:.+\.)?[a-z0-9_]{8}", re.DOTALL)
"""Name of a temporary file as ``tempfile.mkstemp`` makes it here: hidden, and random at its end."""

_RECEIVED = re.compile(r"tmp[a-z0-9_]{8}\.dcm")


def leftovers(folder: Path) -> list[Path]:
    """Temporary files in a folder that have our names; no link, no folder, and nothing when there is no folder."""
    found = (each for each in folder.glob(".*") if _TEMPORARY.fullmatch(each.name))
    return sorted(each for each in found if each.is_file() and not each.is_symlink())


def received_halves(folder: Path) -> list[Path]:
    """Images in a folder under the names of ``tempfile``, which who receives them gives them until they are whole."""
    found = (each for each in folder.glob("tmp*.dcm") if _RECEIVED.fullmatch(each.name))
    return sorted(each for each in found if each.is_file() and not each.is_symlink())


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash in the middle of ``write_atomically`` left in a folder; nothing when there is no folder."""
    for leftover in leftovers(folder):
        leftover.unlink()


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` durably: temporary file beside it, fsync, rename, fsync of the folder."""
    write_pieces_atomically(path, (data,), mode)


def write_pieces_atomically(path: Path, pieces: Iterable[bytes | memoryview], mode: int = 0o600) -> None:
    """Write, as ``write_atomically``, something that is not in memory as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            for piece in pieces:
                file.write(piece)
            put_in_place(file, Path(temporary), path, mode)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def put_in_place(file: IO[bytes], temporary: Path, path: Path, mode: int = 0o600) -> None:
    """Make an open temporary file, beside ``path``, that file durably: fsync, rename, fsync of the folder."""
    file.flush()
    os.fchmod(file.fileno(), mode)
    os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
