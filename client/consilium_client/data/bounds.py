"""Bounds of what a foreign file may make this process read, hold or compute: a bomb is set aside, never unpacked."""

from __future__ import annotations

import stat
from pathlib import Path

from consilium_shared.errors import DataError

TABLE_BYTES = 16 * 2**30
"""Text of a table, or what a Parquet file's columns take once unpacked."""
BATCH_BYTES = 2**30
"""Text of one batch of a table that is read in batches."""
TABLE_ROWS = 500_000_000
TABLE_COLUMNS = 10_000
ROW_BYTES = 64 * 2**20
"""One row of a CSV file, with all its lines."""
UNPACKED_FREELY = 64 * 2**20
"""Bytes that any compressed table may unpack to; beyond, at most ``UNPACKED_TIMES`` the size of its file."""
UNPACKED_TIMES = 100
FILES = 5_000_000
"""Files in one folder of images."""


def kind_of(mode: int) -> str:
    """Kind of a file by its ``st_mode``. Reading a pipe or a device might never end."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "a file")


def require_file(path: Path, wanted: str) -> int:
    """The size in bytes of a regular file; raises DataError for anything else, without opening it."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'damaged'}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is {kind_of(found.st_mode)}, where {wanted} is meant")
    return found.st_size
