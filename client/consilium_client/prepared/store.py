"""Store of prepared records of one site: one folder for each asset, kept over restarts, shared by all studies."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from consilium_client.prepared.key import StoreKey

UNUSED_DAYS = 30
"""A preparation that nobody has asked for in so many days is deleted."""
CATALOGUE = "catalogue"
PACK = ".pack"


@dataclass(frozen=True)
class Held:
    """Content of the store of one asset.

    Attributes:
        asset: its name.
        size: bytes on the disk.
        files: number of files.
        used: seconds since 1970 when it was last asked for.
    """

    asset: str
    size: int
    files: int
    used: float


class PreparedStore:
    """Folders of a store, and what of them is deleted.

    Files are written whole and never changed, so several programs may use a store at once, and whatever is deleted
    under a reader's hands stays readable to its end.
    """

    def __init__(self, folder: Path, key: StoreKey, processes: int | None = None) -> None:
        """``processes``: most that prepare at once; None: one for each core that this account may use."""
        self.folder, self._key = folder, key
        self.processes = processes or len(os.sched_getaffinity(0))

    def asset(self, name: str) -> AssetFolder:
        """The folder of an asset."""
        return AssetFolder(self.folder / name, self._key, self.processes)

    def keep_only(self, assets: Collection[str]) -> None:
        """Delete what is kept of assets that the site has no more."""
        clear(self.folder, {each.name for each in _folders(self.folder)}.difference(assets))


@dataclass(frozen=True)
class AssetFolder:
    """Folder of one asset: a catalogue of its files, and a folder for each preparation.

    Attributes:
        path: the folder.
        key: the site's.
        processes: most that prepare at once.
    """

    path: Path
    key: StoreKey
    processes: int = 1

    @property
    def catalogue(self) -> Path:
        """File of the catalogue."""
        return self.path / CATALOGUE

    def preparation(self, kind: str, code: str, digest: str) -> Path:
        """Folder of one preparation, marked as used now; those of older code and those long unused are deleted.

        Args:
            kind: of the recipe.
            code: digest of its code.
            digest: of the recipe.
        """
        release = self.path / f"{kind}-{self.key.name(code)}"
        for other in _folders(self.path):
            if other != release and other.name.startswith(f"{kind}-"):
                shutil.rmtree(other, ignore_errors=True)
        here = release / self.key.name(digest)
        self.path.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in (self.path.parent, self.path, release, here):
            place.mkdir(exist_ok=True, mode=0o700)
        os.utime(here)
        for other in _folders(self.path):
            for each in _folders(other):
                if _age_days(each) > UNUSED_DAYS:
                    shutil.rmtree(each, ignore_errors=True)
        return here


def held(folder: Path) -> list[Held]:
    """Content of a store's folder, by asset."""
    return [_held(each) for each in _folders(folder)]


def clear(folder: Path, assets: Collection[str]) -> None:
    """Delete what is kept of these assets; an agent that trains on it goes on to the end of its round, and prepares it
    anew at its next start."""
    for each in _folders(folder):
        if each.name in assets:
            shutil.rmtree(each, ignore_errors=True)


def _age_days(folder: Path) -> float:
    try:
        return (time.time() - folder.stat().st_mtime) / 86400
    except FileNotFoundError:
        return 0.0


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
    except FileNotFoundError:
        return []


def _held(folder: Path) -> Held:
    size, files, used = 0, 0, 0.0
    for each in (folder, *folder.rglob("*")):
        try:
            found = each.stat()
        except FileNotFoundError:
            continue
        if each.is_dir():
            used = max(used, found.st_mtime)
        else:
            size, files = size + found.st_size, files + 1
    return Held(folder.name, size, files, used)
