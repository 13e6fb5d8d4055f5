"""A folder of DICOM files and a label table, prepared for an image study."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from consilium_client.data.asset import DicomAsset
from consilium_client.data.columns import place as place_of
from consilium_client.data.dataset import Dataset
from consilium_client.data.folder import files
from consilium_client.data.identity import canonical, strangers, unusable
from consilium_client.data.labels import LabelRows, number_rows, read_labels
from consilium_client.data.made import make_all
from consilium_client.data.recipes import ImageRecipe
from consilium_client.data.report import NothingUsable, Report, SetAside, Values
from consilium_client.prepared.recipe import Source
from consilium_client.prepared.store import AssetFolder
from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.radiograph import require_radiograph
from consilium_shared.study import Study


def load_dicom(
    asset: DicomAsset, study: Study, on_progress: Callable[[int, int], None], store: AssetFolder | None = None
) -> Dataset:
    """Data set of a folder of DICOM files and its label table; see ``data.load``.

    Headers are read first, without pixels, so that only files that count are decoded.
    """
    image = task.reads(study).image
    if image is None:
        raise DataError(f"study {study.study} has no images")
    aside, values, notes = SetAside(), Values(), SetAside()
    link = asset.file or asset.instance
    # An image's row belongs to its patient: with the patient in the key nobody's row can push out another's.
    key = [asset.patient] if link is None else [asset.patient, link]
    rows = read_labels(asset.table, asset, study, aside, notes, values, key=key)
    found = _files(asset, aside)
    total = 2 * len(found)
    chosen, row_of = _choose(found, asset, image, rows, aside, values, notes, lambda done: on_progress(done, total))

    recipe, sources = ImageRecipe(image.size), [Source((found[number],)) for number in chosen]
    made = make_all(recipe, sources, found, store, lambda done: on_progress(total - len(chosen) + done, total))
    for place in sorted(made.reasons):
        aside.add(made.reasons[place], where=_place(found[chosen[place]], asset))
    keep = made.usable
    if not keep.any():
        raise NothingUsable(f"{asset.path}: no usable image in {len(found)} files", Report(aside, values, notes))
    positions = np.asarray(row_of, dtype=np.int64)[keep]
    unused = rows.frame.index[~np.isin(np.arange(len(rows)), positions)]
    where = place_of(asset.table, unused) if len(unused) else ""
    aside.add("label table: row without a usable image", len(unused), where)
    taken = rows.take(positions)
    patients, train = number_rows(taken)
    return made.dataset(taken.targets, patients, train, Report(aside, values, notes))


def _files(asset: DicomAsset, aside: SetAside) -> list[Path]:
    """Every regular file below the folder, in name order; the label table and DICOMDIR indexes are no images."""
    return files(asset.path, aside, lambda path: path != asset.table and path.name != "DICOMDIR")


@dataclass(frozen=True)
class _Head:
    """Header of a file whose image the study takes."""

    number: int
    patient: str
    issuer: str
    instance: str


def _choose(
    found: list[Path],
    asset: DicomAsset,
    image: Image,
    rows: LabelRows,
    aside: SetAside,
    values: Values,
    notes: SetAside,
    on_progress: Callable[[int], None],
) -> tuple[list[int], list[int]]:
    """Numbers of the files that count and the position of the label row of each, by their headers alone.

    A file that says no PatientID counts for every patient whose row names it: which patients those are changes nothing
    for any one of them.
    """
    heads: list[_Head] = []
    issuers: dict[str, set[str]] = {}
    for number, path in enumerate(found):
        try:
            header = read_header(path)
            head = _head(number, header, image)
        except Unusable as error:
            aside.add(str(error), where=_place(path, asset))
        else:
            heads.append(head)
            values.profile.scanners.add(path, header)
            if head.patient and head.issuer:
                issuers.setdefault(head.patient, set()).add(head.issuer)
        on_progress(number + 1)
    shared = {patient for patient, of in issuers.items() if len(of) > 1}

    link = asset.file or asset.instance
    positions: dict[str, list[int]] = {}
    for row, key in enumerate(rows.frame[link or asset.patient].astype(object)):
        positions.setdefault(_slashes(key) if asset.file is not None else key, []).append(row)
    chosen: list[int] = []
    row_of: list[int] = []
    seen: set[tuple[str, str]] = set()
    strange: dict[str, str] = {}
    unnamed: dict[str, str] = {}
    for head in heads:
        where = _place(found[head.number], asset)
        try:
            of = _rows_of(head, found[head.number], asset, rows, positions, shared)
            # Doubles are sought within a patient: nobody's file can push out another patient's.
            of = [row for row in of if not head.instance or (str(rows.patient[row]), head.instance) not in seen]
            if not of:
                raise Unusable("the same image (SOPInstanceUID) again")
        except Unusable as error:
            aside.add(str(error), where=where)
            strange.setdefault(head.patient, where)
            unnamed.setdefault(_slashes(where), where)
        else:
            seen.update((str(rows.patient[row]), head.instance) for row in of)
            chosen += [head.number] * len(of)
            row_of += of
    for patient in strangers(strange, rows.patient.tolist()):
        notes.add(
            "PatientIDs that would match the label table without leading zeros, case or blanks", 1, strange[patient]
        )
    for name in strangers(unnamed, positions) if asset.file is not None else ():
        notes.add("files that would match the label table without leading zeros, case or blanks", 1, unnamed[name])
    return chosen, row_of


def _head(number: int, header: pydicom.Dataset, image: Image) -> _Head:
    require_radiograph(header, image.modality)
    if isinstance(header.get("PatientID"), pydicom.multival.MultiValue):
        raise Unusable("PatientID holds several values (a backslash stands between them)")
    issuer = canonical(str(header.get("IssuerOfPatientID") or "")).casefold()
    return _Head(
        number, canonical(str(header.get("PatientID") or "")), issuer, str(header.get("SOPInstanceUID") or "").strip()
    )


def _rows_of(
    head: _Head,
    path: Path,
    asset: DicomAsset,
    rows: LabelRows,
    positions: dict[str, list[int]],
    shared: Collection[str],
) -> list[int]:
    """Positions of a file's label rows; raises Unusable where it has none."""
    if head.patient in shared:
        raise Unusable("PatientID that several issuers gave: two people may have it")
    linked = asset.file is not None or asset.instance is not None
    if not linked and not head.patient:
        raise Unusable("no PatientID in the file")
    why = unusable(head.patient) if head.patient else None
    if why is not None and not linked:
        raise Unusable(f"PatientID is {why}")
    if asset.file is not None:
        key = _slashes(path.relative_to(asset.path).as_posix())
    else:
        key = head.instance if asset.instance is not None else head.patient
    of = positions.get(key, [])
    if not of:
        raise Unusable("no usable row in the label table")
    of = [row for row in of if not linked or head.patient in ("", rows.patient[row])]
    if not of:
        raise Unusable("PatientID differs from the label table's")
    return of


def _slashes(name: str) -> str:
    """A file's name relative to the folder in one spelling, also where a table was written under Windows."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def _place(path: Path, asset: DicomAsset) -> str:
    """Path of a file in its asset. Its name may carry an identifier: for this site's screen alone (``SetAside``)."""
    return path.relative_to(asset.path).as_posix()
