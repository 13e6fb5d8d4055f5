"""Contact of this site's SuperNode with the server: when it was answered last, or why it ended.

run/contact.json    {"seen": time or null, "since": time or null, "cause": text or null}, by the SuperNode; times are
                    seconds since 1970
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE = "contact.json"
FRESH_SECONDS = 90.0
"""Seconds after an answer for which a SuperNode counts as connected: it looks at least every 30 s."""
EVERY_SECONDS = 5.0


@dataclass(frozen=True)
class Contact:
    """Last contact.

    Attributes:
        seen: time of the server's last answer.
        since: time of the first one of this SuperNode's life.
        cause: reason why the SuperNode ended, where it did after that.
    """

    seen: float | None = None
    since: float | None = None
    cause: str | None = None

    def connected(self, now: float | None = None) -> bool:
        """True where the server answers now."""
        at = time.time() if now is None else now
        return self.cause is None and self.seen is not None and at - self.seen < FRESH_SECONDS

    def said(self) -> str:
        """The contact in words, for people."""
        if self.connected():
            return f"since {_at(self.since)}"
        never = "never" if self.seen is None else f"not since {_at(self.seen)}"
        return never + (f"; {self.cause}" if self.cause else "")


def _at(moment: float | None) -> str:
    return "?" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"


def read(home: Path) -> Contact:
    """Contact that was noted last; none where nothing was."""
    try:
        return Contact(**json.loads((home / "run" / FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return Contact()


class Note:
    """Notes of one SuperNode's life."""

    def __init__(self, home: Path) -> None:
        self._file = home / "run" / FILE
        self._now = Contact(seen=read(home).seen)
        self._written = 0.0

    def answered(self) -> None:
        """The server answered."""
        now = time.time()
        self._now = Contact(now, self._now.since or now)
        if now - self._written > EVERY_SECONDS:
            self._write()

    def ended(self, cause: str) -> None:
        """The SuperNode ends."""
        self._now = Contact(self._now.seen, self._now.since, cause)
        self._write()

    def _write(self) -> None:
        """Replace the file; it is for people's eyes, and need not outlast a loss of power."""
        self._written = time.time()
        temporary = self._file.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(asdict(self._now)))
            temporary.replace(self._file)
        except OSError:  # a full disk; the next note may have room
            pass
