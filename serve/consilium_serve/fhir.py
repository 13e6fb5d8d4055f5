"""FHIR R4: a Bundle of one patient's resources becomes a record, and its answer a RiskAssessment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from typing import Annotated, Any

from pydantic import Field

from consilium_shared import task
from consilium_shared.config import Strict
from consilium_shared.errors import DataError
from consilium_shared.fields import Column
from consilium_shared.prediction import Predictions
from consilium_shared.study import Study

_COUNTED = {"final", "amended", "corrected", "preliminary"}
_DAYS_OF_A_YEAR = 365.2425


class Code(Strict):
    """Coding of a column or variable at this hospital."""

    system: str
    code: str
    unit: str | None = None
    """UCUM code that a value must have; None takes any."""
    values: Annotated[dict[str, str], Field(default_factory=dict)]
    """Code of a value to the study's category."""


class Codes(Strict):
    """Codes of a study's columns in a Bundle."""

    codes: dict[Column, Code]
    age: Column | None = None
    """Column of the age in years, from Patient.birthDate."""
    gender: Column | None = None
    """Column of Patient.gender."""
    genders: Annotated[dict[str, str], Field(default_factory=dict)]
    """Gender to the study's category."""


class Read(Strict):
    """A Bundle, read.

    Attributes:
        record: as ``preparation`` takes it.
        patient: its id.
        basis: references of the resources that were used.
        notes: what was left out.
    """

    record: dict[str, Any]
    patient: str
    basis: list[str]
    notes: list[str]


def read(study: Study, bundle: Mapping[str, Any], mapping: Codes, start: datetime | None = None) -> Read:
    """The record of a Bundle's one patient.

    Args:
        study: what the record is for.
        bundle: FHIR JSON.
        mapping: of this hospital.
        start: of a series' window; None takes the beginning of the Bundle's one Encounter.

    Raises:
        DataError: no Bundle of one patient, or without what the study needs.
    """
    if bundle.get("resourceType") != "Bundle" or not isinstance(bundle.get("entry", []), list):
        raise DataError("a FHIR Bundle is needed")
    resources = [e.get("resource") for e in bundle.get("entry", []) if isinstance(e, dict)]
    found = [each for each in resources if isinstance(each, dict)]
    patients = [each for each in found if each.get("resourceType") == "Patient"]
    if len(patients) != 1 or not isinstance(patients[0].get("id"), str) or not patients[0]["id"].isprintable():
        raise DataError("a Bundle has one Patient, with an id")
    patient = patients[0]
    reference = f"Patient/{patient['id']}"
    observations = [each for each in found if each.get("resourceType") == "Observation"]
    if any(_reference(each.get("subject")) not in (reference, f"urn:uuid:{patient['id']}") for each in observations):
        raise DataError("an Observation is about somebody else than the Bundle's Patient")
    encounters = [each for each in found if each.get("resourceType") == "Encounter"]
    values, basis, odd = [], [], 0
    for observation in observations:
        if observation.get("status") not in _COUNTED:
            continue
        for name, value in _values(observation, mapping):
            if value is None:
                odd += 1
                continue
            values.append((name, _moment(observation), value))
            basis.append(f"Observation/{observation.get('id', '')}".encode("utf-8", "replace").decode())
    notes = [f"{odd} observations have another unit, or no value that can be used; they were left out"] if odd else []
    series = task.reads(study).series
    if series is None:
        features = {feature.name for feature in task.reads(study).features}
        ordered = sorted(values, key=lambda each: each[1] or datetime.min.replace(tzinfo=UTC))
        record: dict[str, Any] = {name: value for name, _, value in ordered if name in features}
        record.update(_about(patient, mapping, features, start or datetime.now(UTC)))
    else:
        begin = start or _begin(encounters)
        variables = {variable.name for variable in series.variables}
        samples = [
            {"variable": name, "minutes": (when - begin).total_seconds() / 60, "value": value}
            for name, when, value in values
            if name in variables and when is not None
        ]
        statics = {feature.name for feature in series.statics}
        record = {"samples": samples}
        if statics:
            first = {name: value for name, when, value in reversed(values) if name in statics}
            record["statics"] = {**first, **_about(patient, mapping, statics, begin)}
    return Read(record=record, patient=patient["id"], basis=sorted(set(basis)), notes=notes)


def risk_assessment(told: Mapping[str, Any], own: Predictions, found: Read, when: datetime) -> dict[str, Any]:
    """The answer as a RiskAssessment; one that has no prediction is ``cancelled`` and says why."""
    prediction, model = told["prediction"], told["model"]
    notes = [*(f"No prediction: {reason}." for reason in told["abstained"]), *found.notes, *told["notes"]]
    assessment: dict[str, Any] = {
        "resourceType": "RiskAssessment",
        "status": "cancelled" if prediction is None else "preliminary",
        "method": {"text": f"{model['study']} {model['version']}, SHA-256 {model['sha256']}"},
        "code": {"text": told["label"]},
        "subject": {"reference": f"Patient/{found.patient}"},
        "occurrenceDateTime": when.astimezone(UTC).isoformat(timespec="seconds"),
        "performer": {"display": "consilium-predict"},
        "note": [{"text": text} for text in (*notes, told["notice"])],
    }
    if found.basis:
        assessment["basis"] = [{"reference": each} for each in found.basis]
    if prediction is not None:
        said = {"rationale": f"said from {told['threshold']:g} on"} if told["threshold"] is not None else {}
        assessment["prediction"] = [
            {"outcome": {"text": each.name}, "probabilityDecimal": round(each.value, 6), **said}
            if each.probability
            else {"outcome": {"text": f"{each.name}: {each.value:.6g} {each.unit}"}}
            for each in own.outcomes(prediction)
        ]
    return assessment


def _values(observation: Mapping[str, Any], mapping: Codes) -> Iterator[tuple[str, Any]]:
    """Column and value of an observation and of its components; None for a value that cannot be used."""
    components = observation.get("component", [])
    for part in (observation, *(each for each in components if isinstance(each, dict))):
        codings = (part.get("code") or {}).get("coding", [])
        known = {(each.get("system"), each.get("code")) for each in codings if isinstance(each, dict)}
        for name, code in mapping.codes.items():
            if (code.system, code.code) in known:
                yield name, _value(part, code)


def _value(part: Mapping[str, Any], code: Code) -> Any:
    quantity = part.get("valueQuantity")
    if isinstance(quantity, dict):
        unit = quantity.get("code", quantity.get("unit"))
        number = quantity.get("value")
        fits = quantity.get("comparator") is None and (code.unit is None or unit == code.unit)
        return number if fits and isinstance(number, int | float) and not isinstance(number, bool) else None
    concept = part.get("valueCodeableConcept")
    if isinstance(concept, dict):
        words = [each.get("code") for each in concept.get("coding", []) if isinstance(each, dict)]
        return next((code.values.get(word, word) for word in words if isinstance(word, str)), None)
    for kind in ("valueInteger", "valueString", "valueBoolean"):
        if kind in part:
            word = str(part[kind]).lower() if kind == "valueBoolean" else part[kind]
            return code.values.get(str(word), word)
    return None


def _about(patient: Mapping[str, Any], mapping: Codes, wanted: set[str], when: datetime) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if mapping.age in wanted and mapping.age is not None and isinstance(patient.get("birthDate"), str):
        try:
            born = date.fromisoformat(patient["birthDate"])
        except ValueError:
            raise DataError("Patient.birthDate: a whole date is needed") from None
        record[mapping.age] = int((when.date() - born).days / _DAYS_OF_A_YEAR)
    if mapping.gender in wanted and mapping.gender is not None and isinstance(patient.get("gender"), str):
        record[mapping.gender] = mapping.genders.get(patient["gender"], patient["gender"])
    return record


def _begin(encounters: list[dict[str, Any]]) -> datetime:
    starts = [(each.get("period") or {}).get("start") for each in encounters]
    if len(starts) != 1 or not isinstance(starts[0], str):
        raise DataError("the window's start is needed: as start, or as the period of the Bundle's one Encounter")
    return moment(starts[0])


def _moment(observation: Mapping[str, Any]) -> datetime | None:
    said = observation.get("effectiveDateTime", observation.get("effectiveInstant"))
    return moment(said) if isinstance(said, str) and len(said) > 10 else None


def moment(text: str) -> datetime:
    """A moment with its zone; raises DataError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise DataError("not a moment as FHIR writes it") from None
    if found.tzinfo is None:
        raise DataError("a moment without a zone")
    return found


def _reference(subject: Any) -> str:
    return str(subject.get("reference", "")) if isinstance(subject, dict) else ""
