"""Received payload: kept in memory while it is small, else in a file without a name that ends with the process."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from consilium_shared.errors import TransportError

IN_MEMORY_BYTES = 1024 * 1024
"""Largest payload kept in memory: counts and signatures stay there, updates go to the disk."""


class Upload:
    """One payload: written as it arrives, then read as often as needed. Unverified bytes.

    The file has mode 0600 and no name (``tempfile.TemporaryFile``): nothing is left of it after ``close``, nor after
    a crash.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, folder: Path) -> None:
        """``folder``: of a study or a site's home, on the disk that is meant for updates; a large one is kept there."""
        self.size = 0
        self._folder = folder
        self._hash = hashlib.sha256()
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - ``close`` closes it
            max_size=IN_MEMORY_BYTES, dir=str(folder)
        )

    @property
    def sha256(self) -> str:
        """Digest of what was written, 64 hex digits; made while it arrived."""
        return self._hash.hexdigest()

    def write(self, piece: bytes | memoryview) -> None:
        """Append a piece. Only before the first reading.

        Raises:
            TransportError: the disk does not take it.
        """
        try:
            self._file.write(piece)
        except OSError as error:
            raise TransportError(
                f"A message cannot be kept in {self._folder}: {error.strerror}. Make room; the study then goes on."
            ) from error
        self._hash.update(piece)
        self.size += len(piece)

    def pieces(self, size: int) -> Iterator[bytes]:
        """The payload from its beginning, in pieces of exactly ``size`` bytes but the last. May be called again."""
        for start in range(0, self.size, size):
            yield self.piece(start, size)

    def piece(self, start: int, size: int) -> bytes:
        """The bytes from ``start`` on, at most ``size`` of them."""
        self._file.seek(start)
        return self._file.read(size)

    def read(self) -> bytes:
        """The whole payload; for small ones."""
        return b"".join(self.pieces(self.size or 1))

    def close(self) -> None:
        """Forget the payload. Again: nothing."""
        self._file.close()

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
