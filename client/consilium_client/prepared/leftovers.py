"""Leftovers of a program that was killed while it wrote into the store."""

from __future__ import annotations

import re
import time
from pathlib import Path

from consilium_shared.files import leftovers

_OURS = re.compile(r"\.(?:catalogue|facts|[0-9a-f]{32}\.pack)\.[a-z0-9_]{8}")
HOURS = 1.0
"""A file under a hidden name is written in seconds; one that has not grown for so long has nobody who writes it."""


def remove_dead(folder: Path) -> None:
    """Delete what nobody is writing any more. It is encrypted, and no reader looks at it."""
    for leftover in filter(lambda found: _OURS.fullmatch(found.name), leftovers(folder)):
        try:
            if leftover.stat().st_mtime < time.time() - HOURS * 3600:
                leftover.unlink()
        except FileNotFoundError:
            continue
