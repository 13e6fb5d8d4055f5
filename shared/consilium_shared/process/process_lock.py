"""Lock on a file, for one process at a time; the kernel frees it when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from consilium_shared.errors import ConfigurationError

_LOOKS = (0.2, 0.2, 0.2)
"""Seconds after which a lock that is held is tried again: ``is_held`` has it for a moment while it looks."""


class LockHeld(ConfigurationError):
    """Another process has the lock."""


class ProcessLock:
    """Lock held by one process at a time. As a context it names this process, and frees the lock at its end."""

    def __init__(self, path: Path, taken: str | None = None) -> None:
        """Takes the lock.

        Args:
            path: its file, made with its folder where there is none; it stays.
            taken: what to say where another process has it.

        Raises:
            LockHeld: another process has it; the message names that process.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take()
        except BlockingIOError as error:
            holder = self.note or "unknown"
            self.release()
            said = taken or f"{path} is held by another process"
            raise LockHeld(f"{said} ({holder}); stop that one first") from error
        except BaseException:
            self.release()
            raise

    def _take(self) -> None:
        for pause in _LOOKS:
            try:
                return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(pause)
        return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def note(self) -> str:
        """Note that the last holder wrote; empty when there never was one."""
        return os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip()

    def write_note(self) -> None:
        """Name this process to whoever finds the lock held, or finds it later."""
        os.pwrite(self._fd, f"process {os.getpid()}".encode().ljust(80), 0)
        os.fsync(self._fd)

    def release(self) -> None:
        """Free the lock; the file stays. Again: nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ProcessLock:
        self.write_note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """True while a process has the lock of this file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
