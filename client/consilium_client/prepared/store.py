"""Store of prepared records of one site: one folder for each asset, kept over restarts, shared by all studies.

::

    ASSET/catalogue                     the asset's files
    ASSET/facts                         what the headers of the asset's files say
    ASSET/KIND-CODE/PREPARATION/*.pack  records; CODE, PREPARATION and the packs' names are 32 hex digits

Nothing else is ever deleted: a file goes if it has such a name at such a place and is a pack, and a folder goes once it
is empty. What the agent deletes by itself must have been written under the site's own key as well, so that a disk that
somebody shares with another home, or mounts here, loses nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.leftovers import remove_dead
from consilium_client.prepared.pack import is_pack, is_written_under
from consilium_shared.errors import ConfigurationError

UNUSED_DAYS = 30
"""A preparation that nobody has asked for in so many days is deleted."""
CATALOGUE, FACTS = "catalogue", "facts"
PACK = ".pack"
_HEX = "[0-9a-f]{32}"
_LEVELS = (re.compile(rf"[a-z0-9-]+-{_HEX}"), re.compile(_HEX))
"""Names of the folders of an asset, and of those in them."""
_PACKS = re.compile(_HEX + re.escape(PACK))


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
        """Delete what is kept of assets that the site has no more; raises ConfigurationError as ``clear``."""
        clear(self.folder, {each.name for each in _folders(self.folder)}.difference(assets), self._key)


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

    @property
    def facts(self) -> Path:
        """File of what the headers of the asset's files say."""
        return self.path / FACTS

    def make(self) -> None:
        """Make the folder; raises ConfigurationError where it is a link."""
        self.path.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in (self.path.parent, self.path):
            place.mkdir(exist_ok=True, mode=0o700)
            _require_own(place)

    def preparation(self, kind: str, code: str, digest: str) -> Path:
        """Folder of one preparation, marked as used now; those of older code and those long unused are deleted.

        Args:
            kind: of the recipe.
            code: digest of its code.
            digest: of the recipe.
        """
        release = self.path / f"{kind}-{self.key.name(code)}"
        here = release / self.key.name(digest)
        self.make()
        for place in (release, here):
            place.mkdir(exist_ok=True, mode=0o700)
            _require_own(place)
        os.utime(here)
        for other in _folders(self.path, _LEVELS[0]):
            older = other != release and other.name.startswith(f"{kind}-")
            for each in _folders(other, _LEVELS[1]):
                if older or _age_days(each) > UNUSED_DAYS:
                    _delete(each, self.key)
            _remove_empty(other)
        return here


def held(folder: Path) -> list[Held]:
    """Content of a store's folder, by asset."""
    return [found for each in _folders(folder) if (found := _held(each)) is not None]


def clear(folder: Path, assets: Collection[str], key: StoreKey | None = None) -> None:
    """Delete what is kept of these assets; an agent that trains on it goes on to the end of its round, and prepares it
    anew at its next start.

    Args:
        folder: of the store.
        assets: by their names.
        key: only what was written under this one is deleted; None: every pack.

    Raises:
        ConfigurationError: the folder is a link.
    """
    _require_own(folder)
    for asset in _folders(folder):
        if asset.name in assets:
            for release in _folders(asset, _LEVELS[0]):
                for each in _folders(release, _LEVELS[1]):
                    _delete(each, key)
                _remove_empty(release)
            _delete(asset, key)


def _require_own(folder: Path) -> None:
    """Raises ConfigurationError where a folder of the store is a link to one that may be somebody else's."""
    if folder.is_symlink():
        raise ConfigurationError(
            f"{folder} is a link. The prepared store is the site's own folder, in which files are written and deleted: "
            "remove the link. Where the disk is too small, move the site's whole home to a larger one"
        )


def _delete(folder: Path, key: StoreKey | None) -> None:
    """Delete the packs of a folder, under this key or any, and the folder where nothing else is in it."""
    remove_dead(folder)
    for each in _packs(folder):
        if key is None or is_written_under(key, each):
            with suppress(OSError):
                each.unlink()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or gone
        folder.rmdir()


def _age_days(folder: Path) -> float:
    try:
        return (time.time() - folder.stat().st_mtime) / 86400
    except FileNotFoundError:
        return 0.0


def _folders(folder: Path, named: re.Pattern[str] | None = None) -> list[Path]:
    """Folders in a folder, no links, those alone whose whole name is as ``named`` says."""
    try:
        found = [each for each in folder.iterdir() if named is None or named.fullmatch(each.name)]
        return sorted(each for each in found if each.is_dir() and not each.is_symlink())
    except OSError:  # gone, or of an account that does not let this one look
        return []


def _packs(folder: Path) -> Iterator[Path]:
    """Packs that lie in a folder itself, catalogue and facts among them."""
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for each in found:
        plain = each.name in (CATALOGUE, FACTS)  # a name that somebody else's file may have, too
        named = _PACKS.fullmatch(each.name) or plain
        if named and not each.is_symlink() and each.is_file() and (not plain or is_pack(each)):
            yield each


def _held(asset: Path) -> Held | None:
    """Content of an asset's folder; None where nothing in it is of the store."""
    releases = _folders(asset, _LEVELS[0])
    folders = [asset, *releases, *(each for release in releases for each in _folders(release, _LEVELS[1]))]
    size, files, used = 0, 0, 0.0
    for folder in folders:
        with suppress(FileNotFoundError):
            used = max(used, folder.stat().st_mtime)
        for each in _packs(folder):
            with suppress(FileNotFoundError):
                size, files = size + each.stat().st_size, files + 1
    return Held(asset.name, size, files, used) if files or releases else None
