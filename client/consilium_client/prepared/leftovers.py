"""Leftovers of a program that was killed while it wrote into the store."""

from __future__ import annotations

import time
from pathlib import Path

HOURS = 1.0
"""A file under a hidden name is written in seconds; one that has not grown for so long has nobody who writes it."""


def remove_dead(folder: Path) -> None:
    """Delete what nobody is writing any more. It is encrypted, and no reader looks at it."""
    for leftover in folder.glob(".*"):
        try:
            if leftover.stat().st_mtime < time.time() - HOURS * 3600:
                leftover.unlink()
        except FileNotFoundError:
            continue
