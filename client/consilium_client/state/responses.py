"""Store of the answers that this site gave: the same request gets the same bytes. Large ones are never in memory.

One file an answer, of mode 0600, put in place whole or not at all:

    payload ‖ header ‖ newline ‖ canonical JSON {"header": its length, "request": …, "sha256": …}

The digest is that of payload ‖ header ‖ the JSON without it. The payload comes first because the header describes it,
which can be done when its last piece is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.files import put_in_place, remove_leftovers

_LAST_LINE_BYTES = 512  # more than the last line ever has


@dataclass(frozen=True)
class StoredPayload:
    """An answer's payload, on the disk until the next round is answered.

    Attributes:
        size: bytes.
    """

    path: Path
    size: int

    def pieces(self, size: int = limits.CHUNK_BYTES) -> Iterator[bytes]:
        """The payload in pieces of ``size`` bytes, the last one shorter; raises IntegrityError when it is cut off.

        The file is open from here on: what is on its way leaves whole, even if the study is forgotten meanwhile.
        """
        return self._read(self.path.open("rb"), size)

    def _read(self, opened: IO[bytes], size: int) -> Iterator[bytes]:
        with opened as file:
            for start in range(0, self.size, size):
                expected = min(size, self.size - start)
                piece = file.read(expected)
                if len(piece) != expected:
                    raise _damaged(self.path)
                yield piece


class Responses:
    """Answers of this site. Safe to use from several threads.

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

    def get(self, study: str, round_number: int, kind: str, request_sha256: str) -> tuple[bytes, StoredPayload] | None:
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
            request, header, payload = _verified(stored[1])
            if request != request_sha256:
                raise PeerError(f"round {round_number} was answered to another request")
            return header, payload

    def put(
        self, study: str, round_number: int, kind: str, request_sha256: str, header: bytes, payload: bytes
    ) -> StoredPayload:
        """Keep an answer whose payload is in memory; arguments and errors as for ``stage`` and ``Staged.commit``."""
        with self.stage(study) as staged:
            staged.write(payload)
            return staged.commit(round_number, kind, request_sha256, header)

    @contextmanager
    def stage(self, study: str) -> Iterator[Staged]:
        """An answer that is written piece by piece; unless it is committed, nothing of it stays.

        Args:
            study: the study's digest, 64 hex digits.

        Raises:
            PeerError: not a digest.
        """
        folder = self._folder(study)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(fd, "wb") as file:
                yield Staged(self, study, file, Path(name))
        finally:
            Path(name).unlink(missing_ok=True)  # it has another name once it was committed

    def forget(self, study: str) -> None:
        """Delete the answers of a study's digest."""
        with self._mutex:
            shutil.rmtree(self._folder(study), ignore_errors=True)

    @staticmethod
    def _remove_older(folder: Path) -> None:
        """A crash between writing an answer and forgetting the one before leaves both."""
        kept: dict[str, Path] = {}
        for _, file in sorted(_numbered(folder, "*")):
            if file.stem in kept:
                kept[file.stem].unlink()
            kept[file.stem] = file

    def _folder(self, study: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", study):
            raise PeerError("a study's digest has 64 hex digits")
        return self.folder / study

    def _latest(self, study: str, kind: str) -> tuple[int, Path] | None:
        return max(_numbered(self._folder(study), _checked_kind(kind)), default=None)


class Staged:
    """An answer's payload on its way to the disk; from ``Responses.stage``.

    Attributes:
        size: bytes of payload so far.
    """

    def __init__(self, store: Responses, study: str, file: IO[bytes], path: Path) -> None:
        self.size = 0
        self._store, self._study = store, study
        self._file, self._path = file, path
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Digest of the payload so far, 64 hex digits."""
        return self._hash.hexdigest()

    def write(self, piece: bytes) -> None:
        """Append a piece of the payload."""
        self._file.write(piece)
        self._hash.update(piece)
        self.size += len(piece)

    def commit(self, round_number: int, kind: str, request_sha256: str, header: bytes) -> StoredPayload:
        """Keep the answer durably, then forget those to earlier rounds; arguments as for ``Responses.get``.

        Raises:
            PeerError: this round, or a later one, was answered already.
        """
        with self._store._mutex:
            stored = self._store._latest(self._study, kind)
            if stored is not None and stored[0] >= round_number:
                raise PeerError(f"round {round_number} cannot be answered again: round {stored[0]} was answered")
            about = {"request": request_sha256, "header": len(header)}
            whole = self._hash.copy()
            whole.update(header + canonical_bytes(about))
            self._file.write(header + b"\n" + canonical_bytes({**about, "sha256": whole.hexdigest()}))
            path = self._path.with_name(f"{kind}.{round_number}")
            put_in_place(self._file, self._path, path)
            if stored is not None:
                stored[1].unlink()
            return StoredPayload(path, self.size)


def _numbered(folder: Path, kind: str) -> Iterator[tuple[int, Path]]:
    """Round and file of each answer of a kind; files that are not ours are passed over."""
    for file in folder.glob(f"{kind}.*"):
        if file.suffix[1:].isdecimal() and not file.name.startswith("."):
            yield int(file.suffix[1:]), file


def _checked_kind(kind: str) -> str:
    if not re.fullmatch(r"[a-z-]{1,64}", kind):
        raise PeerError("a kind of message is written in lower-case letters and hyphens")
    return kind


def _verified(path: Path) -> tuple[str, bytes, StoredPayload]:
    """Request, header and payload of a stored answer, the file read once in pieces and held against its digest."""
    with path.open("rb") as file:
        try:
            length = os.fstat(file.fileno()).st_size
            file.seek(max(0, length - _LAST_LINE_BYTES))
            line = file.read().rpartition(b"\n")[2]
            about = parse_canonical(line)
            sha256, request, header_bytes = about.pop("sha256"), about["request"], about["header"]
            end = length - len(line) - 1
            if type(header_bytes) is not int or not 0 <= header_bytes <= min(end, limits.HEADER_BYTES):
                raise PeerError("length")
            whole = hashlib.sha256()
            file.seek(0)
            for start in range(0, end, limits.CHUNK_BYTES):
                whole.update(file.read(min(limits.CHUNK_BYTES, end - start)))
            whole.update(canonical_bytes(about))
            if whole.hexdigest() != sha256:
                raise PeerError("digest")
            file.seek(end - header_bytes)
            return request, file.read(header_bytes), StoredPayload(path, end - header_bytes)
        except (PeerError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path) from error


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"the stored answer {path} is damaged; move it away, and the round's next attempt goes on")
