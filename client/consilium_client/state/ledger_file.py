"""The ledger's file, which one process writes.

Everything is there after a crash, or was never acted on: an append returns only when the bytes are on the disk, and the
file is replaced as a whole or not at all. All files have mode 0600.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from consilium_shared.canonical import digest
from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.ledger.chain import Books, LedgerHead, split_lines
from consilium_shared.ledger.entry import Body, Entry, make_body, sign_entry, timestamp
from consilium_shared.ledger.verify import LedgerVerifier, VerifiedLedger, verify_ledger
from consilium_shared.process.process_lock import ProcessLock

Clock = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(UTC)


class LedgerFile:
    """The site's ledger, open for appending. Safe to use from several threads.

    Opening takes the lock, verifies every entry, and recovers an incomplete last line: a crash left it, its append
    never returned, so nothing was done because of it. The line is cut off and its digest and length are kept in a
    ``recover`` entry, both in one replacement of the file. A line that is complete but wrong is never recovered.

    Attributes:
        path: the file; the lock lies beside it.
        site: name of the site.
        recovered: the ``recover`` entry that opening wrote, or None.
    """

    def __init__(self, path: Path, site: str, identity: Identity, clock: Clock = _now) -> None:
        """Opens the ledger, or begins an empty one.

        Raises:
            ConfigurationError: another process holds it, or it cannot be read or written.
            LedgerError: it does not verify, or there was one and it is gone.
        """
        self.path = path
        self.site = site
        self.recovered: Entry | None = None
        self._identity = identity
        self._clock = clock
        self._mutex = threading.RLock()
        self._entries: list[Entry] = []
        self._verifier = LedgerVerifier(site, identity.public)
        self._broken: str | None = None
        self._fd = -1
        self._lock = ProcessLock(_lock_of(path))
        try:
            self._load()
        except OSError as error:
            self.close()
            raise ConfigurationError(f"cannot open the ledger {path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> LedgerHead:
        """The last entry's number and digest; raises LedgerError when the file cannot be trusted any more."""
        with self.exclusive():
            return self._verifier.head

    @property
    def broken(self) -> str | None:
        """Reason why nothing can be written any more, or None. Opening the file in a new process mends it."""
        return self._broken

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry so far."""
        with self._mutex:
            return tuple(self._entries)

    @property
    def books(self) -> Books:
        """Books of the entries: what they say. It lives: read it inside ``exclusive()``, and never change it."""
        return self._verifier.books

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other thread appends meanwhile: what is decided from ``books`` still holds when it is written.

        Raises:
            LedgerError: the ledger is closed, or an append failed: what is in memory may not be on the disk.
        """
        with self._mutex:
            if self._broken is not None:
                raise LedgerError(f"{self.path} {self._broken}; restart the site's programs")
            yield

    def append(self, kind: str, fields: dict[str, Any]) -> Entry:
        """Write one entry; when this returns it is on the disk.

        Raises:
            LedgerError: not a valid body of that kind, or one that contradicts earlier entries (nothing is written
                then); or the file could not be written or was changed by someone else (nothing more is written then).
        """
        body = make_body(kind, fields)
        with self.exclusive():
            entry = self._next(body)
            line = entry.line()
            self._verifier.check_line(line)
            try:
                self._write(line + b"\n")
            except OSError as error:
                # The file may hold a part of the line: only opening it again can tell.
                self._broken = f"could not be written ({error.strerror})"
                raise LedgerError(f"{self.path} {self._broken}; make room or repair the disk, then restart") from error
            self._entries.append(entry)
            return entry

    def close(self) -> None:
        """Free the file and the lock."""
        with self._mutex:
            self._broken = self._broken or "is closed"
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._lock.release()

    def __enter__(self) -> LedgerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> None:
        if not self.path.exists():
            check_never_begun(self.path)
            write_atomically(self.path, b"")
        for leftover in self.path.parent.glob(f".{self.path.name}.*"):  # a crash in the middle of a recovery
            leftover.unlink()
        self._lock.write_note()
        data = self.path.read_bytes()
        lines, rest = split_lines(data)
        try:
            self._entries = [self._verifier.check_line(line) for line in lines]
        except LedgerError as error:
            raise LedgerError(
                f"{self.path}: {error}. The ledger was damaged or altered. Do not edit it: restore the file from the "
                f"backup and keep the damaged one for the auditor",
                line=error.line,
                step=error.step,
            ) from error
        if rest:
            self.recovered = self._next(make_body("recover", {"sha256": digest(rest), "bytes": len(rest)}))
            line = self.recovered.line()
            self._entries.append(self._verifier.check_line(line))
            write_atomically(self.path, data[: len(data) - len(rest)] + line + b"\n")
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._size = os.fstat(self._fd).st_size

    def _next(self, body: Body) -> Entry:
        # A clock that was set back must not make the ledger's time go back.
        time = max(timestamp(self._clock()), self._verifier.time)
        return sign_entry(self._verifier.head.seq + 1, time, body, self._verifier.head.sha256, self._identity)

    def _write(self, data: bytes) -> None:
        here, there = os.fstat(self._fd), self.path.stat()
        if (here.st_dev, here.st_ino, here.st_size) != (there.st_dev, there.st_ino, self._size):
            self._broken = "was changed by another program"
            raise LedgerError(f"{self.path} {self._broken}; restart the site's programs, which verify it")
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)
        self._size += len(data)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def check_never_begun(path: Path) -> None:
    """Raises LedgerError where a ledger that is not there was begun once: the file beside it has its process's note."""
    lock = _lock_of(path)
    if lock.exists() and lock.read_bytes().strip():
        raise LedgerError(
            f"{path} is missing, although this site had a ledger. Without it nobody knows what was spent: restore it "
            f"from the backup. Only if this site never trained: delete {lock}"
        )


def read_ledger(path: Path, site: str, public: PublicIdentity) -> VerifiedLedger:
    """The ledger, verified, for reading alone: while another process writes, an incomplete last line is left out.

    Raises:
        ConfigurationError: it cannot be read.
        LedgerError: it does not verify.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read the ledger {path}: {error.strerror}") from error
    return verify_ledger(data[: data.rfind(b"\n") + 1], site, public)
