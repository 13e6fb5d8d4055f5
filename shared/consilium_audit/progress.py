"""A bar for work that takes long: on the error stream, and only where that is a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TaskID

PATIENCE_SECONDS = 1.0
"""Work that is done sooner shows no bar."""
REFRESH_SECONDS = 0.1


class Bar:
    """``update`` takes what is being done; the bar disappears at the end."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._what = ""
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Show how much of ``what`` is done; the bar goes at the end."""
        now = time.monotonic()
        if what != self._what:
            self._end()
            self._what, self._began = what, now
        if done >= total:
            self._end()
        elif now - self._began >= PATIENCE_SECONDS and now - self._drawn >= REFRESH_SECONDS:
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task(what, total=total)
            self._progress.update(self._task, completed=done)
            self._drawn = now

    def _end(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            self._progress.stop()
