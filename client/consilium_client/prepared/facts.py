"""Facts about an asset's files, such as what their headers say: kept while nothing says that a file changed."""

from __future__ import annotations

import json
import time
import zlib
from pathlib import Path
from typing import Any

from consilium_client.prepared.catalogue import Stamp
from consilium_client.prepared.leftovers import remove_dead
from consilium_client.prepared.pack import DamagedPack, Pack, write_pack
from consilium_client.prepared.store import AssetFolder
from consilium_shared.canonical import canonical_digest

_MOST_BYTES = 2**31
"""Facts of more are not kept: they are read from the files each time."""


class Facts:
    """JSON-like data by the path of a file, encrypted in one file of the store. A damaged one is an empty one.

    Nothing that goes wrong with it is an error: what is not kept is read from the files again.
    """

    def __init__(self, folder: AssetFolder, code: str) -> None:
        """Reads what is kept.

        Args:
            folder: of the asset.
            code: digest of the code that reads the facts: those of another are not used.
        """
        self._folder, self._about = folder, canonical_digest({"consilium prepared store": "facts 1", "code": code})
        self._kept: dict[str, tuple[Stamp, Any]] = {}
        self._found: dict[str, tuple[Stamp, Any]] = {}
        self._fresh = False
        try:
            packed = Pack(folder.facts, folder.key, self._about).index
            unpacking = zlib.decompressobj()
            content = json.loads(unpacking.decompress(packed, _MOST_BYTES))
            self._kept = {path: (Stamp(*stamp), fact) for path, stamp, fact in content}
        except (DamagedPack, OSError, ValueError, TypeError, zlib.error):
            return

    def known(self, path: Path, stamp: Stamp) -> Any:
        """The fact about a file that has this stamp now; None where there is none, or the file has changed."""
        kept = self._kept.get(str(path))
        if kept is None or kept[0] != stamp:
            return None
        self._found[str(path)] = kept
        return kept[1]

    def note(self, path: Path, stamp: Stamp, fact: Any) -> None:
        """Keep a fact; ``stamp`` was taken before the file was read. One that was only just written is not kept."""
        if stamp.settled(time.time_ns()):
            self._found[str(path)] = (stamp, fact)
            self._fresh = True

    def save(self) -> None:
        """Write what was found since the start, and nothing else, where it differs from what is kept."""
        if not self._fresh and self._found.keys() == self._kept.keys():
            return
        content = [[path, list(stamp), fact] for path, (stamp, fact) in self._found.items()]
        packed = zlib.compress(json.dumps(content).encode(), 1)
        try:
            self._folder.make()
            remove_dead(self._folder.path)
            write_pack(self._folder.facts, self._folder.key, self._about, packed)
        except OSError:
            pass  # the preparation that follows says what is wrong with the disk
        self._kept, self._fresh = dict(self._found), False
