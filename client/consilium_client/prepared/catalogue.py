"""Catalogue of an asset's files: the digest of each one's content, for as long as nothing says that it changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.pack import DamagedPack, Pack, write_pack
from consilium_shared.canonical import canonical_digest

_SETTLED_NS = 2_000_000_000
"""A file that was changed less than this before it was looked at may change again under the same time stamps."""


class Stamp(NamedTuple):
    """Everything by which the system shows that a file is still the one it was."""

    size: int
    modified_ns: int
    changed_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Stamp of a file as it is now; raises OSError."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)

    def settled(self, at_ns: int) -> bool:
        """True where a change after this moment must show in the stamp."""
        return max(self.modified_ns, self.changed_ns) < at_ns - _SETTLED_NS


class File(NamedTuple):
    """A file as it was read: its stamp, and SHA-256 of its content in hex digits."""

    stamp: Stamp
    sha256: str


def read_file(path: Path) -> File:
    """Stamp and digest of a regular file, which is read to its end; raises OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would be waited for
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        stamp = Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)
        return File(stamp, hashlib.file_digest(file, "sha256").hexdigest())


class Catalogue:
    """Files by their path, kept encrypted in one file of the store. A damaged one is an empty one."""

    def __init__(self, file: Path, key: StoreKey) -> None:
        self._file, self._key, self._changed = file, key, False
        self._files: dict[str, File] = {}
        self._fresh: set[str] = set()
        try:
            content = json.loads(Pack(file, key, _ABOUT).index)
        except FileNotFoundError:
            return
        except (DamagedPack, OSError, ValueError):
            self._changed = True
            return
        self._files = {path: File(Stamp(*stamp), sha256) for path, stamp, sha256 in content}

    def known(self, path: Path) -> File | None:
        """The file as it was read, if it has not changed since; None where it has, or was never read."""
        kept = self._files.get(str(path))
        try:
            return kept if kept is not None and Stamp.of(path) == kept.stamp else None
        except OSError:
            return None

    def note(self, path: Path, file: File) -> None:
        """Keep what a file was read as; one that has only just been written is read again the next time."""
        self._fresh.add(file.sha256)
        if file.stamp.settled(time.time_ns()):
            self._files[str(path)] = file
            self._changed = True

    def keep(self, paths: Iterable[Path]) -> None:
        """Forget every file but these, and those of them that have changed."""
        there = {str(path) for path in paths if self.known(path) is not None}
        gone = [path for path in self._files if path not in there]
        for path in gone:
            del self._files[path]
        self._changed = self._changed or bool(gone)

    @property
    def digests(self) -> Collection[str]:
        """Digests of all files that are kept, and of those that were read just now."""
        return self._fresh.union(file.sha256 for file in self._files.values())

    def save(self) -> None:
        """Write it durably, where it has changed."""
        if self._changed:
            content = [[path, list(file.stamp), file.sha256] for path, file in self._files.items()]
            write_pack(self._file, self._key, _ABOUT, json.dumps(content).encode())
            self._changed = False


_ABOUT = canonical_digest("consilium prepared store: catalogue 1")
