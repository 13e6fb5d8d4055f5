"""The SuperLink's database, whole before Flower opens it: migrated beside and renamed, made anew when it is damaged.

Flower migrates its SQLite file in place, statement by statement, and cannot go on with a migration that was stopped:
a server that is killed in its first seconds would never start again. The file holds messages in transit, runs and the
list of SuperNodes. What was in transit is asked for again, and answered with the same bytes; runs are started again;
the list follows the roster. So nothing is lost with the file, and what is not whole is deleted, never repaired.

Leans on these internals of flwr 1.41 (pinned): ``state.alembic.utils.build_alembic_config``, whose migrations run on a
connection that is handed to them, and that a database at their newest revision is opened without another one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consilium_shared.errors import ConfigurationError
from consilium_shared.files import put_in_place

logger = logging.getLogger(__name__)

COMPANIONS = ("-wal", "-shm", "-journal")
"""Suffixes of files SQLite keeps beside one. Left alone, the log of a gone database is played into its successor."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def make_whole(database: Path) -> None:
    """Leave at ``database`` a whole one of this release: that which is there, or a new one.

    To be called by one process at a time. It may be killed at any moment: until the new file is renamed, the next
    call begins again.

    Raises:
        ConfigurationError: the file cannot be read or written, and not because it is damaged.
    """
    new = database.with_name(database.name + ".new")
    try:
        _delete(new)
        fault = _fault(database)
        if fault is None:
            return
        if database.exists():
            logger.warning(
                "%s %s. It is made anew; nothing is lost: what was in transit is asked for again, and the SuperNodes "
                "are registered again from the roster",
                database,
                fault,
            )
        _migrate(new)
        _delete(database)
        with new.open("rb") as file:
            put_in_place(file, new, database)
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(
            f"{database} cannot be read or written ({error}). Look at the disk and at the folder's rights."
        ) from None


def is_damage(error: BaseException) -> bool:
    """True for an error of SQLite's that says that the file itself is damaged."""
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED


def watch_for_damage(found: Callable[[], None]) -> None:
    """Call ``found`` whenever a statement of this process's Flower meets a damaged file; in that statement's thread."""
    from sqlalchemy import Engine, event

    def look(context: Any) -> None:
        if is_damage(context.original_exception):
            found()

    event.listen(Engine, "handle_error", look)


def _fault(database: Path) -> str | None:
    """A predicate that says why the file cannot be used; None where it can."""
    if not database.exists():
        return "is missing"
    try:
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                return f"is damaged ({found})"
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            revisions = set()
            if "alembic_version" in tables:
                revisions = {name for (name,) in connection.execute("SELECT version_num FROM alembic_version")}
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return f"is damaged ({error})"
    if revisions != _newest():
        return "was not made whole, or is of another release"
    return None


def _newest() -> set[str]:
    from alembic.script import ScriptDirectory
    from flwr.supercore.state.alembic.utils import build_alembic_config
    from sqlalchemy import create_engine

    return set(ScriptDirectory.from_config(build_alembic_config(create_engine("sqlite://"))).get_heads())


def _migrate(database: Path) -> None:
    """Run all of Flower's migrations on a new file, which nothing else opens."""
    from alembic import command
    from flwr.supercore.state.alembic.utils import build_alembic_config
    from sqlalchemy import create_engine

    os.close(os.open(database, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    engine = create_engine(f"sqlite:///{database}")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA synchronous = OFF")  # it is made durable when it is whole
            configuration = build_alembic_config(engine)
            configuration.attributes["connection"] = connection
            command.upgrade(configuration, "heads")
            connection.commit()
    finally:
        engine.dispose()


def _delete(database: Path) -> None:
    """Delete a database and what belongs to it; the log last, or a killed deletion would leave a file without it."""
    for suffix in ("", *COMPANIONS):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
