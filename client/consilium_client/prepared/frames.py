"""Frames between the agent and a process that prepares records: JSON behind its length, in a bounded time and size.

The other side may be a decoder that a foreign file has taken over. It can be late, silent or talk nonsense: then there
is a TimeoutError or an EOFError, and nothing else.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import IO, Any

FRAME_BYTES = 2**24
"""Longest question: a source may have many files."""
ANSWER_BYTES = 2**16


class Deadline:
    """Moment until which everything must have come and gone, however many reads and writes that takes."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def wait(self, pipe: IO[bytes], event: int) -> None:
        """Wait until a pipe can be read (``select.POLLIN``) or written to; raises TimeoutError at the deadline."""
        poll = select.poll()  # of any number of a descriptor, which select is not
        poll.register(pipe, event)
        left = self._end - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError


def said_something(pipe: IO[bytes]) -> bool:
    """True where a pipe can be read now, or its other end is closed."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(0))


def send(pipe: IO[bytes], value: Any, until: Deadline | None = None) -> None:
    """Write a frame: four bytes of length, and JSON.

    Raises:
        BrokenPipeError: the other side is gone.
        TimeoutError: it did not read until the deadline; the pipe must not block then (``os.set_blocking``).
    """
    text = json.dumps(value).encode()
    write(pipe, struct.pack("<I", len(text)) + text, until)


def receive(pipe: IO[bytes], until: Deadline | None = None, most: int = FRAME_BYTES) -> Any:
    """The value of the next frame, of at most so many bytes.

    Raises:
        EOFError: the other side is gone, or wrote something else.
        TimeoutError: it did not write all of it until the deadline.
    """
    (length,) = struct.unpack("<I", read(pipe, 4, until))
    try:
        if length > most:
            raise ValueError
        return json.loads(read(pipe, length, until))
    except (ValueError, RecursionError):
        raise EOFError from None


def write(pipe: IO[bytes], data: bytes, until: Deadline | None = None) -> None:
    """Write all of ``data``; raises as ``send``."""
    left = memoryview(data)
    while left:
        if until is not None:
            until.wait(pipe, select.POLLOUT)
        try:
            left = left[os.write(pipe.fileno(), left) :]
        except BlockingIOError:
            continue


def read(pipe: IO[bytes], count: int, until: Deadline | None = None) -> bytes:
    """The next ``count`` bytes; raises as ``receive``."""
    found = bytearray(count)
    left = memoryview(found)
    while left:
        if until is not None:
            until.wait(pipe, select.POLLIN)
        taken = os.readv(pipe.fileno(), [left])
        if not taken:
            raise EOFError
        left = left[taken:]
    return bytes(found)
