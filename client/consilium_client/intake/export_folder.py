"""Folder of a fetched export, which takes the place of the one before whole or not at all.

    NAME/                   the export that ``import-fhir`` reads, and export.json, which lists its files
    .NAME.arriving/         one that is under way: job.json and its files; export.json when it is whole
    .NAME.before/           the one before, for the moment in which the folders change places

What no pull has written is never deleted.
"""

from __future__ import annotations

import json
from pathlib import Path

from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically
from consilium_shared.printable import printable

MANIFEST, JOB = "export.json", "job.json"


def arriving(folder: Path) -> Path:
    """Folder of the export under way, made where it is not there; a pull that was killed at its end is finished first.

    Raises:
        ConfigurationError: ``folder`` holds what no pull has written.
    """
    _finish(folder)
    _require_own(folder)
    made = _beside(folder, "arriving")
    made.mkdir(parents=True, exist_ok=True, mode=0o700)
    return made


def complete(folder: Path, names: list[str]) -> None:
    """Put the export under way, which has these files, in the place of the one before."""
    write_atomically(_beside(folder, "arriving") / MANIFEST, json.dumps({"files": names}, indent=2).encode())
    _change_places(folder)


def begin_anew(made: Path) -> None:
    """Delete what has come of an export under way, which the server no longer knows."""
    for file in made.iterdir():
        file.unlink()


def _beside(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}"


def _manifest(folder: Path) -> set[str] | None:
    try:
        found = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return {MANIFEST, *map(str, found)}


def _require_own(folder: Path) -> None:
    """Refuse a folder with files that no pull has written: they would go with the export before."""
    if not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigurationError(f"{folder} is no folder of its own: name one that pull-fhir can make")
    others = {each.name for each in folder.iterdir()} - (_manifest(folder) or set())
    if others:
        raise ConfigurationError(
            f"{folder} holds files that no pull has written, {printable(min(others))[:80]} among them: move them, or "
            "name another folder"
        )


def _change_places(folder: Path) -> None:
    """Put the export that has arrived in the place of the one before; each step can be the last before a crash."""
    made, before = _beside(folder, "arriving"), _beside(folder, "before")
    (made / JOB).unlink(missing_ok=True)
    if folder.exists():
        folder.rename(before)
    made.rename(folder)
    _delete(before)


def _finish(folder: Path) -> None:
    """Do what a pull that was killed between two steps of its end had left to do."""
    made, before = _beside(folder, "arriving"), _beside(folder, "before")
    if (made / MANIFEST).exists():
        _require_own(folder)
        _change_places(folder)
    elif before.exists() and not folder.exists():
        before.rename(folder)
    _delete(before)


def _delete(before: Path) -> None:
    """Delete an export that was replaced: its own files alone."""
    for name in _manifest(before) or set():
        if name == Path(name).name:
            (before / name).unlink(missing_ok=True)
    if before.exists():
        before.rmdir()
