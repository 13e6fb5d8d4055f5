"""Record of predictions: append-only, signed, chained; one entry a request, on the disk before its answer leaves.

An entry has body, kind, prev (SHA-256 of the line before), seq, sig (Ed25519) and time, in canonical JSON, one a line.
A file holds a month; one that is older than the retention is deleted as a whole, and an entry
``retired`` says where it ended, so that what is left still verifies. It is not the ledger of privacy: nothing in it is
charged, and it has its own key. Patients stand in it under pseudonyms, inputs under keyed digests.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError, SignatureError
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.process.process_lock import ProcessLock

DOMAIN = "prediction-record"
LINE_BYTES = 2**24
GENESIS = "0" * 64
_KEYS = {"body", "kind", "prev", "seq", "sig", "time"}


class Record:
    """The record, open for appending by one process. Safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        retention_days: int,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Takes the lock, verifies the last file, cuts off a last line that a crash left incomplete.

        Raises:
            ConfigurationError: another process writes it, or it cannot be read or written.
            IntegrityError: it was altered.
        """
        self._folder, self._identity, self._days, self._clock = folder, identity, retention_days, clock
        self._write, self._sync = threading.Lock(), threading.Lock()
        self._fd, self._month = -1, ""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = ProcessLock(folder / "lock")
        try:
            cut = self._recover()
            self.seq, self.prev, self._time = last_of(folder, identity.public)
            self._written = self._synced = self.seq
            if cut:
                self.append("recovered", {"bytes": cut})
        except OSError as error:
            self.close()
            raise ConfigurationError(f"cannot open {folder}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def append(self, kind: str, body: dict[str, Any]) -> int:
        """Number of a new entry; when this returns it is on the disk.

        Raises:
            IntegrityError: it could not be written; nothing more is until the service is started again.
        """
        with self._write:
            if self._fd == -2:
                raise IntegrityError(f"{self._folder} could not be written; make room or repair the disk, then restart")
            now = self._clock()
            try:
                self._turn(now)
                seq = self._line(kind, body, now)
            except OSError as error:
                self._fd = -2
                raise IntegrityError(f"{self._folder} could not be written ({error.strerror})") from error
        with self._sync:  # who waits here may find its line written out by the one before
            if self._synced < seq:
                upto = self._written
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    self._fd = -2
                    raise IntegrityError(f"{self._folder} could not be written ({error.strerror})") from error
                self._synced = upto
        return seq

    def close(self) -> None:
        """Free file and lock."""
        with self._write:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -2
            self._lock.release()

    def _line(self, kind: str, body: dict[str, Any], now: datetime) -> int:
        time = max(_stamp(now), self._time)
        unsigned = {"body": body, "kind": kind, "prev": self.prev, "seq": self.seq + 1, "time": time}
        signature = self._identity.sign(DOMAIN, canonical_bytes(unsigned)).hex()
        line = canonical_bytes({**unsigned, "sig": signature})
        if len(line) > LINE_BYTES:
            raise IntegrityError("an entry of the record of predictions is too long; ask for fewer records at a time")
        view = memoryview(line + b"\n")
        while view:
            view = view[os.write(self._fd, view) :]
        self.seq, self.prev, self._time = self.seq + 1, digest(line), time
        self._written = self.seq
        return self.seq

    def _turn(self, now: datetime) -> None:
        """Begin a new file where a month begins."""
        month = now.astimezone(UTC).strftime("%Y-%m")
        if self._fd >= 0 and month <= self._month:
            return
        files = _files(self._folder)
        if files and files[-1].stem >= month:
            month = files[-1].stem
        else:
            write_atomically(self._folder / f"{month}.jsonl", b"")
        with self._sync:
            if self._fd >= 0:
                os.fsync(self._fd)
                os.close(self._fd)
            self._fd = os.open(self._folder / f"{month}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._month = month
        self._retire()

    def _retire(self) -> None:
        """Delete the months that lie wholly before the retention, and say so in an entry first."""
        limit = (self._clock().astimezone(UTC) - timedelta(days=self._days)).strftime("%Y-%m")
        for file in _files(self._folder)[:-1]:
            if file.stem >= limit:
                return
            (last,) = deque(_lines(file), maxlen=1)
            self._line("retired", {"month": file.stem, "last": digest(last)}, self._clock())
            os.fsync(self._fd)
            file.unlink()

    def _recover(self) -> int:
        files = _files(self._folder)
        if not files:
            return 0
        data = files[-1].read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            write_atomically(files[-1], data[:whole])
        return len(data) - whole


def entries(folder: Path, public: PublicIdentity, *, last: bool = False) -> Iterator[dict[str, Any]]:
    """Every entry in order, verified: numbers, chain, signatures, time.

    Args:
        folder: of the record.
        public: key that signed it.
        last: the entries of the last file alone.

    Raises:
        IntegrityError: with file and line; at the end also where the beginning is missing and no entry says that it was
            retired.
    """
    prev, seq, time, first = "", 0, "", ""
    retired: set[str] = set()
    for file in _files(folder)[-1 if last else 0 :]:
        for number, line in enumerate(_lines(file), 1):
            where = f"{file}, line {number}"
            try:
                value = parse_canonical(line)
                if not isinstance(value, dict) or set(value) != _KEYS:
                    raise PeerError("not an entry")
                if prev and (value["prev"] != prev or value["seq"] != seq + 1 or value["time"] < time):
                    raise PeerError("does not follow the entry before")
                unsigned = {key: each for key, each in value.items() if key != "sig"}
                public.verify(DOMAIN, canonical_bytes(unsigned), bytes.fromhex(value["sig"]))
            except (PeerError, SignatureError, ValueError, TypeError) as error:
                raise IntegrityError(f"{where}: {error}. The record was damaged or altered") from error
            first = first or value["prev"]
            prev, seq, time = digest(line), value["seq"], value["time"]
            if value["kind"] == "retired":
                retired.add(value["body"]["last"])
            yield value
    if not last and first not in ("", GENESIS) and first not in retired:
        raise IntegrityError(f"{folder}: the record's beginning is missing, and no entry says that it was retired")


def last_of(folder: Path, public: PublicIdentity) -> tuple[int, str, str]:
    """Number, digest and time of the last entry, after those of its file were verified; raises IntegrityError."""
    found = (0, GENESIS, "")
    for entry in entries(folder, public, last=True):
        found = (entry["seq"], digest(canonical_bytes(entry)), entry["time"])
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9].jsonl"))


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        while line := lines.readline(LINE_BYTES + 2):
            yield line.removesuffix(b"\n")


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
