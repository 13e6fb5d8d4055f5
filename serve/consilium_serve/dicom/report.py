"""A prediction as a DICOM Structured Report (TID 1500, Measurement Report) beside the image that it is about."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import highdicom as hd
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from consilium_serve.model import Model

_SCHEME = "99CONSILIUM"
_COMMENT = hd.sr.CodedConcept("121106", "DCM", "Comment")
SERIES_NUMBER = 9100

logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)  # its lines name images by their UIDs


def structured_report(image: pydicom.Dataset, told: Mapping[str, Any], model: Model, release: str) -> pydicom.Dataset:
    """The report of one answer; of the same image and model it has the same UID, so that an archive keeps it once.

    Args:
        image: the image's data set; its patient and study are the report's.
        told: what ``model.answer`` gave.
        model: which answered.
        release: of this program.
    """
    prediction, study = told["prediction"], model.study.study
    group: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(
            uid=_uid(image, model, "tracking"), identifier=f"{study} {model.version}"
        ),
        "algorithm_id": hd.sr.AlgorithmIdentification(
            name=study,
            version=model.version,
            parameters=[f"SHA-256 {model.sha256}", f"threshold {told['threshold']}", "no diagnosis"],
        ),
        "source_images": [hd.sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)],
        "finding_type": _concept("label", str(told["label"])),
    }
    if prediction is None:
        said = [f"No prediction: {reason}." for reason in told["abstained"]]
        evaluation: tuple[str, str] | None = ("abstained", "No prediction")
    else:
        said, evaluation = [model.predictions.sentence(prediction)], model.predictions.category(prediction)
        group["measurements"] = [
            hd.sr.Measurement(
                name=_concept(f"p-{number}", str(each)),
                value=round(each.value, 6),
                unit=hd.sr.CodedConcept(each.unit, "UCUM", "no units" if each.unit == "1" else each.unit),
            )
            for number, each in enumerate(model.predictions.outcomes(prediction))
        ]
    if evaluation is not None:
        group["qualitative_evaluations"] = [
            hd.sr.QualitativeEvaluation(_concept("prediction", "Predicted class"), _concept(*evaluation))
        ]
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(
                observer_type=codes.DCM.Device,
                observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
                    uid=_uid(image, model, "device"),
                    name="consilium-predict",
                    manufacturer_name="Consilium",
                    model_name=study[:64],
                ),
            )
        ),
        procedure_reported=hd.sr.CodedConcept("363679005", "SCT", "Imaging procedure"),
        imaging_measurements=[hd.sr.MeasurementsAndQualitativeEvaluations(**group)],
    )
    for text in (*said, *told["notes"], told["notice"]):
        content[0].ContentSequence.append(
            hd.sr.TextContentItem(_COMMENT, text, relationship_type=hd.sr.RelationshipTypeValues.CONTAINS)
        )
    report: pydicom.Dataset = hd.sr.ComprehensiveSR(
        evidence=[_complete(image)],
        content=content,
        series_instance_uid=_uid(image, model, "series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=_uid(image, model, "report"),
        instance_number=1,
        manufacturer="Consilium",
        is_complete=True,
        is_final=False,
        is_verified=False,  # nobody has looked at it
        series_description=f"{study} {model.version}: no diagnosis"[:64],
    )
    report.ManufacturerModelName, report.SoftwareVersions = "consilium-predict", release
    return report


def _uid(image: pydicom.Dataset, model: Model, what: str) -> str:
    seeds = ["consilium", what, model.sha256]
    return str(generate_uid(entropy_srcs=seeds if what == "device" else [*seeds, str(image.SOPInstanceUID)]))


def _concept(value: str, meaning: str) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(value[:16], _SCHEME, meaning[:64])


def _complete(image: pydicom.Dataset) -> pydicom.Dataset:
    """A copy of an image's header with empty values for what a report needs and a scanner left out."""
    header = pydicom.Dataset()
    header.update({element.tag: element for element in image if element.tag.group < 0x7FE0})
    header.file_meta = image.file_meta
    for name in (
        "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
        "AccessionNumber", "ReferringPhysicianName",
    ):  # fmt: skip
        if name not in header:
            setattr(header, name, "")
    return header
