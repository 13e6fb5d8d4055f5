"""One DICOM radiograph of any scanner as a float32 image in [0, 1], prepared from itself alone.

The transformations are those of DICOM PS3.3: modality (C.11.1), VOI (C.11.2), photometric interpretation (C.7.6.3.1.2).
"""

from __future__ import annotations

import logging
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from consilium_shared.preparation.codestream import picture_size

_HEADER = [
    "SOPInstanceUID", "PatientID", "IssuerOfPatientID", "Modality", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation",
]  # fmt: skip
# pydicom warns with the values of the tags that it warns of, which name patients.
for _name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg", "rle"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False


FILE_BYTES = 2**30
"""One file, and what a deflated one holds."""
PIXELS = 100_000_000
"""Largest image (10,000 × 10,000): a damaged header must not make us ask for all of the memory."""
INFLATED_BYTES = 2**28
"""Most bytes that a deflated file may hold: more than any image of ``PIXELS`` that a scanner would deflate."""


class Unusable(Exception):
    """One file cannot be used; the text is the reason under which it is set aside. Never an error that a user sees."""


def read_header(path: Path) -> pydicom.Dataset:
    """The tags that decide whether a file counts, without its pixels; raises Unusable."""
    require_bounded(path)
    with _any_failure("not readable as DICOM"):
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)


def require_bounded(path: Path) -> None:
    """Check that a file is DICOM and holds no more than ``bounds`` allows, also once it is inflated; raises Unusable.

    pydicom inflates a whole file before it looks at the first tag.
    """
    with _any_failure("not readable as DICOM"), path.open("rb") as file:
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


def require_radiograph(header: pydicom.Dataset, modalities: tuple[str, ...]) -> None:
    """Check that a header announces one grey image of a modality that the study takes; raises Unusable."""
    with _any_failure("damaged header"):
        modality = str(header.get("Modality") or "")
        if modalities and modality not in modalities:
            shown = modality if modality.isalpha() and modality.isupper() and len(modality) <= 16 else "unknown"
            raise Unusable(f"modality {shown}")
        if not header.get("Rows") or not header.get("Columns"):
            raise Unusable("no image")
        if int(header.get("NumberOfFrames") or 1) != 1:
            raise Unusable("more than one frame")
        if int(header.get("SamplesPerPixel") or 1) != 1:
            raise Unusable("colour image")
        if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
            raise Unusable("photometric interpretation is neither MONOCHROME1 nor MONOCHROME2")
        if int(header.Rows) * int(header.Columns) > PIXELS:
            raise Unusable(f"more than {PIXELS // 10**6} million pixels")
        if not 1 <= int(header.get("BitsStored") or 0) <= int(header.get("BitsAllocated") or 0) <= 32:
            raise Unusable("BitsStored and BitsAllocated make no sense")


def stored_values(dataset: pydicom.Dataset) -> NDArray[Any]:
    """The stored pixel values, decompressed, as DICOM stores them (no rescaling, no window); raises Unusable."""
    with _any_failure("pixel data missing, damaged or in an unknown encoding"):
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            _require_same_size(dataset)
        return np.asarray(dataset.pixel_array)


def _require_same_size(dataset: pydicom.Dataset) -> None:
    """Raises Unusable where a decoder would make a picture of another size than the header announces."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    stream = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    size = picture_size(stream)
    if size is not None and size != (rows, columns):
        raise Unusable("the encoded picture has another size than Rows and Columns say")
    # A run makes 64 times its bytes at most; runs that are longer than what they make are a bomb or damaged.
    if dataset.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless:
        frames = int(dataset.get("NumberOfFrames") or 1)
        raw = frames * rows * columns * int(dataset.get("SamplesPerPixel") or 1) * int(dataset.BitsAllocated) // 8
        if len(stream) > 2 * raw + 1024:
            raise Unusable("the encoded picture is longer than its pixels")


def read_image(path: Path, size: int) -> NDArray[np.float32]:
    """One file as a ``size`` × ``size`` float32 image in [0, 1], white is bright; raises Unusable."""
    require_bounded(path)
    with _any_failure("not readable as DICOM"):
        dataset = pydicom.dcmread(path)
    stored = stored_values(dataset)
    if stored.ndim != 2:
        raise Unusable("pixel data is not one grey image")
    with _any_failure("rescale, window or spacing tags make no sense"):
        grey = present(dataset, stored)
        return resize(grey, size, aspect(dataset))


def present(dataset: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Grey values in [0, 1] from stored values.

    The VOI table or first window of the file if it has one, else the full range that its bits can hold: never the
    range that the pixels happen to fill. MONOCHROME1 is turned over, so that 1 is always white.
    """
    if dataset.get("RescaleSlope") == 0:
        raise Unusable("rescale, window or spacing tags make no sense")
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    if dataset.get("VOILUTSequence"):
        table = dataset.VOILUTSequence[0]
        grey = np.asarray(apply_voi(values.astype(np.int64), dataset), dtype=np.float64)
        grey = grey / (2.0 ** int(table.LUTDescriptor[2]) - 1)
    elif _first(dataset, "WindowWidth") is not None and _first(dataset, "WindowCenter") is not None:
        grey = _window(
            values,
            float(_first(dataset, "WindowCenter")),
            float(_first(dataset, "WindowWidth")),
            str(dataset.get("VOILUTFunction") or "LINEAR"),
        )
    else:
        low, high = _range(dataset)
        grey = (values - low) / (high - low)
    if not np.isfinite(grey).all():
        raise Unusable("rescale, window or spacing tags make no sense")
    grey = np.clip(grey, 0.0, 1.0)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        grey = 1.0 - grey
    return grey.astype(np.float32)


def aspect(dataset: pydicom.Dataset) -> float:
    """Height of a pixel over its width: 1 when the file gives no spacing."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = dataset.get(tag)
        if spacing is not None and len(spacing) == 2:
            height, width = float(spacing[0]), float(spacing[1])
            if height > 0 and width > 0 and 0.01 <= height / width <= 100:
                return height / width
            raise Unusable("rescale, window or spacing tags make no sense")
    return 1.0


def resize(grey: NDArray[np.float32], size: int, pixel_aspect: float = 1.0) -> NDArray[np.float32]:
    """Area-averaged to ``size`` × ``size`` with square pixels; the shorter side is centred between black margins."""
    height, width = grey.shape[0] * pixel_aspect, float(grey.shape[1])
    longest = max(height, width)
    rows, columns = max(1, round(size * height / longest)), max(1, round(size * width / longest))
    small = _area(grey.shape[0], rows) @ grey @ _area(grey.shape[1], columns).T
    image = np.zeros((size, size), dtype=np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    image[top : top + rows, left : left + columns] = np.clip(small, 0.0, 1.0)
    return image


@lru_cache(maxsize=16)
def _area(old: int, new: int) -> NDArray[np.float32]:
    """``[new, old]``: the share of each old pixel in each new one along one axis; rows add up to 1."""
    edges = np.linspace(0, old, new + 1)
    start, end = edges[:-1, None], edges[1:, None]
    pixel = np.arange(old)[None, :]
    overlap = np.clip(np.minimum(end, pixel + 1) - np.maximum(start, pixel), 0.0, None)
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)


def _window(values: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, with an output range of 0 to 1."""
    if function == "LINEAR" and width >= 1:
        if width == 1:
            return np.asarray(values > center - 0.5, dtype=np.float64)
        return np.asarray((values - (center - 0.5)) / (width - 1) + 0.5)
    if function == "LINEAR_EXACT" and width > 0:
        return np.asarray((values - center) / width + 0.5)
    if function == "SIGMOID" and width > 0:
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700, 700))))
    raise Unusable("rescale, window or spacing tags make no sense")


def _range(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Lowest and highest value after the modality transformation."""
    if dataset.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation) == 1
    ends = np.array([-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1] if signed else [0.0, 2.0**bits - 1])
    if dataset.get("RescaleSlope") is not None:
        ends = ends * float(dataset.RescaleSlope) + float(dataset.get("RescaleIntercept") or 0)
    return float(ends.min()), float(ends.max())


def _first(dataset: pydicom.Dataset, tag: str) -> Any:
    """First value of a tag that may hold several."""
    value = dataset.get(tag)
    if isinstance(value, pydicom.multival.MultiValue):
        return value[0] if len(value) else None
    return value


@contextmanager
def _any_failure(reason: str) -> Iterator[None]:
    """Turn whatever a reader or decoder raises on a foreign file into Unusable, and keep its words to ourselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Unusable:
        raise
    except Exception:  # any vendor's file may break a decoder in any way, and its message may quote the file
        raise Unusable(reason) from None
