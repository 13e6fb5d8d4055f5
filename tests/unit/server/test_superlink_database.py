"""The SuperLink's database: a start that is stopped at any moment starts again; what is damaged is made anew."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.alembic.utils import build_alembic_config
from sqlalchemy import create_engine, event

from consilium_server.superlink import database as superlink_database
from consilium_server.superlink.database import make_whole, watch_for_damage
from consilium_shared.errors import ConfigurationError

REVISIONS = [
    script.revision
    for script in ScriptDirectory.from_config(build_alembic_config(create_engine("sqlite://"))).walk_revisions()
][::-1]
MARK = "CREATE TABLE ours (kept)"


def killed(number: int, work: Callable[[], None]) -> None:
    """Do ``work`` in a process of its own, which is killed in the middle."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


def is_whole(database: Path) -> bool:
    """Whether Flower opens it, and SQLite finds nothing wrong."""
    store = SqlObjectStore(str(database))
    tables = store.initialize()
    assert store._engine is not None
    store._engine.dispose()
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return "alembic_version" in tables and connection.execute("PRAGMA quick_check").fetchone() == ("ok",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("whole") / "state.db"
    make_whole(database)
    return database


@pytest.fixture
def database(whole: Path, tmp_path: Path) -> Path:
    """A whole one that holds something."""
    copied = tmp_path / "state.db"
    shutil.copy(whole, copied)
    with contextlib.closing(sqlite3.connect(copied)) as connection:
        connection.execute(MARK)
    return copied


def holds_something(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT count(*) FROM sqlite_master WHERE sql = ?", (MARK,)).fetchone() == (1,)


def test_a_start_that_is_stopped_at_any_migration_starts_again(tmp_path: Path) -> None:
    database = tmp_path / "state.db"
    assert len(REVISIONS) == 37
    for number in range(len(REVISIONS)):
        stop = (signal.SIGKILL, signal.SIGTERM)[number % 2]

        class Stop(logging.Handler):
            """Stops this process as it begins a migration, at the line that Alembic logs of it."""

            left, signal = number, stop

            def emit(self, record: logging.LogRecord) -> None:
                if not self.left:
                    os.kill(os.getpid(), self.signal)
                self.left -= 1

        def start(handler: logging.Handler) -> None:
            """Begin where the stop before has left everything."""
            logger = logging.getLogger("alembic.runtime.migration")
            logger.setLevel(logging.INFO)
            handler.addFilter(lambda record: record.getMessage().startswith("Running upgrade"))
            logger.addHandler(handler)
            make_whole(database)

        stopping = Stop()
        killed(stop, partial(start, stopping))
        assert not database.exists(), f"after {number} migrations"
    make_whole(database)
    assert is_whole(database)


@pytest.mark.parametrize("moment", ["_delete", "put_in_place"])
def test_a_start_that_is_stopped_before_the_new_file_is_in_place_starts_again(
    database: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    database.write_bytes(b"noise" * 10_000)
    database.with_name("state.db-wal").write_bytes(b"noise")

    def stop(*given: object) -> None:
        if moment == "put_in_place" or given == (database,):
            database.unlink(missing_ok=True)  # the deletion had begun
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(superlink_database, moment, stop)
        killed(signal.SIGKILL, lambda: make_whole(database))
    make_whole(database)
    assert is_whole(database)
    assert not database.with_name("state.db.new").exists()


def test_a_database_whose_migration_stopped_in_place_is_made_anew(tmp_path: Path, whole: Path) -> None:
    """Earlier releases migrated in place: after each number of migrations, and in the middle of one."""
    stopped = tmp_path / "stopped.db"
    engine = create_engine(f"sqlite:///{stopped}")
    event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF"))
    configuration = build_alembic_config(engine)
    with engine.connect() as connection:
        configuration.attributes["connection"] = connection
        for number, revision in enumerate(REVISIONS, 1):
            assert superlink_database._fault(stopped) is not None, f"{number - 1} migrations"
            command.upgrade(configuration, revision)
            connection.commit()
            if number in (2, 24, 36):
                shutil.copy(stopped, tmp_path / f"after-{number}.db")
    engine.dispose()
    assert superlink_database._fault(stopped) is None
    for number in (2, 24, 36):
        left = tmp_path / f"after-{number}.db"
        with contextlib.closing(sqlite3.connect(left)) as half:
            half.execute("CREATE TABLE IF NOT EXISTS task_usage (half)")
        make_whole(left)
        assert is_whole(left)


def test_a_whole_database_is_left_alone(database: Path) -> None:
    before = database.read_bytes()
    make_whole(database)
    assert database.read_bytes() == before
    assert is_whole(database) and holds_something(database)


def noise(database: Path) -> None:
    database.write_bytes(os.urandom(200_000))


def empty(database: Path) -> None:
    database.write_bytes(b"")


def half(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def pages(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(database.stat().st_size - 8192))


def nothing_in_it(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("DELETE FROM alembic_version")


@pytest.mark.parametrize("damage", [noise, empty, half, pages, nothing_in_it])
def test_a_damaged_database_is_made_anew_and_that_is_said(
    database: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    damage(database)
    make_whole(database)
    assert is_whole(database) and not holds_something(database)
    assert "is made anew" in caplog.text and str(database) in caplog.text


def test_the_log_of_a_database_that_is_gone_is_not_played_into_its_successor(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE late (row)")
        logged = database.with_name("state.db-wal").read_bytes()
    database.unlink()
    database.with_name("state.db-wal").write_bytes(logged)
    make_whole(database)
    assert is_whole(database)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'late'").fetchone() == (0,)


def test_what_cannot_be_opened_for_another_reason_is_not_deleted_but_named(tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    with pytest.raises(ConfigurationError, match=r"state\.db cannot be read or written"):
        make_whole(tmp_path / "state.db")
    assert (tmp_path / "state.db").is_dir()


def test_damage_that_flower_meets_while_it_runs_is_told(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    engine = create_engine(f"sqlite:///{database}")
    listen = event.listen
    with monkeypatch.context() as patched:  # of one engine, not of all that this process will ever have
        patched.setattr(event, "listen", lambda _, name, look: listen(engine, name, look))
        watch_for_damage(lambda: found.append(True))
    with contextlib.suppress(Exception), engine.connect() as connection:
        connection.exec_driver_sql("SELECT nothing FROM nowhere")
    assert not found
    noise(database)
    with pytest.raises(Exception, match="not a database"), engine.connect() as connection:
        connection.exec_driver_sql("SELECT * FROM alembic_version")
    assert found
    engine.dispose()
