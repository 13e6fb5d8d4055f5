"""The SuperLink's file: of what was delivered no byte stays, and the file is as small as what is left."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore import sql_mixin
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from consilium_server.superlink.store import give_back, prepare_store
from consilium_server.transport.study_run import content_of

MARK = secrets.token_bytes(32)
LARGE = b"".join(MARK + secrets.token_bytes(10**6) for _ in range(12))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pragmas = vars(sql_mixin)["SQLITE_PRAGMAS"]
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", pragmas)
    monkeypatch.setitem(os.environ, "SQLITE_TMPDIR", "")
    prepare_store(tmp_path / "state.db")
    return tmp_path / "state.db"


@pytest.fixture
def store(database: Path) -> Iterator[SqlObjectStore]:
    """Flower's own store, open meanwhile as in the SuperLink."""
    opened = SqlObjectStore(str(database))
    opened.initialize()
    yield opened
    assert opened._engine is not None
    opened._engine.dispose()


def put(store: SqlObjectStore, payload: bytes, question: str = "0" * 64) -> str:
    """Keep a message with this payload; its id."""
    content: RecordDict = content_of(b"header", payload, {})
    message = make_message(Metadata(1, "", 2, 1, question, "", 0.0, 60.0, "train"), content)
    store.preregister(1, get_object_tree(message))
    for each, found in get_all_nested_objects(message).items():
        store.put(each, found.deflate())
    return message.object_id


def size(database: Path) -> int:
    return sum(file.stat().st_size for file in database.parent.glob("state.db*"))


def look(database: Path, times: int = 3) -> int:
    free = 0
    for _ in range(times):
        free = give_back(database, free)
    return free


def holds(database: Path, mark: bytes) -> bool:
    return any(mark in file.read_bytes() for file in database.parent.iterdir())


def test_after_a_delivery_the_file_is_small_again_and_holds_no_byte_of_it(
    database: Path, store: SqlObjectStore
) -> None:
    look(database)
    empty = size(database)
    message = put(store, LARGE)
    assert holds(database, MARK) and size(database) > len(LARGE)
    store.delete(message)
    assert len(store) == 0
    look(database)
    assert size(database) <= empty + 64 * 1024 and not holds(database, MARK)


def test_a_small_message_is_overwritten_too(database: Path, store: SqlObjectStore) -> None:
    message = put(store, MARK)
    assert holds(database, MARK)
    store.delete(message)
    look(database)
    assert not holds(database, MARK)


def test_deleted_bytes_are_overwritten_before_their_room_is_given_back(database: Path, store: SqlObjectStore) -> None:
    kept = put(store, LARGE, "1" * 64)
    store.delete(put(store, MARK * 100_000))
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        assert connection.execute("PRAGMA freelist_count").fetchone()[0] > 700
    assert MARK * 3 not in database.read_bytes()
    assert kept in store


def test_what_is_in_transit_is_kept_when_the_file_is_rewritten(database: Path, store: SqlObjectStore) -> None:
    kept = put(store, MARK, "1" * 64)
    store.delete(put(store, LARGE))
    look(database)
    assert size(database) < 2_000_000 and holds(database, MARK)
    content = store.get(kept)
    assert content is not None and content.startswith(b"Message ")


def test_the_file_is_left_alone_while_room_is_used_again_and_while_most_of_it_is_in_use(
    database: Path, store: SqlObjectStore
) -> None:
    kept = put(store, LARGE, "1" * 64)
    store.delete(put(store, LARGE[:5_000_000]))
    before = database.stat().st_size
    assert look(database) > 1000 and database.stat().st_size == before
    store.delete(kept)
    free = give_back(database, 0)
    assert free > 1000 and database.stat().st_size == before  # it changed since the last look
    assert give_back(database, free) == 0 and database.stat().st_size < before


def test_nothing_is_made_where_flower_has_no_file_yet(tmp_path: Path) -> None:
    assert give_back(tmp_path / "state.db", 0) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_locked_file_is_unchanged(database: Path, store: SqlObjectStore) -> None:
    store.delete(put(store, LARGE))
    free = give_back(database, 0)
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            give_back(database, free)
        other.execute("ROLLBACK")
    assert give_back(database, free) == 0
