"""A DICOM file as a case: read as the study's sites read theirs, or with the reason to give no prediction."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pydicom

from consilium_serve.service import Case
from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.pixels import frames_of
from consilium_shared.preparation.record import Prepared, picture
from consilium_shared.preparation.selection import require_wanted
from consilium_shared.study import Study


def case_of(study: Study, path: Path) -> tuple[Case, pydicom.Dataset]:
    """Case of a file, and the file's tags without its pixels.

    Raises:
        DataError: the study has no images, or the file is no DICOM.
    """
    declared = task.reads(study).image
    if declared is None or declared.depth is not None:
        raise DataError(f"study {study.study} has no single images")
    try:
        header = read_header(path)
    except Unusable as error:
        raise DataError(str(error)) from None
    patient = str(header.get("PatientID") or "").strip()[:256] or None
    try:
        require_wanted(header, declared)
        if declared.frames == "each" and frames_of(header) != 1:
            raise Unusable("several frames, each of which would be a case of its own")
        prepared = picture(study, read_picture(path, declared))
    except Unusable as error:
        prepared = Prepared({}, (str(error),))
    try:
        tags = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # a foreign file may break the reader in any way, and its words may quote the file
        raise DataError("not readable as DICOM") from error
    return Case(prepared, patient), tags


def case_of_bytes(study: Study, data: bytes, folder: Path) -> Case:
    """Case of a file's bytes, which lie in ``folder`` while they are read; raises as ``case_of``."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, name = tempfile.mkstemp(dir=folder, suffix=".dcm")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        return case_of(study, Path(name))[0]
    finally:
        Path(name).unlink()
