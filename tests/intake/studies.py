"""Invented studies, as an archive holds them: names, private tags, dates, several scanners, several encodings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

PLANTED = "QZPLANTED"
"""Stands in every text by which a patient or a member of staff could be known."""


def instance(study: int, number: int, **tags: Any) -> Dataset:
    """One image: study ``study`` is of patient ``study // 2``, so that each patient has two."""
    patient = study // 2
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)[study % 2]
    made.file_meta.SourceApplicationEntityTitle = PLANTED
    made.SOPClassUID = (DigitalXRayImageStorageForPresentation, ComputedRadiographyImageStorage, CTImageStorage)[
        study % 3
    ]
    made.Modality = ("DX", "CR", "CT")[study % 3]
    made.SOPInstanceUID = f"1.2.826.0.1.3680043.10.1.{study}.1.{number}"
    made.StudyInstanceUID = f"1.2.826.0.1.3680043.10.1.{study}"
    made.SeriesInstanceUID = f"1.2.826.0.1.3680043.10.1.{study}.1"
    made.FrameOfReferenceUID = f"1.2.826.0.1.3680043.10.1.{study}.9"
    made.PatientID = f"{PLANTED}-{patient:04}"
    made.PatientName = f"{PLANTED}^Anna"
    made.PatientBirthDate = "19210405"
    made.PatientAge, made.PatientSex = "095Y", "F"
    made.AccessionNumber = f"A{study:05}"
    made.StudyDate, made.StudyTime = f"202401{10 + study % 2 * 7:02}", "101500"
    made.AcquisitionDate = made.SeriesDate = made.ContentDate = made.StudyDate
    made.ReferringPhysicianName = made.OperatorsName = f"{PLANTED}^Doctor"
    made.InstitutionName = made.StudyDescription = made.SeriesDescription = f"{PLANTED} thorax"
    made.ImageComments = made.DeviceSerialNumber = made.StationName = PLANTED
    made.Manufacturer = "Maker"
    made.BodyPartExamined, made.ViewPosition = "CHEST", "PA"
    made.ImageType = ["ORIGINAL", "PRIMARY"]
    made.BurnedInAnnotation = "NO"
    made.InstanceNumber, made.SeriesNumber = number, 1
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows = made.Columns = 32
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelSpacing = [0.5, 0.5]
    made.RescaleIntercept, made.RescaleSlope = 0, 1
    block = made.private_block(0x0019, "ACME", create=True)
    block.add_new(0x01, "LO", PLANTED)
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    pixels = np.random.default_rng(study * 100 + number).integers(0, 4096, (made.Rows, made.Columns), dtype=np.uint16)
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW"
    return made


def write(folder: Path, studies: int = 4, images: int = 3, compressed: bool = True) -> list[Path]:
    """Files of so many studies of so many images; every third image is compressed."""
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for study in range(studies):
        for number in range(images):
            made = instance(study, number)
            if compressed and number % 3 == 2:
                made.compress(RLELossless, generate_instance_uid=False)
            file = folder / f"{study}-{number}.dcm"
            made.save_as(file, enforce_file_format=True)
            files.append(file)
    return files
