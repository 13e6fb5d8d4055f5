"""The inbox: received instances as they came, each whole or not there, and the journal of where they came from.

    tmp/           what arrives now; emptied at a start
    ab/ab12….dcm   an instance, named by the SHA-256 of its SOP instance UID
    journal.sqlite3

An instance is acknowledged when its file and its line of the journal are on the disk. The file comes first: one without
a line was never acknowledged, and gets its line at the next start. The inbox holds patients' names. It belongs to the
hospital alone, and neither the agent nor anything that speaks to the coordinator opens it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from consilium_client.intake.settings import Limits
from consilium_shared.errors import ConfigurationError, DataError, IntegrityError
from consilium_shared.files import put_in_place, received_halves

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
    digest TEXT PRIMARY KEY, uid TEXT NOT NULL, content TEXT NOT NULL, bytes INTEGER NOT NULL,
    source TEXT NOT NULL, received TEXT NOT NULL,
    repeats INTEGER NOT NULL DEFAULT 0, differing INTEGER NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'inbox',
    reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS pulls (
    ended TEXT NOT NULL, archive TEXT NOT NULL, asked TEXT NOT NULL, study TEXT NOT NULL,
    expected INTEGER NOT NULL, here INTEGER NOT NULL, outcome TEXT NOT NULL
);
"""
INTERRUPTED = "unknown: the program ended before it wrote this down"


class NoRoom(DataError):
    """The inbox or its disk is full; nothing of what arrives is kept until there is room."""


@dataclass(frozen=True)
class Instance:
    """A line of the journal."""

    digest: str
    uid: str
    source: str
    received: str
    bytes: int
    repeats: int
    differing: int
    """Number of times that other bytes came under a known UID. The first stayed."""
    state: str
    """``inbox``: waiting; ``done``: de-identified; ``aside``: set aside, for ``reason``."""
    reason: str


_DIGEST = re.compile("[0-9a-f]{64}")


def digest_of(uid: str) -> str:
    """The name of an instance in the inbox; raises DataError where that is no UID.

    >>> digest_of("1.2.840.1")[:8]
    'f9a13599'
    """
    if len(uid) > 64 or not _UID.fullmatch(uid):
        raise DataError("a SOP instance UID that is no UID")
    return hashlib.sha256(uid.encode("ascii")).hexdigest()


class Inbox:
    """The inbox of a site, for one or several threads and processes at once."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Opens the inbox, and makes it where there is none.

        Raises:
            ConfigurationError: the folder cannot be made or written.
            IntegrityError: its journal is damaged.
        """
        self.folder, self.limits = folder, limits
        self._lock = threading.Lock()
        try:
            self.arriving.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._journal = sqlite3.connect(
                folder / "journal.sqlite3", check_same_thread=False, timeout=60, isolation_level=None
            )
            (folder / "journal.sqlite3").chmod(0o600)
            for pragma in ("journal_mode=WAL", "synchronous=FULL"):  # a line is on the disk when it is written
                self._journal.execute(f"PRAGMA {pragma}")
            self._journal.executescript(_SCHEMA)
        except OSError as error:
            raise ConfigurationError(f"cannot use {folder} as the inbox: {error.strerror}") from error
        except sqlite3.OperationalError as error:
            raise ConfigurationError(f"cannot use {folder} as the inbox: {error}") from error
        except sqlite3.DatabaseError as error:
            raise IntegrityError(f"{folder / 'journal.sqlite3'} is damaged: {error}") from error
        self._held = self._count_bytes()

    def _count_bytes(self) -> int:
        with self._lock:
            query = "SELECT coalesce(sum(bytes), 0) FROM instances WHERE state != 'done'"
            return int(self._journal.execute(query).fetchone()[0])

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    @property
    def arriving(self) -> Path:
        """Folder of what arrives now; on the disk of the inbox, so that a rename is enough."""
        return self.folder / "tmp"

    def path(self, digest: str) -> Path:
        """Path of an instance."""
        return self.folder / digest[:2] / f"{digest}.dcm"

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context of a program that brings instances. The first of several puts in order what a killed one left."""
        with (self.folder / "lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # another one brings instances now, and has put it in order
            else:
                self._recover()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _recover(self) -> None:
        """Half files go; whole ones without a line in the journal get one."""
        for left in received_halves(self.arriving):
            left.unlink()
        for path in sorted(self.folder.glob("[0-9a-f][0-9a-f]/*.dcm")):
            if path != self.path(path.stem) or not _DIGEST.fullmatch(path.stem) or self.known(path.stem):
                continue  # known, or a file that somebody else keeps here
            uid = _uid_in(path)
            if uid is None or digest_of(uid) != path.stem:
                path.unlink()  # damaged: it was never acknowledged
                continue
            self._enter(path.stem, uid, _content(path), path.stat().st_size, INTERRUPTED)

    def require_room(self, coming: int = 0) -> None:
        """Raises NoRoom where the inbox or its disk cannot take ``coming`` more bytes."""
        if self._held + coming > self.limits.inbox_gib * 2**30:
            self._held = self._count_bytes()  # others may have taken some away
        if self._held + coming > self.limits.inbox_gib * 2**30:
            raise NoRoom(
                f"the inbox {self.folder} holds its {self.limits.inbox_gib:g} GiB; run: consilium-site deidentify"
            )
        if shutil.disk_usage(self.folder).free - coming < self.limits.keep_free_gib * 2**30:
            raise NoRoom(f"less than {self.limits.keep_free_gib:g} GiB would stay free on the disk of {self.folder}")

    def known(self, digest: str) -> bool:
        """True where the journal has an instance, also one that was de-identified since."""
        with self._lock:
            return self._journal.execute("SELECT 1 FROM instances WHERE digest = ?", (digest,)).fetchone() is not None

    def keep(self, uid: str, arrived: Path, source: str) -> bool:
        """Make a whole file in ``arriving`` an instance of the inbox, durably.

        Args:
            uid: its SOP instance UID, as its sender says it.
            arrived: the file, in DICOM's file format; it is gone afterwards.
            source: who sent it and how, for the journal.

        Returns:
            whether it is new. An instance that was here is counted as a repeat and not stored again.

        Raises:
            DataError: no UID, or an instance larger than the limits allow.
            NoRoom: the inbox or its disk is full.
        """
        digest = digest_of(uid)
        try:
            size = arrived.stat().st_size
            if size > self.limits.object_mib * 2**20:
                raise DataError(f"an instance larger than {self.limits.object_mib} MiB")
            content = _content(arrived)
            if self.known(digest):
                self._repeat(digest, content)
                return False
            self.require_room(size)
            target = self.path(digest)
            if not target.parent.exists():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                _sync(self.folder)
            with arrived.open("rb") as file:
                put_in_place(file, arrived, target)
            return self._enter(digest, uid, content, size, source)
        finally:
            arrived.unlink(missing_ok=True)

    def _enter(self, digest: str, uid: str, content: str, size: int, source: str) -> bool:
        with self._lock:
            done = self._journal.execute(
                "INSERT OR IGNORE INTO instances (digest, uid, content, bytes, source, received) VALUES (?,?,?,?,?,?)",
                (digest, uid, content, size, source, _now()),
            )
            if done.rowcount:
                self._held += size
                return True
        self._repeat(digest, content)  # two associations brought it at once
        return False

    def _repeat(self, digest: str, content: str) -> None:
        with self._lock:
            self._journal.execute(
                "UPDATE instances SET repeats = repeats + 1, differing = differing + (content != ?) WHERE digest = ?",
                (content, digest),
            )

    def settle(self, digest: str, state: str, reason: str = "") -> None:
        """Write down what became of an instance: ``done``, or ``aside`` with the reason."""
        with self._lock:
            self._journal.execute(
                "UPDATE instances SET state = ?, reason = ? WHERE digest = ?", (state, reason, digest)
            )

    def note_pull(self, archive: str, asked: str, study: str, expected: int, here: int, outcome: str) -> None:
        """Write down what came of one study of a list."""
        with self._lock:
            self._journal.execute(
                "INSERT INTO pulls VALUES (?,?,?,?,?,?,?)", (_now(), archive, asked, study, expected, here, outcome)
            )

    def instances(self, *states: str) -> Iterator[Instance]:
        """The journal's instances in one of the states (all, where none is given), in the order of their names."""
        after = ""
        while True:
            with self._lock:
                rows = self._journal.execute(
                    "SELECT digest, uid, source, received, bytes, repeats, differing, state, reason FROM instances "
                    "WHERE digest > ? ORDER BY digest LIMIT 1000",
                    (after,),
                ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield from (found for found in (Instance(*row) for row in rows) if not states or found.state in states)

    def left_behind(self) -> Iterator[Path]:
        """Files that the journal says are done with: a program was killed before it deleted them."""
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*.dcm"):
            with self._lock:
                row = self._journal.execute("SELECT state FROM instances WHERE digest = ?", (path.stem,)).fetchone()
            if row is not None and row[0] == "done":
                yield path

    def counts(self) -> dict[str, int]:
        """Numbers of instances by state, and of those that came again or came with other bytes."""
        with self._lock:
            by_state = dict(self._journal.execute("SELECT state, count(*) FROM instances GROUP BY state").fetchall())
            repeats, differing = self._journal.execute(
                "SELECT coalesce(sum(repeats), 0), coalesce(sum(differing), 0) FROM instances"
            ).fetchone()
        return {**by_state, "repeats": repeats, "differing": differing}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _uid_in(path: Path) -> str | None:
    """SOP instance UID in a file's meta information, which we wrote ourselves; None where there is none."""
    from pydicom.filereader import read_file_meta_info

    try:
        return str(read_file_meta_info(path).MediaStorageSOPInstanceUID)
    except Exception:  # whatever a damaged file makes a parser raise
        return None
