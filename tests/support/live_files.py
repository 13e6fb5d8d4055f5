"""Files of programs that are running: what is listed may be gone before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def contents(folder: Path, pattern: str = "*") -> Iterator[tuple[Path, bytes]]:
    """Every file below a folder, in order, that is there when it is read; no sockets, folders and the like."""
    for path in sorted(folder.rglob(pattern)):
        with suppress(FileNotFoundError):
            if path.is_file():
                yield path, path.read_bytes()


def modes(*folders: Path) -> Iterator[tuple[Path, int]]:
    """Everything in the folders with its permissions."""
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        with suppress(FileNotFoundError):
            yield path, path.stat().st_mode


def nameless(pid: int, folder: Path) -> list[bytes]:
    """What a process holds in files of this folder that have no name."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target = each.readlink()
            if target.is_relative_to(folder) and not target.exists():
                found.append(each.read_bytes())
    return found
