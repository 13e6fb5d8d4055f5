"""Foreign DICOM file, opened within bounds: whatever is wrong with it becomes a reason to set it aside."""

from __future__ import annotations

import logging
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom

HEADER = [
    "SOPInstanceUID", "PatientID", "IssuerOfPatientID", "Modality", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PresentationLUTShape", "SeriesInstanceUID", "BodyPartExamined", "ViewPosition", "ImageLaterality", "Laterality",
    "PresentationIntentType", "SeriesDescription", "AcquisitionDate", "SeriesDate", "StudyDate", "ImageType",
    "GantryDetectorTilt",
]  # fmt: skip
SCANNER = ["Manufacturer", "ManufacturerModelName", "AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate"]
"""Tags that only a hospital's own people look at, in their report."""
# pydicom warns with the values of the tags that it warns of, which name patients.
for _name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg", "rle"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False

FILE_BYTES = 2**30
"""One file, and what a deflated one holds."""
INFLATED_BYTES = 2**28
"""Most bytes that a deflated file may hold: more than any image that a scanner would deflate."""


class Unusable(Exception):
    """One file cannot be used; the text is the reason under which it is set aside. Never an error that a user sees."""


def read_header(path: Path) -> pydicom.Dataset:
    """The tags that decide whether a file counts, without its pixels; raises Unusable."""
    require_bounded(path)
    with any_failure("not readable as DICOM"):
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*HEADER, *SCANNER])


def read_whole(path: Path) -> pydicom.Dataset:
    """All of a file, its pixels as they are encoded; raises Unusable."""
    require_bounded(path)
    with any_failure("not readable as DICOM"):
        return pydicom.dcmread(path)


def require_bounded(path: Path) -> None:
    """Check that a file is DICOM and holds no more than the bounds allow, also once it is inflated; raises Unusable.

    pydicom inflates a whole file before it looks at the first tag.
    """
    with any_failure("not readable as DICOM"), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > FILE_BYTES:
            raise Unusable(f"file larger than {FILE_BYTES >> 20} MiB")
        start = file.read(132)
        if start[128:] != b"DICM":
            raise Unusable("an empty file" if not start else "not a DICOM file")
        meta = pydicom.filereader._read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return
        inflating, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while (block := inflating.unconsumed_tail or file.read(2**16)) and not inflating.eof:
            size += len(inflating.decompress(block, 2**20))
            if size > INFLATED_BYTES:
                raise Unusable(f"deflated: holds more than {INFLATED_BYTES >> 20} MiB")


@contextmanager
def any_failure(reason: str) -> Iterator[None]:
    """Turn whatever a reader or decoder raises on a foreign file into Unusable, and keep its words to ourselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unusable:
        raise
    except Exception:  # any vendor's file may break a decoder in any way, and its message may quote the file
        raise Unusable(reason) from None
