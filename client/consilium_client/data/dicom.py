"""A folder of DICOM files and a label table, prepared for an image study."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from consilium_client.data.asset import DicomAsset
from consilium_client.data.labels import LabelRows, explain, number_rows, read_labels
from consilium_client.data.radiograph import Unusable, read_header, read_image, require_radiograph
from consilium_client.data.records import Records, SetAside, check_size
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.study import Study


def load_dicom(asset: DicomAsset, study: Study, on_progress: Callable[[int, int], None]) -> Records:
    """Records of a folder of DICOM files and its label table; see ``data.load``.

    Headers are read first, without pixels, so that only files that count are decoded, one at a time.
    """
    image = study.data.image
    if image is None:
        raise DataError(f"study {study.study} has no images")
    aside = SetAside()
    link = asset.file or asset.instance
    # An image's row belongs to its patient: with the patient in the key nobody's row can push out another's.
    key = [asset.patient] if link is None else [asset.patient, link]
    rows = read_labels(asset.table, asset, study, aside, key=key)
    files = _files(asset)
    total = 2 * len(files)
    chosen, row_of = _choose(files, asset, image, rows, aside, lambda done: on_progress(done, total))

    check_size(len(chosen), image.size**2)
    inputs = np.zeros((len(chosen), 1, image.size, image.size), dtype=np.float32)
    keep = np.ones(len(chosen), dtype=bool)
    for place, number in enumerate(chosen):
        try:
            inputs[place, 0] = read_image(files[number], image.size)
        except Unusable as error:
            keep[place] = False
            aside.add(str(error), where=_place(number))
        on_progress(total - len(chosen) + place + 1, total)
    if not keep.any():
        raise DataError(f"{asset.path}: no usable image in {len(files)} files{explain(aside)}")
    positions = np.asarray(row_of, dtype=np.int64)[keep]
    unused = len(rows) - len(np.unique(positions))
    aside.add("label table: row without a usable image", unused)
    taken = rows.take(positions)
    patients, patient_count, train = number_rows(taken)
    return Records(
        inputs if keep.all() else inputs[keep],
        None,
        taken.label,
        patients,
        patient_count,
        train,
        aside.counts,
        aside.first,
    )


def _files(asset: DicomAsset) -> list[Path]:
    """Every file below the folder, in name order; hidden files, the label table and DICOMDIR indexes are no images."""
    if not asset.path.is_dir():
        raise DataError(f"{asset.path} is not a folder")
    found: list[Path] = []
    for folder, inner, names in os.walk(asset.path):
        inner.sort()
        found += [Path(folder, name) for name in names if not name.startswith(".") and name != "DICOMDIR"]
    found = sorted(path for path in found if path != asset.table)
    if not found:
        raise DataError(f"{asset.path} holds no file")
    return found


def _choose(
    files: list[Path],
    asset: DicomAsset,
    image: Image,
    rows: LabelRows,
    aside: SetAside,
    on_progress: Callable[[int], None],
) -> tuple[list[int], list[int]]:
    """Numbers of the files that count and the position of the label row of each, by their headers alone.

    A file that says no PatientID counts for every patient whose row names it: which patients those are changes nothing
    for any one of them.
    """
    link = asset.file or asset.instance
    keys = rows.frame[link or asset.patient].astype(object).to_numpy()
    positions: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        positions.setdefault(key, []).append(place)
    chosen: list[int] = []
    row_of: list[int] = []
    seen: set[tuple[str, str]] = set()
    for number, path in enumerate(files):
        try:
            header = read_header(path)
            require_radiograph(header, image.modality)
            patient = str(header.get("PatientID") or "").strip()
            instance = str(header.get("SOPInstanceUID") or "")
            if asset.file is not None:
                key = path.relative_to(asset.path).as_posix()
            else:
                key = instance if asset.instance is not None else patient
            found = positions.get(key, [])
            if not found:
                raise Unusable("no usable row in the label table")
            found = [row for row in found if link is None or patient in ("", rows.patient[row])]
            if not found:
                raise Unusable("PatientID differs from the label table's")
            # Doubles are sought within a patient: nobody's file can push out another patient's.
            found = [row for row in found if not instance or (str(rows.patient[row]), instance) not in seen]
            if not found:
                raise Unusable("the same image (SOPInstanceUID) again")
        except Unusable as error:
            aside.add(str(error), where=_place(number))
        else:
            seen.update((str(rows.patient[row]), instance) for row in found)
            chosen += [number] * len(found)
            row_of += found
        on_progress(number + 1)
    return chosen, row_of


def _place(number: int) -> str:
    """Where a file is, without its name, which may carry an identifier."""
    return f"file {number + 1} in name order"
