"""Records of an asset's files, each prepared once: found in the store, or made now and kept there."""

from __future__ import annotations

import json
import resource
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consilium_client.prepared import processes
from consilium_client.prepared.catalogue import Catalogue, File
from consilium_client.prepared.leftovers import remove_dead
from consilium_client.prepared.machine import memory_bytes
from consilium_client.prepared.making import Failed, Record
from consilium_client.prepared.pack import DamagedPack, Pack, write_pack
from consilium_client.prepared.recipe import Recipe, Source
from consilium_client.prepared.rows import StoredRows
from consilium_client.prepared.store import PACK, AssetFolder
from consilium_shared.errors import ConfigurationError, DataError

PACK_BYTES = 2**27
"""Records that become one file; so many bytes are lost at most when a preparation is killed, and held until then."""
_FEW_PACKS = 8
"""Small packs that are left as they are; more become one."""


class Origin(NamedTuple):
    """Content that a record was made of: digests of its files, and what of them (``Source.detail``)."""

    sha256: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class Prepared:
    """Records of sources.

    Attributes:
        rows: those that could be made, in the order of the sources.
        usable: bool ``[sources]``, which those are.
        reasons: number of a source -> why it has none.
        remarks: number of a source -> what looks odd about its record.
    """

    rows: StoredRows
    usable: NDArray[np.bool_]
    reasons: dict[int, str]
    remarks: dict[int, str]


def prepare(
    folder: AssetFolder,
    recipe: Recipe,
    sources: Sequence[Source],
    there: Iterable[Path],
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Prepared:
    """Records of all sources: what the store has of them by their content is not made again.

    What was made of files that are gone is deleted: a pack in which there is such a record is written anew.

    Args:
        folder: of the asset.
        recipe: how a source becomes a record.
        sources: each one's record, or the reason why it has none.
        there: all files of the asset, also those that this study has no use for.
        on_progress: told the number of sources that are done.

    Raises:
        DataError: the disk is too small, or the store cannot be written.
    """
    try:
        return _Preparation(folder, recipe).run(sources, there, on_progress)
    except OSError as error:
        raise DataError(f"the prepared store {folder.path} cannot be used: {error.strerror}") from error
    except ConfigurationError as error:
        raise DataError(str(error)) from error


class _Preparation:
    """One preparation of an asset, while it is worked on."""

    def __init__(self, folder: AssetFolder, recipe: Recipe) -> None:
        self._folder, self._recipe, self._about = folder, recipe, recipe.digest
        self._path = folder.preparation(recipe.kind, recipe.code(), recipe.digest)
        remove_dead(self._path)
        remove_dead(folder.path)
        self._catalogue = Catalogue(folder.catalogue, folder.key)
        self._packs: list[Pack] = []
        self._index: dict[Origin, tuple[int, int] | str] = {}
        self._remarks: dict[Origin, str] = {}
        for file in sorted(self._path.glob(f"*{PACK}")):
            try:
                self._open(file)
            except DamagedPack:
                file.unlink(missing_ok=True)
            except FileNotFoundError:
                continue

    def run(self, sources: Sequence[Source], there: Iterable[Path], on_progress: Callable[[int], None]) -> Prepared:
        self._catalogue.keep(there)
        origins: list[Origin | None] = [self._known(source) for source in sources]
        unknown = [number for number, origin in enumerate(origins) if origin not in self._index]
        self._check_room(len(unknown))
        failed: dict[int, str] = {}
        finished = len(sources) - len(unknown)
        writer, under_way = _Writer(self), set[Origin]()

        def wanted(place: int, files: tuple[File, ...]) -> bool:
            source = sources[unknown[place]]
            origins[unknown[place]] = origin = _origin(source, files)
            for path, file in zip(source.paths, files, strict=True):
                self._catalogue.note(path, file)
            fresh = origin not in self._index and origin not in under_way
            under_way.add(origin)
            return fresh

        def done(place: int, outcome: Record | Failed | None) -> None:
            nonlocal finished
            number = unknown[place]
            origin = origins[number]
            if isinstance(outcome, Failed):
                failed[number] = outcome.reason
                if outcome.lasting and origin is not None:
                    writer.add_reason(origin, outcome.reason)
            elif outcome is not None and origin is not None:
                writer.add(origin, outcome)
            finished += 1
            on_progress(finished)

        try:
            left = [sources[number] for number in unknown]
            processes.prepare(self._recipe, left, wanted, done, self._folder.processes, memory_bytes() // 2)
            writer.flush()
        finally:
            self._catalogue.save()
        self._tidy()
        return self._found(origins, failed)

    def _known(self, source: Source) -> Origin | None:
        files = [self._catalogue.known(path) for path in source.paths]
        return None if None in files else _origin(source, [file for file in files if file is not None])

    def _found(self, origins: Sequence[Origin | None], failed: dict[int, str]) -> Prepared:
        usable, reasons, remarks = np.zeros(len(origins), dtype=bool), dict(failed), dict[int, str]()
        pack, slot = np.zeros(len(origins), dtype=np.int32), np.zeros(len(origins), dtype=np.int32)
        for number, origin in enumerate(origins):
            found = None if origin is None or number in failed else self._index.get(origin)
            if isinstance(found, str):
                reasons[number] = found
            elif found is not None:
                usable[number], (pack[number], slot[number]) = True, found
                if origin in self._remarks:
                    remarks[number] = self._remarks[origin]
            elif number not in reasons:  # another source of the same content failed, this time
                reasons[number] = "not readable"
        rows = StoredRows(self._packs, pack[usable], slot[usable], self._recipe.fields)
        return Prepared(rows, usable, reasons, remarks)

    def _check_room(self, count: int) -> None:
        need, free = count * self._recipe.record_bytes, shutil.disk_usage(self._path).free
        if need > free:
            raise DataError(
                f"{count} records to prepare take {need / 2**30:.1f} GiB, and the disk of {self._folder.path} has "
                f"{free / 2**30:.1f} GiB left. Make room, or move the site's whole home to a larger disk"
            )

    def _open(self, file: Path) -> None:
        _allow_files(len(self._packs))
        pack = Pack(file, self._folder.key, self._about)
        records, reasons, remarks = _parsed(pack)
        number = len(self._packs)
        self._packs.append(pack)
        self._index.update({origin: (number, slot) for slot, origin in enumerate(records)})
        self._index.update(reasons)
        self._remarks.update(remarks)

    def write(self, records: NDArray[np.uint8], origins: dict[Origin, str], reasons: dict[Origin, str]) -> None:
        """Write a pack and take it into use."""
        file = self._path / f"{secrets.token_hex(16)}{PACK}"
        index = {
            "records": [[list(origin.sha256), origin.detail, remark] for origin, remark in origins.items()],
            "unusable": [[list(origin.sha256), origin.detail, reason] for origin, reason in reasons.items()],
        }
        write_pack(file, self._folder.key, self._about, json.dumps(index).encode(), records)
        self._open(file)

    def _tidy(self) -> None:
        """Write packs anew in which there is a record of content that the asset has no more, and many small ones."""
        live = self._catalogue.digests
        small = [pack for pack in self._packs if len(pack) * self._recipe.record_bytes < PACK_BYTES // 2]
        again = small if len(small) > _FEW_PACKS else []
        again = again + [pack for pack in self._packs if pack not in again and not _all_live(pack, live)]
        if not again:
            return
        kept = [pack for pack in self._packs if pack not in again]
        self._packs, self._index, self._remarks = [], {}, {}
        for pack in kept:
            self._open(pack.path)
        writer = _Writer(self)
        for pack in again:
            for origin, record in _live(pack, live, self._recipe.record_bytes):
                if origin in self._index or origin in writer.held:
                    continue
                if isinstance(record, str):
                    writer.add_reason(origin, record)
                else:
                    writer.add(origin, record)
        writer.flush()
        for pack in again:  # only now: after a crash in between there are two of some records, never none
            pack.path.unlink(missing_ok=True)


class _Writer:
    """Records that become a pack once there are enough of them."""

    def __init__(self, preparation: _Preparation) -> None:
        self._to, self._size = preparation, preparation._recipe.record_bytes
        self._most = max(1, PACK_BYTES // max(1, self._size))
        self._rows = np.empty((self._most, self._size), dtype=np.uint8)  # no memory until it is written to
        self._origins: dict[Origin, str] = {}
        self._reasons: dict[Origin, str] = {}
        self.held: set[Origin] = set()

    def add(self, origin: Origin, record: Record) -> None:
        self._rows[len(self._origins)] = np.frombuffer(record.content, dtype=np.uint8)
        self._origins[origin] = record.remark
        self.held.add(origin)
        if len(self._origins) >= self._most:
            self.flush()

    def add_reason(self, origin: Origin, reason: str) -> None:
        self._reasons[origin] = reason
        self.held.add(origin)

    def flush(self) -> None:
        if self.held:
            self._to.write(self._rows[: len(self._origins)], self._origins, self._reasons)
        self._origins, self._reasons, self.held = {}, {}, set()


def _origin(source: Source, files: Iterable[File]) -> Origin:
    return Origin(tuple(file.sha256 for file in files), source.detail)


def _parsed(pack: Pack) -> tuple[list[Origin], dict[Origin, str], dict[Origin, str]]:
    """Origins of the records, the reasons why others have none, and the remarks."""
    try:
        index = json.loads(pack.index)
        records = [Origin(tuple(sha256), detail) for sha256, detail, _ in index["records"]]
        remarks = {Origin(tuple(sha256), detail): str(text) for sha256, detail, text in index["records"] if text}
        reasons = {Origin(tuple(sha256), detail): str(reason) for sha256, detail, reason in index["unusable"]}
    except (ValueError, KeyError, TypeError):
        raise DamagedPack(pack.path) from None
    if len(records) != len(pack):
        raise DamagedPack(pack.path)
    return records, reasons, remarks


def _all_live(pack: Pack, live: Collection[str]) -> bool:
    records, reasons, _ = _parsed(pack)
    return all(sha256 in live for origin in (*records, *reasons) for sha256 in origin.sha256)


def _live(pack: Pack, live: Collection[str], size: int) -> Iterator[tuple[Origin, Record | str]]:
    """Records, and reasons why there is none, of content that the asset still has; a damaged record is none."""
    records, reasons, remarks = _parsed(pack)
    for slot, origin in enumerate(records):
        if all(sha256 in live for sha256 in origin.sha256):
            row = np.empty((1, size), dtype=np.uint8)
            with suppress(DamagedPack):
                pack.read(np.array([slot]), row, np.array([0]))
                yield origin, Record(row.tobytes(), remarks.get(origin, ""))
    for origin, reason in reasons.items():
        if all(sha256 in live for sha256 in origin.sha256):
            yield origin, reason


def _allow_files(packs: int) -> None:
    """Let this process have as many files open as the system lets it, once the usual number will not do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft not in (resource.RLIM_INFINITY, hard) and packs > soft // 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
