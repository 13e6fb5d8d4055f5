"""A PostgreSQL server of a test's own, from Debian's package."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from tests.intake.archives import free_port

PASSWORD = "correct horse; battery 'staple'"
_FOLDERS = os.pathsep.join(
    [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ["PATH"]]
)
INITDB, POSTGRES = (shutil.which(name, path=_FOLDERS) for name in ("initdb", "postgres"))
PROGRAMS = INITDB is not None and POSTGRES is not None
"""False where Debian's package is not installed, which keeps its programs outside of PATH."""


class Server:
    """A running server with the account ``reader``, who may SELECT in the schema ``cdm``."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def admin(self) -> psycopg.Connection[Any]:
        """A connection of the superuser's."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, dbname="postgres", user="owner", password=PASSWORD, autocommit=True
        )

    def fill(self, tables: Mapping[str, Mapping[str, str]], rows: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
        """Make tables in the schema ``cdm``, and give the reader SELECT."""
        with self.admin() as connection, connection.cursor() as cursor:
            cursor.execute("CREATE SCHEMA cdm")
            cursor.execute("CREATE ROLE reader LOGIN PASSWORD 'secret of the reader'")
            for name, columns in tables.items():
                cursor.execute(f"CREATE TABLE cdm.{name} ({', '.join(f'{c} {kind}' for c, kind in columns.items())})")
                marks = ", ".join(["%s"] * len(columns))
                cursor.executemany(f"INSERT INTO cdm.{name} VALUES ({marks})", rows[name])
            cursor.execute("CREATE SEQUENCE cdm.numbers")
            cursor.execute("GRANT USAGE ON SEQUENCE cdm.numbers TO reader")
            cursor.execute("GRANT USAGE ON SCHEMA cdm TO reader")
            cursor.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA cdm TO reader")


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A server, which refuses to be root's: then the account of Debian's package runs it."""
    account = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    port = free_port()
    try:
        if account is not None:
            os.chown(folder, pwd.getpwnam(account).pw_uid, -1)
        word = folder / "word"
        word.write_text(PASSWORD)
        word.chmod(0o644)
        options = [
            "-A",
            "scram-sha-256",
            "-U",
            "owner",
            "--pwfile",
            str(word),
            "--no-sync",
            "-E",
            "UTF8",
            "--no-locale",
        ]
        made = subprocess.run(
            [str(INITDB), "-D", str(folder / "data"), *options], user=account, capture_output=True, text=True, cwd="/"
        )
        assert made.returncode == 0, made.stderr
        settings = ["-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-c", "fsync=off"]
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen(
                [str(POSTGRES), "-D", str(folder / "data"), *settings], user=account, stdout=log, stderr=log, cwd="/"
            )
        try:
            found = Server(folder, port)
            until = time.monotonic() + 60
            while True:
                try:
                    found.admin().close()
                    break
                except psycopg.OperationalError:
                    assert running.poll() is None and time.monotonic() < until, (folder / "log").read_text()
                    time.sleep(0.1)
            yield found
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
