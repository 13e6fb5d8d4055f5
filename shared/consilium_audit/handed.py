"""Files that somebody handed over: read where they are ordinary ones of bounded size, refused by name where not.

A FIFO would hold the program up, a link lead out of the folder, a huge file fill the memory. Every file of the evidence
is opened here, and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from consilium_shared.errors import PeerError
from consilium_shared.limits import CHUNK_BYTES, FILE_BYTES

MOST_FILES = 20_000
"""Most names in a folder that are looked at; a study has at most 10,000 rounds, and a hundred sites."""

_KINDS = (
    (stat.S_ISLNK, "a link: put the file itself there"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


def there(file: Path) -> bool:
    """True where anything has that name, also a link to nothing, a FIFO or a folder."""
    return _mode(file) is not None


def read_file(file: Path, limit: int = FILE_BYTES) -> bytes:
    """The bytes of an ordinary file of at most ``limit``.

    Raises:
        PeerError: it is no ordinary file, or larger.
        OSError: it cannot be read.
    """
    with _opened(file, limit) as data:
        return b"".join(_pieces(data, limit))


def read_lines(file: Path, longest: int, limit: int) -> Iterator[bytes]:
    """The lines of an ordinary file of at most ``limit`` bytes, with their newlines, one after the other.

    A line of more than ``longest`` bytes comes in pieces of one byte more, without a newline.

    Raises:
        PeerError, OSError: as ``read_file``.
    """
    with _opened(file, limit) as data:
        left = limit
        while line := data.readline(longest + 1):
            left -= len(line)
            if left < 0:
                raise _too_large(limit)
            yield line


def sha256_of(file: Path, limit: int = FILE_BYTES) -> str:
    """The SHA-256 of an ordinary file of at most ``limit`` bytes, 64 hex digits; raises as ``read_file``."""
    found = hashlib.sha256()
    with _opened(file, limit) as data:
        for piece in _pieces(data, limit):
            found.update(piece)
    return found.hexdigest()


def size_of(file: Path) -> int:
    """Bytes of a file, as its folder says; of a link its own. Raises OSError where there is none."""
    return file.lstat().st_size


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted, but for hidden ones; none where there is no such folder.

    Raises:
        PeerError: it is no folder (a link to one is none), or has more than ``MOST_FILES``.
        OSError: it cannot be read.
    """
    mode = _mode(folder)
    if mode is None:
        return []
    if not stat.S_ISDIR(mode):
        raise PeerError("not a folder" if not stat.S_ISLNK(mode) else "a link: put the folder itself there")
    found: list[str] = []
    with os.scandir(folder) as inside:
        for entry in inside:
            if not entry.name.startswith("."):
                found.append(entry.name)
            if len(found) > MOST_FILES:
                raise PeerError(f"it has more than {MOST_FILES} files")
    return sorted(found)


def _mode(file: Path) -> int | None:
    try:
        return file.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _opened(file: Path, limit: int) -> Iterator[BinaryIO]:
    _demand_ordinary(file.lstat(), limit)  # before it is opened: to open a device may do something
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as data:
        _demand_ordinary(os.fstat(data.fileno()), limit)
        yield data


def _demand_ordinary(about: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(about.st_mode):
        kind = next((word for is_it, word in _KINDS if is_it(about.st_mode)), "a device")
        raise PeerError(f"not an ordinary file, but {kind}")
    if about.st_size > limit:
        raise _too_large(limit)


def _pieces(data: BinaryIO, limit: int) -> Iterator[bytes]:
    left = limit
    while piece := data.read(CHUNK_BYTES):
        left -= len(piece)
        if left < 0:  # it grew
            raise _too_large(limit)
        yield piece


def _too_large(limit: int) -> PeerError:
    return PeerError(f"larger than {limit} bytes")
