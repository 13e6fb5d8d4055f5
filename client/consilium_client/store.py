"""The site's own durable files: the ledger, which one process writes, and the answers that were given.

Everything is there after a crash, or was never acted on: an append returns only when the bytes are on the disk, and a
file is replaced as a whole or not at all. All files have mode 0600.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.errors import ConfigurationError, IntegrityError, LedgerError, PeerError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.ledger.chain import Books, LedgerHead, split_lines
from consilium_shared.ledger.entry import Body, Entry, make_body, sign_entry, timestamp
from consilium_shared.ledger.verify import LedgerVerifier, VerifiedLedger, verify_ledger

Clock = Callable[[], datetime]


def _now() -> datetime:
    return datetime.now(UTC)


class ProcessLock:
    """Held by one process at a time; the kernel frees it when that process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Takes the lock at once; raises ConfigurationError when another process has it, naming that process."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self.note or "unknown"
            os.close(self._fd)
            raise ConfigurationError(f"{path} is held by another process ({holder}); stop that one first") from error

    @property
    def note(self) -> str:
        """What the last holder wrote; empty when there never was one."""
        return os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip()

    def write_note(self, text: str) -> None:
        """Leave a word for whoever finds the lock held, or finds it later."""
        os.pwrite(self._fd, text.encode().ljust(80), 0)
        os.fsync(self._fd)

    def release(self) -> None:
        """Free the lock; the file stays. Again: nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
        self._lock = ProcessLock(path.with_name(path.name + ".lock"))
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
        """Why nothing can be written any more, or None. Only opening the file again, in a new process, mends it."""
        return self._broken

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry so far."""
        with self._mutex:
            return tuple(self._entries)

    @property
    def books(self) -> Books:
        """What the entries say. It lives: read it inside ``exclusive()``, and never change it."""
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
            if self._lock.note:
                raise LedgerError(
                    f"{self.path} is missing, although this site had a ledger. Without it nobody knows what was spent: "
                    f"restore it from the backup. Only if this site never trained: delete {self._lock.path}"
                )
            write_atomically(self.path, b"")
        for leftover in self.path.parent.glob(f".{self.path.name}.*"):  # a crash in the middle of a recovery
            leftover.unlink()
        self._lock.write_note(f"process {os.getpid()}")
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


class AnswerStore:
    """What this site answered, so that the same question gets the same bytes. Safe to use from several threads.

    Of each study and kind of message only the answer to the latest round is kept. An older round, or another request
    for the same round, is refused: whoever asked has lost its way, or wants a second update from the same round.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mutex = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for study in folder.iterdir():
            remove_leftovers(study)
            self._remove_older(study)

    def latest(self, study: str, kind: str) -> int | None:
        """The round whose answer is kept, or None; arguments as for ``get``."""
        with self._mutex:
            stored = self._latest(study, kind)
            return None if stored is None else stored[0]

    def get(self, study: str, round_number: int, kind: str, request_sha256: str) -> tuple[bytes, bytes] | None:
        """The (header, payload) that was answered to this request, or None when the round was not answered yet.

        Args:
            study: the study's digest, 64 hex digits.
            round_number: at least 0.
            kind: lower-case letters and hyphens.
            request_sha256: what was asked.

        Raises:
            PeerError: a later round was answered, or another request for this one.
            IntegrityError: the stored answer is damaged.
        """
        with self._mutex:
            stored = self._latest(study, kind)
            if stored is None or stored[0] < round_number:
                return None
            if stored[0] > round_number:
                raise PeerError(f"round {round_number} is over: round {stored[0]} was answered")
            request, header, payload = _unpack(stored[1])
            if request != request_sha256:
                raise PeerError(f"round {round_number} was answered to another request")
            return header, payload

    def put(self, study: str, round_number: int, kind: str, request_sha256: str, header: bytes, payload: bytes) -> None:
        """Keep an answer durably, then forget those to earlier rounds; arguments as for ``get``.

        Raises:
            PeerError: this round, or a later one, was answered already.
        """
        with self._mutex:
            stored = self._latest(study, kind)
            if stored is not None and stored[0] >= round_number:
                raise PeerError(f"round {round_number} cannot be answered again: round {stored[0]} was answered")
            path = self._folder(study) / f"{_checked_kind(kind)}.{round_number}"
            write_atomically(path, _pack(request_sha256, header, payload))
            if stored is not None:
                stored[1].unlink()

    @staticmethod
    def _remove_older(folder: Path) -> None:
        """A crash between writing an answer and forgetting the one before leaves both."""
        kept: dict[str, Path] = {}
        for file in sorted(folder.glob("*.[0-9]*"), key=lambda file: int(file.suffix[1:])):
            if file.stem in kept:
                kept[file.stem].unlink()
            kept[file.stem] = file

    def _folder(self, study: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", study):
            raise PeerError("a study's digest has 64 hex digits")
        return self.folder / study

    def _latest(self, study: str, kind: str) -> tuple[int, Path] | None:
        files = self._folder(study).glob(f"{_checked_kind(kind)}.[0-9]*")
        return max(((int(file.suffix[1:]), file) for file in files), default=None)


def _checked_kind(kind: str) -> str:
    if not re.fullmatch(r"[a-z-]{1,64}", kind):
        raise PeerError("a kind of message is written in lower-case letters and hyphens")
    return kind


def _pack(request: str, header: bytes, payload: bytes) -> bytes:
    """First line: canonical JSON with the request, the header's length and the digest of the rest."""
    rest = header + payload
    return canonical_bytes({"request": request, "header": len(header), "sha256": digest(rest)}) + b"\n" + rest


def _unpack(path: Path) -> tuple[str, bytes, bytes]:
    line, _, rest = path.read_bytes().partition(b"\n")
    try:
        about = parse_canonical(line)
        if digest(rest) != about["sha256"]:
            raise PeerError("digest")
        return about["request"], rest[: about["header"]], rest[about["header"] :]
    except (PeerError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"the stored answer {path} is damaged; move it away, and the round will be run and charged once more"
        ) from error
