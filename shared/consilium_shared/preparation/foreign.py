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
    "SOPClassUID", "SOPInstanceUID", "PatientID", "IssuerOfPatientID", "Modality", "Rows", "Columns", "NumberOfFrames",
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

_ELEMENTS = (0x00, 0x05, 0x08, 0x16)
_BARE = (b"\x02\0\0\0UL", *(b"\x08\0%c\0" % each for each in _ELEMENTS), *(b"\0\x08\0%c" % each for each in _ELEMENTS))
"""Starts of a data set without preamble: group 2, or one of the first elements of group 8 in either byte order."""
FILE_BYTES = 2**30
"""One file, and what a deflated one holds."""
INFLATED_BYTES = 2**28
"""Most bytes that a deflated file may hold: more than any image that a scanner would deflate."""


class Unusable(Exception):
    """One file cannot be used; the text is the reason under which it is set aside. Never an error that a user sees.

    Attributes:
        lasting: whether it follows from the file alone, so that the file need not be tried again.
    """

    lasting = True


class OutOfMemory(Unusable):
    """Lack of memory for one file: with more of it, or at another time, the file may be read."""

    lasting = False

    def __init__(self) -> None:
        super().__init__("this machine's memory did not suffice to decode it")


def read_header(path: Path) -> pydicom.Dataset:
    """The tags that decide whether a file counts, without its pixels; raises Unusable."""
    whole = require_bounded(path)
    with any_failure("not readable as DICOM"):
        tags = [*HEADER, *SCANNER]
        found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=not whole)
        if whole and not len(found) and "TransferSyntaxUID" not in found.file_meta:
            raise Unusable("nothing that can be read after DICOM's mark: damaged")
        return found if whole else _with_syntax(found)


def read_whole(path: Path) -> pydicom.Dataset:
    """All of a file, its pixels as they are encoded; raises Unusable."""
    whole = require_bounded(path)
    with any_failure("not readable as DICOM"):
        found = pydicom.dcmread(path, force=not whole)
        return found if whole else _with_syntax(found)


def require_bounded(path: Path) -> bool:
    """Check that a file is DICOM and holds no more than the bounds allow, also once it is inflated; raises Unusable.

    pydicom inflates a whole file before it looks at the first tag.

    Returns:
        whether it has the preamble and mark of DICOM's file format; some archives write data sets without.
    """
    with any_failure("not readable as DICOM"), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > FILE_BYTES:
            raise Unusable(f"file larger than {FILE_BYTES >> 20} MiB")
        start = file.read(132)
        marked = start[128:] == b"DICM"
        if not marked and not start.startswith(_BARE):
            raise Unusable("an empty file" if not start else "not a DICOM file")
        file.seek(132 if marked else 0)
        meta = pydicom.filereader._read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return marked
        inflating, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while (block := inflating.unconsumed_tail or file.read(2**16)) and not inflating.eof:
            size += len(inflating.decompress(block, 2**20))
            if size > INFLATED_BYTES:
                raise Unusable(f"deflated: holds more than {INFLATED_BYTES >> 20} MiB")
        return marked


def _with_syntax(found: pydicom.Dataset) -> pydicom.Dataset:
    """A data set read without DICOM's mark: it must say what it is, and its own encoding is its transfer syntax."""
    if not pydicom.uid.UID(str(found.get("SOPClassUID") or "")).is_valid:
        raise Unusable("not a DICOM file")
    if "TransferSyntaxUID" not in found.file_meta:
        implicit, little = found.original_encoding
        plain = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
        found.file_meta.TransferSyntaxUID = plain if little else pydicom.uid.ExplicitVRBigEndian
    return found


@contextmanager
def any_failure(reason: str) -> Iterator[None]:
    """Turn whatever a reader or decoder raises on a foreign file into Unusable, and keep its words to ourselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unusable:
        raise
    except MemoryError:
        raise OutOfMemory from None
    except Exception:  # any vendor's file may break a decoder in any way, and its message may quote the file
        raise Unusable(reason) from None
