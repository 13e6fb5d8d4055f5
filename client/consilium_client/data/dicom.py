"""A folder of DICOM files and a label table, prepared for an image study."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable, Collection, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom

from consilium_client.data.asset import DicomAsset
from consilium_client.data.dataset import Dataset
from consilium_client.data.folder import files
from consilium_client.data.headers import Headers
from consilium_client.data.identity import canonical, strangers, unusable
from consilium_client.data.labels import LabelRows, read_labels
from consilium_client.data.report import Report, SetAside, Values
from consilium_client.data.sources import Gathered, gather, where
from consilium_client.prepared.recipe import Source
from consilium_client.prepared.store import AssetFolder
from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, any_failure
from consilium_shared.preparation.pixels import frames_of
from consilium_shared.preparation.selection import require_wanted
from consilium_shared.preparation.tags import first_number, whole
from consilium_shared.study import Study

TILT = 0.5
"""Degrees of a gantry's tilt from which on slices are no longer one above the other."""
PIXEL_BYTES = 24
"""Memory that a number of a picture or volume takes while it is prepared; 14 to 18 were measured."""
FRAMES = 2000
"""Frames of one file that are taken as records of their own."""


def load_dicom(
    asset: DicomAsset, study: Study, on_progress: Callable[[int, int], None], store: AssetFolder | None = None
) -> Dataset:
    """Data set of a folder of DICOM files and its label table; see ``data.load``.

    Headers are read first, without pixels, so that only files that count are decoded.
    """
    image = task.reads(study).image
    if image is None:
        raise DataError(f"study {study.study} has no images")
    if image.depth is not None and (asset.file or asset.instance) is not None:
        raise DataError("file and instance link single images; a study of volumes takes patient or series")
    aside, values, notes = SetAside(), Values(), SetAside()
    # An image's row belongs to its patient: with the patient in the key nobody's row can push out another's.
    key = [asset.patient, *([asset.link] if asset.link is not None else [])]
    rows = read_labels(asset.table, asset, study, aside, notes, values, key=key)
    found = _files(asset, aside)
    half = len(found)
    heads = _heads(found, Headers(store), asset, image, aside, values, lambda done: on_progress(done, 2 * half))
    linked = _link(heads, asset, rows, aside, notes)
    sources = _series(linked, notes) if image.depth is not None else _pictures(linked, image)
    report = Report(aside, values, notes)
    told = lambda done: on_progress(half + half * done // max(1, len(sources)), 2 * half)  # noqa: E731
    return gather(Gathered(asset.path, asset.table, tuple(found)), sources, rows, image, report, store, told)


def _pictures(linked: Sequence[tuple[_Head, int]], image: Image) -> list[tuple[Source, int]]:
    """A source for each file, or for each frame."""
    return [
        (Source((head.path,), "" if frame is None else str(frame), head.memory), row)
        for head, row in linked
        for frame in (range(head.frames) if image.frames == "each" else (None,))
    ]


def _series(linked: Sequence[tuple[_Head, int]], notes: SetAside) -> list[tuple[Source, int]]:
    """A source for each series of a row; a file that holds several frames is a series of its own."""
    found: dict[tuple[int, str], list[_Head]] = {}
    for head, row in linked:
        apart = head.series if head.frames == 1 and head.series else head.path.as_posix()
        found.setdefault((row, apart), []).append(head)
    for heads in found.values():
        if any(head.tilted for head in heads):
            notes.add(
                "series of a tilted gantry: its slices are shifted against each other", 1, str(heads[0].path.name)
            )
    return [
        (Source(tuple(head.path for head in heads), memory=sum(head.memory for head in heads)), row)
        for (row, _), heads in found.items()
    ]


def _files(asset: DicomAsset, aside: SetAside) -> list[Path]:
    """Every regular file below the folder, in name order; the label table and DICOMDIR indexes are no images."""
    return files(asset.path, aside, lambda path: path != asset.table and path.name != "DICOMDIR")


@dataclass(frozen=True)
class _Head:
    """A file's header that announces an image that the study takes."""

    path: Path
    patient: str
    issuer: str
    instance: str
    series: str
    frames: int
    tilted: bool
    memory: int


def _heads(
    found: Sequence[Path],
    headers: Headers,
    asset: DicomAsset,
    image: Image,
    aside: SetAside,
    values: Values,
    on_progress: Callable[[int], None],
) -> list[_Head]:
    """Headers of the files that the study and the asset take; the others are counted."""
    heads: list[_Head] = []
    for number, path in enumerate(found):
        try:
            header = headers.read(path)
            heads.append(_head(path, header, asset, image))
        except Unusable as error:
            aside.add(str(error), where=where(path, asset.path))
        else:
            values.profile.scanners.add(path, header)
        on_progress(number + 1)
    headers.save()
    return heads


def _head(path: Path, header: pydicom.Dataset, asset: DicomAsset, image: Image) -> _Head:
    require_wanted(header, image, asset.select)
    frames = frames_of(header)
    if frames > FRAMES:
        raise Unusable(f"more than {FRAMES} frames")
    if isinstance(header.get("PatientID"), MutableSequence):
        raise Unusable("PatientID holds several values (a backslash stands between them)")
    issuer = canonical(str(header.get("IssuerOfPatientID") or "")).casefold()
    patient = canonical(str(header.get("PatientID") or ""))
    instance, series = (str(header.get(tag) or "").strip() for tag in ("SOPInstanceUID", "SeriesInstanceUID"))
    tilted = abs(first_number(header, "GantryDetectorTilt") or 0.0) > TILT
    return _Head(path, patient, issuer, instance, series, frames, tilted, _memory(path, header, image, frames))


def _memory(path: Path, header: pydicom.Dataset, image: Image, frames: int) -> int:
    """Bytes of memory that preparing a file takes, about: the file, and one of its frames or all."""
    with any_failure("damaged header"):
        numbers = whole(header, "Rows", 0) * whole(header, "Columns", 0) * whole(header, "SamplesPerPixel", 1)
        return path.stat().st_size + PIXEL_BYTES * numbers * (frames if image.depth is not None else 1)


def _link(
    heads: Sequence[_Head], asset: DicomAsset, rows: LabelRows, aside: SetAside, notes: SetAside
) -> list[tuple[_Head, int]]:
    """Heads that have a label row, each with the position of its row.

    A file that says no PatientID counts for every patient whose row names it: which patients those are changes nothing
    for any one of them.
    """
    issuers: dict[str, set[str]] = {}
    for head in heads:
        if head.patient and head.issuer:
            issuers.setdefault(head.patient, set()).add(head.issuer)
    shared = {patient for patient, of in issuers.items() if len(of) > 1}
    positions: dict[str, list[int]] = {}
    for row, key in enumerate(rows.frame[asset.link or asset.patient].astype(object)):
        positions.setdefault(_slashes(key) if asset.file is not None else key, []).append(row)
    chosen: list[tuple[_Head, int]] = []
    seen: set[tuple[str, str]] = set()
    strange: dict[str, str] = {}
    unnamed: dict[str, str] = {}
    for head in heads:
        name = where(head.path, asset.path)
        try:
            of = _rows_of(head, asset, rows, positions, shared)
            # Doubles are sought within a patient: nobody's file can push out another patient's.
            of = [row for row in of if not head.instance or (str(rows.patient[row]), head.instance) not in seen]
            if not of:
                raise Unusable("the same image (SOPInstanceUID) again")
        except Unusable as error:
            aside.add(str(error), where=name)
            strange.setdefault(head.patient, name)
            unnamed.setdefault(_slashes(name), name)
        else:
            seen.update((str(rows.patient[row]), head.instance) for row in of)
            chosen += [(head, row) for row in of]
    for patient in strangers(strange, rows.patient.tolist()) if asset.identity == "both" else ():
        notes.add(
            "PatientIDs that would match the label table without leading zeros, case or blanks", 1, strange[patient]
        )
    for name in strangers(unnamed, positions) if asset.file is not None else ():
        notes.add("files that would match the label table without leading zeros, case or blanks", 1, unnamed[name])
    return chosen


def _rows_of(
    head: _Head, asset: DicomAsset, rows: LabelRows, positions: dict[str, list[int]], shared: Collection[str]
) -> list[int]:
    """Positions of a file's label rows; raises Unusable where it has none."""
    if asset.identity == "both":
        if head.patient in shared:
            raise Unusable("PatientID that several issuers gave: two people may have it")
        if asset.link is None and not head.patient:
            raise Unusable("no PatientID in the file")
        why = unusable(head.patient) if head.patient else None
        if why is not None and asset.link is None:
            raise Unusable(f"PatientID is {why}")
    if asset.file is not None:
        key = _slashes(where(head.path, asset.path))
    elif asset.instance is not None:
        key = head.instance
    else:
        key = head.patient if asset.series is None else head.series
    of = positions.get(key, [])
    if not of:
        raise Unusable("no usable row in the label table")
    if asset.identity == "table":
        return of  # every patient whose row names it: one patient's row cannot push out another's
    of = [row for row in of if asset.link is None or head.patient in ("", rows.patient[row])]
    if not of:
        raise Unusable("PatientID differs from the label table's")
    return of


def _slashes(name: str) -> str:
    """A file's name relative to the folder in one spelling, also where a table was written under Windows."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
