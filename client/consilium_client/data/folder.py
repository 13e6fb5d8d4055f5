"""A folder's files: the regular ones to any depth, and a count of everything else with the reason."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from consilium_client.data import bounds
from consilium_client.data.report import SetAside
from consilium_shared.errors import DataError

_SYSTEMS_OWN = frozenset({"lost+found", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"})
"""Folders in which storage systems keep what was deleted, and thumbnails."""


def walk(folder: Path, aside: SetAside) -> Iterator[Path]:
    """Regular files below a folder, each folder in name order; links to folders last, each real folder once.

    Counted and not entered: hidden folders and those of storage systems (they hold what was deleted), folders that
    this account cannot read, links back to a folder that was read or that holds this one. Counted and not yielded:
    hidden files, links to nothing, and what is no regular file, which a reader would wait for.

    Args:
        folder: where to begin.
        aside: takes the counts, with places relative to ``folder``.

    Raises:
        DataError: no folder, not readable by this account, or more than ``bounds.FILES`` files.
    """
    try:
        top = folder.stat()
        os.scandir(folder).close()
    except NotADirectoryError:
        raise DataError(f"{folder} is not a folder") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{folder} is not a folder: there is no such file") from None
        raise DataError(f"cannot read {folder}: {error.strerror}") from None
    above = {_key(parent.stat()) for parent in folder.resolve().parents}
    read, count = {_key(top)}, 0
    own = [folder]
    links: list[tuple[Path, tuple[int, int]]] = []
    while own or links:
        place = own.pop() if own else links.pop(0)[0]
        inner: list[Path] = []
        for entry in _entries(place, folder, aside):
            path = place / entry.name
            where = path.relative_to(folder).as_posix()
            try:
                found = entry.stat()
            except OSError as error:
                broken = entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP)
                aside.add("link to nothing" if broken else f"not readable: {error.strerror}", where=where)
                continue
            if stat.S_ISDIR(found.st_mode):
                if entry.name.startswith(".") or entry.name in _SYSTEMS_OWN:
                    aside.add("hidden folder, not entered", where=where)
                elif _key(found) in above:
                    aside.add("link to a folder that holds this one, not followed", where=where)
                elif entry.is_symlink():
                    links.append((path, _key(found)))
                else:
                    read.add(_key(found))
                    inner.append(path)
            elif not stat.S_ISREG(found.st_mode):
                aside.add(f"{bounds.kind_of(found.st_mode)}, where a file is meant", where=where)
            elif entry.name.startswith("."):
                aside.add("hidden file, not read", where=where)
            else:
                count += 1
                if count > bounds.FILES:
                    raise DataError(f"{folder} holds more than {bounds.FILES} files")
                yield path
        own += reversed(inner)
        while links and not own:
            if links[0][1] not in read:
                read.add(links[0][1])
                break
            aside.add("link to a folder that is read already", where=links.pop(0)[0].relative_to(folder).as_posix())


def _entries(place: Path, folder: Path, aside: SetAside) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        aside.add(f"folder not readable: {error.strerror}", where=place.relative_to(folder).as_posix())
        return []


def _key(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def files(folder: Path, aside: SetAside, wanted: Callable[[Path], bool]) -> list[Path]:
    """The wanted files below a folder, in name order; raises DataError also where there is none. See ``walk``."""
    found = sorted(path for path in walk(folder, aside) if wanted(path))
    if not found:
        why = "".join(f"; {count} × {reason}" for reason, count in aside.counts.items())
        raise DataError(f"{folder} holds no file{why}")
    return found
