"""A bar for the steps of a verification that take long: on the error stream, and only where that is a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, TaskID

from consilium_audit.evidence import STEPS

PATIENCE_SECONDS = 1.0
"""What is done sooner shows no bar."""
REFRESH_SECONDS = 0.1


class Bar:
    """``update`` takes what ``Verification`` tells as ``on_work``; the bar disappears at the end."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._step = 0
        self._began = self._drawn = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, done: int, total: int) -> None:
        """So much of a step is done."""
        now = time.monotonic()
        if step != self._step:
            self._end_step()
            self._step, self._began = step, now
        if done >= total:
            self._end_step()
        elif now - self._began >= PATIENCE_SECONDS and now - self._drawn >= REFRESH_SECONDS:
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task(STEPS[step], total=total)
            self._progress.update(self._task, completed=done)
            self._drawn = now

    def _end_step(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            self._progress.stop()
