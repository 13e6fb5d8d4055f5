"""The SuperLink's SQLite file keeps nothing that was delivered: deleted bytes are overwritten, their room given back.

Stock Flower deletes a message once it was delivered, but SQLite only marks the pages as free: the bytes stay, and the
file is never smaller than the most that was ever in transit.

Leans on these internals of flwr 1.41 (pinned): ``sql_mixin.SQLITE_PRAGMAS``, which it reads for each connection; that
all its state is in one SQLite file, in WAL mode; that its requests work on it in the threads of anyio's limiter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from consilium_server.superlink.database import is_damage

logger = logging.getLogger(__name__)

LOOK_S = 3.0
"""Seconds between two looks at the file. It is quiet when no page became free or was used again in between."""
LEAST_BYTES = 1024 * 1024
"""Least free space in the file, in bytes, that is worth rewriting it."""


def prepare_store(database: Path) -> None:
    """Before flwr opens its database: deleted content is overwritten with zeros, and SQLite's own files stay here.

    Overwriting 1 MB takes 5 to 10 ms; carrying it through the SuperLink takes 50 ms and more.
    """
    from flwr.supercore import sql_mixin

    stock = sql_mixin.SQLITE_PRAGMAS  # type: ignore[attr-defined]
    sql_mixin.SQLITE_PRAGMAS = (*stock, ("secure_delete", "ON"))  # type: ignore[assignment, attr-defined]
    os.environ["SQLITE_TMPDIR"] = str(database.parent)  # not /var/tmp: a rewriting copies messages in transit


async def keep_small(database: Path, damaged: Callable[[], None]) -> None:
    """Look again and again; to be run as a task beside the servers. One look works in the requests' own turn.

    Args:
        database: Flower's.
        damaged: called where the file is found to be damaged, which ends the looking.
    """
    from anyio.to_thread import run_sync

    free = 0
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            free = await run_sync(give_back, database, free)
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                damaged()
                return
            logger.warning("the store was not made smaller: %s", error)


def give_back(database: Path, free_before: int) -> int:
    """Make the file as small as its content, and empty the write-ahead log, in a quiet moment.

    The file is rewritten (VACUUM) only when more than half of it is free, so that the work is never more than what
    was deleted. (Measured for 400 MB free and little content: 10 ms. Incremental vacuum, which frees one page a
    statement from Python and searches the list of free ones for it, took 50 s.)

    Args:
        database: Flower's; nothing happens before it exists.
        free_before: what this function returned at the last look.

    Returns:
        Free pages that are left.

    Raises:
        sqlite3.OperationalError: the file is locked, or the disk is full. It is unchanged.
    """
    if not database.exists():
        return 0
    with contextlib.closing(sqlite3.connect(database, timeout=1, isolation_level=None)) as connection:
        free, pages, page_bytes = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("freelist_count", "page_count", "page_size")
        )
        if free != free_before:
            return free
        if free * page_bytes > LEAST_BYTES and free > pages - free:
            connection.execute("VACUUM")
            free = 0
        log = database.with_name(database.name + "-wal")
        if log.exists() and log.stat().st_size:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return free
