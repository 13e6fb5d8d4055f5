"""Trials of this machine that have not ended: what the agent was at when something ended it.

A trial is tried on invented records before anything is charged. Where it takes more memory than there is, Linux may end
the whole program, and the supervisor starts it again: without a mark on the disk it would try the same again for ever.
Format 1: ``{"format": 1, "about": {…}, "times": …}``, canonical JSON, mode 0600. A trial that ends, in whatever way,
leaves no mark.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from consilium_shared.canonical import canonical_bytes, canonical_digest, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import remove_leftovers, write_atomically

FORMAT = 1

TIMES = 2
"""Trials that the agent did not outlive, after which the same is not tried again: one may have had another cause."""


class Trials:
    """One small file for each trial that has begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)
        self._under_way: Path | None = None

    @contextmanager
    def trying(self, about: dict[str, Any]) -> Iterator[None]:
        """Around a trial of exactly this. ``about`` has the study's digest as ``study``."""
        file = self._file(about)
        write_atomically(file, canonical_bytes({"format": FORMAT, "about": about, "times": self.times(about) + 1}))
        self._under_way = file
        try:
            yield
        finally:
            self.stopped()

    def stopped(self) -> None:
        """The trial under way has ended, or somebody stops this program in the midst of it."""
        if self._under_way is not None:
            self._under_way.unlink(missing_ok=True)
            self._under_way = None

    def times(self, about: dict[str, Any]) -> int:
        """Number of times that the agent was ended while it tried exactly this."""
        return int(_read(self._file(about)).get("times", 0))

    def gone_wrong(self, about: dict[str, Any]) -> str:
        """Reason, in words, why exactly this is not tried again; empty where it may be."""
        times = self.times(about)
        if times < TIMES:
            return ""
        return f"the agent was ended {times} times while it was tried, as for memory; see consilium-site retry"

    def all(self) -> Iterator[dict[str, Any]]:
        """Subjects of the trials that are not tried again."""
        for file in sorted(self.folder.glob("*.json")):
            found = _read(file)
            if found.get("times", 0) >= TIMES:
                yield found["about"]

    def forget(self, study: str) -> int:
        """Delete the marks of a study's digest; returns how many there were."""
        files = [file for file in self.folder.glob("*.json") if _read(file).get("about", {}).get("study") == study]
        for file in files:
            file.unlink(missing_ok=True)
        return len(files)

    def _file(self, about: dict[str, Any]) -> Path:
        return self.folder / f"{canonical_digest(about)}.json"


def _read(file: Path) -> dict[str, Any]:
    """Contents of a mark; nothing where it cannot be read: then the trial is made."""
    try:
        found = parse_canonical(file.read_bytes())
    except (OSError, PeerError):
        return {}
    known = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("about"), dict)
    return found if known and isinstance(found.get("times"), int) else {}
