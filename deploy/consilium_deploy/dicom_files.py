"""Writing radiographs as DICOM files, for generated data and for published sets that came as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    generate_uid,
)

ENCODINGS = {"plain": ExplicitVRLittleEndian, "rle": RLELossless, "jpeg2000": JPEG2000Lossless}


@dataclass(frozen=True)
class Scanner:
    """Scanner, by the way it writes its images.

    Attributes:
        bits: bits stored, 8 to 16.
        spacing: millimetres between pixel rows and between columns.
        inverted: MONOCHROME1, where 0 is white.
        encoding: a key of ``ENCODINGS``.
        window: centre and width in stored values, or None.
        tags: further DICOM tags by keyword.
    """

    bits: int = 8
    spacing: tuple[float, float] = (1.0, 1.0)
    inverted: bool = False
    encoding: str = "plain"
    window: tuple[float, float] | None = None
    tags: dict[str, Any] = field(default_factory=dict)


def write_radiograph(path: Path, grey: NDArray[np.float64], patient: str, identity: str, scanner: Scanner) -> None:
    """Write one image.

    Args:
        path: the file to write.
        grey: ``[rows, columns]`` in [0, 1], 1 is white; stands in the file as the scanner stores it.
        patient: PatientID.
        identity: text from which the image's UID is made, the same in every run.
        scanner: bits, spacing, encoding and tags.
    """
    largest = 2**scanner.bits - 1
    stored = np.round(np.clip(1.0 - grey if scanner.inverted else grey, 0.0, 1.0) * largest)
    pixels = stored.astype(np.uint8 if scanner.bits == 8 else "<u2")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["consilium", identity])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["consilium study", identity])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=["consilium series", identity])
    dataset.PatientID = patient
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if scanner.inverted else "MONOCHROME2"
    dataset.BitsAllocated = 8 if scanner.bits == 8 else 16
    dataset.BitsStored = scanner.bits
    dataset.HighBit = scanner.bits - 1
    dataset.PixelRepresentation = 0
    dataset.ImagerPixelSpacing = list(scanner.spacing)
    if scanner.window is not None:
        dataset.WindowCenter, dataset.WindowWidth = scanner.window
    for keyword, value in scanner.tags.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if scanner.bits == 8 else "OW"
    if scanner.encoding != "plain":
        dataset.compress(ENCODINGS[scanner.encoding], generate_instance_uid=False)
    dataset.save_as(path, enforce_file_format=True)
