"""Parts of a multipart/related answer, read as they come: memory holds one piece, whatever a part's size."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message

from consilium_shared.errors import TransportError

_HEADER_BYTES = 16 * 2**10
_KEPT_BACK = 1024
"""Bytes of a piece that are held until the next one, since a boundary may be cut in two."""


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names, with its two dashes; raises TransportError where it names none.

    >>> boundary_of('multipart/related; type="application/dicom"; boundary=abc')
    b'--abc'
    """
    message = Message()
    message["Content-Type"] = content_type
    found = message.get_param("boundary")
    if message.get_content_maintype() != "multipart" or not isinstance(found, str) or not 0 < len(found) <= 70:
        raise TransportError("the archive's answer is not in parts (multipart/related)")
    return b"--" + found.encode("ascii", "replace")


def parts(pieces: Iterator[bytes], boundary: bytes) -> Iterator[Iterator[bytes]]:
    """Contents of the parts, one after the other, each as pieces; read each to its end before the next.

    Args:
        pieces: the answer's body.
        boundary: with its dashes, see ``boundary_of``.

    Raises:
        TransportError: the body ends before its last boundary, or a part's header has no end.
    """
    reader = _Reader(pieces)
    reader.skip_past(boundary)
    while True:
        if reader.starts_with(b"--"):
            return
        reader.skip_past(b"\r\n\r\n", most=_HEADER_BYTES)
        content = reader.until(b"\r\n" + boundary)
        yield content
        for _ in content:  # what the caller left
            pass


class _Reader:
    """Buffered reading to a mark."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._buffer = pieces, bytearray()

    def _more(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise TransportError("the archive's answer ends in the middle")
        self._buffer += piece

    def starts_with(self, word: bytes) -> bool:
        while len(self._buffer) < len(word):
            self._more()
        return self._buffer.startswith(word)

    def skip_past(self, mark: bytes, most: int = 2**20) -> None:
        skipped = 0
        while (place := self._buffer.find(mark)) < 0:
            spare = max(0, len(self._buffer) - len(mark))
            skipped += spare
            if skipped > most:
                raise TransportError("the archive's answer has a header without end")
            del self._buffer[:spare]
            self._more()
        del self._buffer[: place + len(mark)]

    def until(self, mark: bytes) -> Iterator[bytes]:
        while (place := self._buffer.find(mark)) < 0:
            spare = len(self._buffer) - _KEPT_BACK
            if spare > 0:
                yield bytes(self._buffer[:spare])
                del self._buffer[:spare]
            self._more()
        yield bytes(self._buffer[:place])
        del self._buffer[: place + len(mark)]
