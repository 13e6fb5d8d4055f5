"""A FHIR export, or a folder of HL7 v2 messages, becomes a study's two tables: a row a patient, and a row a sample.

    patients    patient, sex, age, start, a column for each variable (one value) and each flag (0 or 1)
    samples     patient, time, variable, value

Memory holds the patients and one value of each variable of each, never the observations. Both tables appear whole or
not at all. People have the same pseudonyms as in the images, and their times move by the same number of days.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from consilium_client.data.units import check, factor
from consilium_client.intake import fhir_resources as read
from consilium_client.intake import ndjson
from consilium_client.intake.fhir_resources import Reading, Skipped, Unread
from consilium_client.intake.profile import OLDEST
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import FhirExport, Hl7Export, Tables, Variable
from consilium_client.intake.written import Reasons, whole
from consilium_shared.errors import ConfigurationError, DataError

_SEXES = {"male": "M", "female": "F", "other": "O"}
Source = Callable[[str], Iterator[dict[str, Any]]]
"""Given a kind of resource, all of that kind."""
FLAGGED = ("Condition", "MedicationStatement", "DiagnosticReport")


@dataclass
class _Person:
    pseudonym: str
    shift: datetime.timedelta
    sex: str
    born: datetime.date | None
    first: datetime.datetime | None = None
    values: dict[str, tuple[str, float, int]] = field(default_factory=dict)
    """Variable -> time of its value, the value, the number of observations in it."""
    flags: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Imported:
    """Outcome of an export: rows of each table, and what was left out, by reason."""

    patients: int
    samples: int
    aside: dict[str, int]


def import_export(export: FhirExport | Hl7Export, names: Pseudonyms) -> Imported:
    """Read an export and write its tables.

    Args:
        export: what is declared of it; paths are absolute.
        names: the site's new names.

    Raises:
        DataError: no patients' file, or a file that is damaged, with the line.
        ConfigurationError: a declared unit is none, two variables declare one code, or the tables cannot be written.
    """
    for name, variable in export.variables.items():
        try:
            check(variable.unit)
            for spelling in variable.spellings.values():
                check(spelling)
        except ValueError as error:
            raise ConfigurationError(f"site.yaml: {name}: {error}") from None
    aside = Reasons()
    source = _source(export, aside)
    with names.together():
        people = _people(source, export.identifier, names, aside)
    with whole(export.samples) as samples, whole(export.patients) as patients:
        samples.write(b"patient,time,variable,value\n")
        count = 0
        for line in _samples(source, export, people, aside):
            samples.write(line)
            count += 1
        _flags(source, export, people, aside)
        patients.write(_row(["patient", "sex", "age", "start", *export.variables, *export.flags]))
        rows = {person.pseudonym: person for person in people.values()}
        for _, person in sorted(rows.items()):
            patients.write(_row(_cells(person, export)))
    return Imported(len(rows), count, dict(aside))


def _source(export: FhirExport | Hl7Export, aside: Reasons) -> Source:
    """The export's resources of a kind, as often as they are asked for."""
    if isinstance(export, Hl7Export):
        from consilium_client.intake.hl7_messages import Messages

        return Messages(export, aside).resources
    if not ndjson.files(export.folder, "Patient"):
        raise DataError(f"{export.folder} holds no NDJSON file of the resource Patient")

    def resources(kind: str) -> Iterator[dict[str, Any]]:
        for path in ndjson.files(export.folder, kind):
            yield from ndjson.resources(path, kind)

    return resources


def _people(source: Source, system: str | None, names: Pseudonyms, aside: Reasons) -> dict[str, _Person]:
    people: dict[str, _Person] = {}
    seen: dict[str, str] = {}
    for resource in source("Patient"):
        try:
            pseudonym = names.patient(read.identifier(resource, system))
            reference = str(resource.get("id") or "")
            if not reference:
                raise Unread("no id")
        except (Unread, DataError) as error:
            aside[f"Patient: {error}"] += 1
            continue
        # Two resources of one person are one patient: both references lead to the same row.
        twin = seen.setdefault(pseudonym, reference)
        people[reference] = (
            people[twin]
            if twin in people
            else _Person(
                pseudonym,
                datetime.timedelta(days=names.days(pseudonym)),
                _SEXES.get(str(resource.get("gender")), ""),
                read.birthday(resource),
            )
        )
    return people


def _samples(source: Source, export: Tables, people: dict[str, _Person], aside: Reasons) -> Iterator[bytes]:
    wanted = {code: name for name, variable in export.variables.items() for code in variable.codes}
    for resource in source("Observation"):
        parts = [part for part in read.readings(resource) if part.codes & wanted.keys()]
        if not parts:
            continue
        try:
            read.require_said(resource)
            person, when = _subject(resource, people), read.moment(resource)
        except Unread as error:
            aside[f"Observation: {error}"] += len(parts)
            continue
        for part in parts:
            name = next(wanted[code] for code in sorted(part.codes) if code in wanted)
            if isinstance(part, Skipped):
                aside[f"{name}: {part.reason}"] += 1
                continue
            try:
                value = _converted(part, export.variables[name])
            except DataError as error:
                aside[f"{name}: {error}"] += 1
                continue
            _take(person, name, export.variables[name], when, value)
            yield _row([person.pseudonym, _time(when - person.shift), name, repr(value)])


def _subject(resource: dict[str, object], people: dict[str, _Person]) -> _Person:
    person = people.get(read.subject(resource))
    if person is None:
        raise Unread("of a patient who is not in the export")
    return person


def _converted(reading: Reading, variable: Variable) -> float:
    unit = reading.unit
    if not reading.is_ucum:
        if unit not in variable.spellings:
            raise DataError(
                "a unit that is neither UCUM's nor declared in spellings" if unit else "a value without a unit"
            )
        unit = variable.spellings[unit]
    scale, offset = factor(unit, variable.unit, variable.molar_mass)
    value = scale * reading.value + offset
    if not math.isfinite(value):
        raise DataError("a value that is no number in the declared unit")
    if (variable.low is not None and value < variable.low) or (variable.high is not None and value > variable.high):
        raise DataError("outside low … high")
    return value


def _take(person: _Person, name: str, variable: Variable, when: datetime.datetime, value: float) -> None:
    said = _order(when)
    if person.first is None or said < _order(person.first):
        person.first = when
    before = person.values.get(name)
    if before is None:
        person.values[name] = (said, value, 1)
        return
    then, kept, count = before
    match variable.take:
        case "first":
            new = (said, value, 1) if said < then else before
        case "last":
            new = (said, value, 1) if said >= then else before
        case "mean":
            new = (said, kept + (value - kept) / (count + 1), count + 1)
        case "min":
            new = (said, min(kept, value), 1)
        case "max":
            new = (said, max(kept, value), 1)
    person.values[name] = new


def _order(when: datetime.datetime) -> str:
    """Sort key of a moment; one without a zone counts as UTC."""
    at = when if when.tzinfo is not None else when.replace(tzinfo=datetime.UTC)
    return at.astimezone(datetime.UTC).isoformat()


def _flags(source: Source, export: Tables, people: dict[str, _Person], aside: Reasons) -> None:
    for kind in FLAGGED:
        wanted = {code: name for name, flag in export.flags.items() if flag.resource == kind for code in flag.codes}
        for resource in source(kind) if wanted else ():
            found = {wanted[code] for code in read.flagged(resource) if code in wanted}
            if not found:
                continue
            try:
                _subject(resource, people).flags.update(found)
            except Unread as error:
                aside[f"{kind}: {error}"] += 1


def _cells(person: _Person, export: Tables) -> list[str]:
    age = ""
    if person.born is not None and person.first is not None:
        years = int((person.first.date() - person.born).days / 365.25)
        age = str(min(years, OLDEST + 1)) if years >= 0 else ""
    return [
        person.pseudonym,
        person.sex,
        age,
        "" if person.first is None else _time(person.first - person.shift),
        *(repr(person.values[name][1]) if name in person.values else "" for name in export.variables),
        *("1" if name in person.flags else "0" for name in export.flags),
    ]


def _time(when: datetime.datetime) -> str:
    at = when if when.tzinfo is None else when.astimezone(datetime.UTC)
    return at.isoformat(timespec="seconds")


def _row(cells: list[str]) -> bytes:
    return (",".join(cells) + "\n").encode()
