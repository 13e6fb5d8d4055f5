"""Values read from single FHIR R4 resources: pure functions, which trust no field to be there or of the right kind."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

UCUM = "http://unitsofmeasure.org"
_YEARS = (1850, 9000)
"""Years in which an observation can have been made, with room for time zones and shifted days."""
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SAID = {"final", "amended", "corrected"}
_DENIED = {"refuted", "entered-in-error"}
_NOT_TAKEN = {"not-taken", "entered-in-error", "unknown"}


class Unread(Exception):
    """A resource, or a part of one, that is not used; says why, never with a value of it."""


@dataclass(frozen=True)
class Reading:
    """One number of an observation."""

    codes: frozenset[str]
    """``system|code`` of each of its codings."""
    value: float
    unit: str
    """Unit as it stands: UCUM's spelling where ``is_ucum``; empty where there is none."""
    is_ucum: bool


@dataclass(frozen=True)
class Skipped:
    """Part of an observation that gives no number, and the reason."""

    codes: frozenset[str]
    reason: str


def of(value: Any, *path: str) -> Any:
    """Value at a path of keys, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def codes(concept: Any) -> frozenset[str]:
    """Codings of a CodeableConcept as ``system|code``."""
    found = ((of(each, "system"), of(each, "code")) for each in _list(of(concept, "coding")))
    return frozenset(f"{system}|{code}" for system, code in found if isinstance(system, str) and isinstance(code, str))


def subject(resource: dict[str, Any]) -> str:
    """Identifier of the patient whom a resource is about; raises Unread where there is none."""
    reference = of(resource, "subject", "reference")
    if not isinstance(reference, str) or "Patient/" not in reference:
        raise Unread("no reference to a patient")
    return reference.rsplit("Patient/", 1)[1].split("/")[0]


def identifier(patient: dict[str, Any], system: str | None) -> str:
    """A patient's identifier of a system (their ``id`` where that is None); raises Unread without one, or with two."""
    if system is None:
        found = [patient.get("id")]
    else:
        found = [
            of(each, "value")
            for each in _list(patient.get("identifier"))
            if of(each, "system") == system and of(each, "use") != "old"
        ]
    known = {each for each in found if isinstance(each, str) and each.strip()}
    if len(known) != 1:
        raise Unread("no identifier of the declared system" if not known else "several identifiers of one system")
    return known.pop()


def moment(resource: dict[str, Any]) -> datetime.datetime:
    """Time of an observation; raises Unread where that is not known to the day."""
    said = resource.get("effectiveDateTime") or resource.get("effectiveInstant")
    said = said or of(resource, "effectivePeriod", "start")
    if not isinstance(said, str) or not _DAY.match(said):
        raise Unread("no time, or one that is not exact to the day")
    try:
        found = datetime.datetime.fromisoformat(said)
    except ValueError:
        raise Unread("a time that is none") from None
    if not _YEARS[0] <= found.year <= _YEARS[1]:
        raise Unread("a time that is none")
    return found


def birthday(patient: dict[str, Any]) -> datetime.date | None:
    """A patient's birthday; the middle of the year or month where no more is known; None where nothing is."""
    said = patient.get("birthDate")
    if not isinstance(said, str):
        return None
    try:
        parts = [int(part) for part in said.split("-")]
        return datetime.date(*(parts + [7, 1][len(parts) - 1 :] if len(parts) < 3 else parts))
    except (ValueError, TypeError, OverflowError):
        return None


def require_said(observation: dict[str, Any]) -> None:
    """Raises Unread for an observation that is preliminary, cancelled or withdrawn."""
    if observation.get("status") not in _SAID:
        raise Unread("not final (preliminary, cancelled, entered in error …)")


def readings(observation: dict[str, Any]) -> Iterator[Reading | Skipped]:
    """Numbers of an observation and of its components, each with its codes; or why one is none."""
    for part in (observation, *_list(observation.get("component"))):
        if not isinstance(part, dict):
            continue
        known = codes(part.get("code"))
        try:
            value = _value(part)
        except Unread as error:
            yield Skipped(known, str(error))
            continue
        if value is not None:
            number, unit, is_ucum = value
            yield Reading(known, number, unit, is_ucum)


def _value(part: dict[str, Any]) -> tuple[float, str, bool] | None:
    quantity = part.get("valueQuantity")
    if isinstance(quantity, dict):
        if quantity.get("comparator"):
            raise Unread("a bound in place of a value (< or >)")
        unit, is_ucum = quantity.get("code"), quantity.get("system") == UCUM
        if not is_ucum or not isinstance(unit, str):
            unit, is_ucum = quantity.get("unit") or quantity.get("code") or "", False
        return _number(quantity.get("value")), str(unit), is_ucum
    if "valueInteger" in part:
        return _number(part["valueInteger"]), "1", True
    if any(key.startswith("value") for key in part):
        raise Unread("a value that is no number")
    if "dataAbsentReason" in part:
        raise Unread("no value, and the reason why")
    return None


def _number(value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise Unread("a value that is no number")


def flagged(resource: dict[str, Any]) -> frozenset[str]:
    """Codes that a condition, a medication statement or a diagnostic report asserts; none where it denies them."""
    kind = resource.get("resourceType")
    if kind == "Condition":
        denied = {code.split("|")[1] for code in codes(resource.get("verificationStatus"))} & _DENIED
        return frozenset() if denied else codes(resource.get("code"))
    if kind == "MedicationStatement":
        if resource.get("status") in _NOT_TAKEN:
            return frozenset()
        return codes(resource.get("medicationCodeableConcept"))
    if kind == "DiagnosticReport":
        if resource.get("status") not in _SAID:
            return frozenset()
        return frozenset().union(*(codes(each) for each in _list(resource.get("conclusionCode"))))
    return frozenset()
