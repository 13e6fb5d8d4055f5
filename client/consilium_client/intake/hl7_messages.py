"""HL7 v2 messages with results (ORU, ADT) as the FHIR resources that they say, for the import of a FHIR export.

    PID    Patient         PID-3 the identifiers with their authorities, PID-7 birth, PID-8 sex
    OBX    Observation     OBX-3 code, OBX-5 value (NM, SN), OBX-6 unit, OBX-11 status, OBX-14 or OBR-7 time
    DG1    Condition       DG1-3 code

A result that was sent again, with the same order, code and time, counts once, as the message last written has it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hl7

from consilium_client.data.bounds import require_file
from consilium_client.intake.settings import Hl7Export
from consilium_client.intake.written import Reasons
from consilium_shared.errors import DataError

MESSAGE_BYTES = 16 * 2**20
_SETS = {
    "": "utf-8",
    "ASCII": "ascii",
    "UNICODE UTF-8": "utf-8",
    "8859/1": "iso-8859-1",
    "8859/2": "iso-8859-2",
    "8859/15": "iso-8859-15",
}
"""Character sets by their names in MSH-18."""
_SYSTEMS = {
    "LN": "http://loinc.org",
    "SCT": "http://snomed.info/sct",
    "I10": "http://hl7.org/fhir/sid/icd-10",
    "I10C": "http://hl7.org/fhir/sid/icd-10-cm",
}
"""Code systems by HL7's names; another one keeps its name."""
_SEXES = {"M": "male", "F": "female", "O": "other"}
_STATUSES = {"F": "final", "C": "corrected", "A": "amended", "U": "final", "D": "entered-in-error"}
_TIME = re.compile(r"(\d{8})(\d{2})?(\d{2})?(\d{2})?(?:\.\d+)?([+-]\d{4})?")
_HEAD = re.compile(rb"\x0b?MSH[^\w\s]")

Resource = dict[str, Any]


class Messages:
    """The messages of an export's folder, ``*.hl7``, in the order of their names."""

    def __init__(self, export: Hl7Export, aside: Reasons) -> None:
        """Reads all of them once, and counts in ``aside`` what is not used.

        Raises:
            DataError: no such file, or one that cannot be read.
        """
        self._export = export
        if not export.folder.is_dir():
            raise DataError(f"{export.folder} is not a folder")
        self._files = sorted(path for path in export.folder.iterdir() if path.suffix.lower() == ".hl7")
        if not self._files:
            raise DataError(f"{export.folder} holds no HL7 file (*.hl7)")
        self._last: dict[bytes, tuple[str, int]] = {}
        """Message that has the word on a result: the one last written, of such the last here."""
        for number, message in self._messages(aside):
            written = _field(message.segments("MSH")[0], 7)
            for person, order, segment in _walk(message, "OBX"):
                if (key := _key(person, order, segment)) is not None:
                    self._last[key] = max(self._last.get(key, ("", -1)), (written, number))

    def resources(self, kind: str) -> Iterator[Resource]:
        """Resources of a kind: Patient, Observation or Condition."""
        for number, message in self._messages(Reasons()):
            if kind == "Patient":
                yield from (_patient(segment) for segment in message if str(segment[0]) == "PID")
            elif kind == "Condition":
                for person, _, segment in _walk(message, "DG1"):
                    yield {"resourceType": kind, "subject": _subject(person), "code": _concept(segment, 3)}
            else:
                yield from self._observations(number, message)

    def _observations(self, number: int, message: hl7.Message) -> Iterator[Resource]:
        written = _field(message.segments("MSH")[0], 7)
        told: dict[bytes, Resource] = {}
        for place, (person, order, segment) in enumerate(_walk(message, "OBX")):
            key = _key(person, order, segment)
            if key is None:
                told[place.to_bytes(8, "big")] = _observation(person, order, segment)
            elif self._last[key] == (written, number):
                told[key] = _observation(person, order, segment)
        yield from told.values()

    def _messages(self, aside: Reasons) -> Iterator[tuple[int, hl7.Message]]:
        number = 0
        for path in self._files:
            for raw in _raw(path):
                number += 1
                if raw is None:
                    aside[f"message: longer than {MESSAGE_BYTES >> 20} MiB"] += 1
                    continue
                try:
                    message = hl7.parse(_text(raw))
                    head = message.segments("MSH")[0]
                    kind = _field(head, 9)
                except Exception:  # a foreign message may break the parser in any way, and its words may quote it
                    aside["message: not readable, or in a character set that is not known"] += 1
                    continue
                if kind not in ("ORU", "ADT"):
                    aside["message: neither results (ORU) nor an admission (ADT)"] += 1
                    continue
                yield number, message


def _raw(path: Path) -> Iterator[bytes | None]:
    """Messages of a file, with or without MLLP's framing and batch segments; None for one that is too long."""
    require_file(path, "an HL7 file")
    lines: list[bytes] = []
    size, begun = 0, False
    try:
        with path.open("rb") as file:
            for line in _lines(file):
                if _HEAD.match(line):
                    if begun:
                        yield b"\r".join(lines) if size <= MESSAGE_BYTES else None
                    lines, size, begun = [], 0, True
                if begun and line.strip(b"\x0b\x1c\r\n ") and not line.startswith((b"BTS", b"FTS", b"BHS", b"FHS")):
                    size += len(line)
                    if size <= MESSAGE_BYTES:
                        lines.append(line.strip(b"\x0b\x1c\r\n"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if begun:
        yield b"\r".join(lines) if size <= MESSAGE_BYTES else None


def _lines(file: Any) -> Iterator[bytes]:
    """Segments of a file, which end with CR, LF or both; of one that is too long the beginning, and more than that."""
    rest = b""
    while piece := file.read(2**16):
        parts = re.split(rb"[\r\n]", rest + piece)
        rest = parts.pop()
        yield from parts
        if len(rest) > MESSAGE_BYTES:
            yield rest
            rest = b""
    yield rest


def _text(raw: bytes) -> str:
    """A message as text, by its own word on its character set."""
    head = raw.split(b"\r", 1)[0].decode("iso-8859-1")
    fields = head.split(head[3])
    name = fields[17].split(head[4])[0].strip() if len(fields) > 17 else ""
    return raw.decode(_SETS[name])


def _walk(message: hl7.Message, name: str) -> Iterator[tuple[hl7.Segment, hl7.Segment | None, hl7.Segment]]:
    """Segments of a name, each with the patient and the order above it."""
    person, order = None, None
    for segment in message:
        kind = str(segment[0])
        if kind == "PID":
            person, order = segment, None
        elif kind == "OBR":
            order = segment
        elif kind == name and person is not None:
            yield person, order, segment


def _field(segment: hl7.Segment, number: int, component: int = 1, repetition: int = 1, part: int = 1) -> str:
    try:
        return str(segment.extract_field(1, number, repetition, component, part)).strip()
    except (LookupError, ValueError):
        return ""


def _key(person: hl7.Segment, order: hl7.Segment | None, segment: hl7.Segment) -> bytes | None:
    """Name of a result, by which it is known when it is sent again; None of one without an order's number."""
    if order is None:
        return None
    numbers = [_field(order, 2), _field(order, 3)]
    if not any(numbers):
        return None
    parts = [
        _reference(person),
        *numbers,
        _field(segment, 3),
        _field(segment, 3, 3),
        _field(segment, 4),
        _time(order, segment),
    ]
    return hashlib.sha256("\0".join(parts).encode()).digest()[:16]


def _patient(segment: hl7.Segment) -> Resource:
    return {
        "resourceType": "Patient",
        "id": _reference(segment),
        "identifier": [
            {"system": system, "value": _field(segment, 3, 1, number)}
            for number in range(1, _repetitions(segment, 3) + 1)
            for system in dict.fromkeys(
                filter(None, (_field(segment, 3, 4, number), _field(segment, 3, 4, number, part=2)))
            )
        ],
        "gender": _SEXES.get(_field(segment, 8)),
        "birthDate": _day(_field(segment, 7)),
    }


def _repetitions(segment: hl7.Segment, number: int) -> int:
    return len(segment[number]) if len(segment) > number else 0


def _reference(segment: hl7.Segment) -> str:
    """Name of a patient between the resources: of the identifiers as they stand."""
    return hashlib.sha256(str(segment[3] if len(segment) > 3 else "").encode()).hexdigest()


def _subject(person: hl7.Segment) -> Resource:
    return {"reference": f"Patient/{_reference(person)}"}


def _concept(segment: hl7.Segment, number: int) -> Resource:
    """A coded field, with its alternate code."""
    codings = []
    for code, system in ((1, 3), (4, 6)):
        name = _field(segment, number, system)
        codings.append({"system": _SYSTEMS.get(name, name), "code": _field(segment, number, code)})
    return {"coding": [each for each in codings if each["system"] and each["code"]]}


def _observation(person: hl7.Segment, order: hl7.Segment | None, segment: hl7.Segment) -> Resource:
    found: Resource = {
        "resourceType": "Observation",
        "subject": _subject(person),
        "code": _concept(segment, 3),
        "status": _STATUSES.get(_field(segment, 11), "preliminary"),
        "effectiveDateTime": _moment(_time(order, segment)),
    }
    kind, first = _field(segment, 2), _field(segment, 5)
    if kind in ("NM", "SN"):
        bound, number = ("", first) if kind == "NM" else (first, _field(segment, 5, 2))
        several = _repetitions(segment, 5) > 1 or (kind == "SN" and _field(segment, 5, 3))
        ucum = _field(segment, 6, 3).upper() == "UCUM"
        found["valueQuantity"] = {
            "value": None if several else _number(number),
            "comparator": "" if bound == "=" else bound,
            **(
                {"code": _field(segment, 6), "system": "http://unitsofmeasure.org"}
                if ucum
                else {"unit": _field(segment, 6)}
            ),
        }
    elif first:
        found["valueString"] = True
    return found


def _time(order: hl7.Segment | None, segment: hl7.Segment) -> str:
    return _field(segment, 14) or ("" if order is None else _field(order, 7))


def _number(text: str) -> float | None:
    try:
        return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text) else None
    except ValueError:
        return None


def _moment(text: str) -> str | None:
    """An HL7 time as ISO 8601 has it; None where it is not known to the day."""
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    day, hour, minute, second, zone = found.groups()
    said = f"{day[:4]}-{day[4:6]}-{day[6:]}"
    if hour is None:
        return said
    said += f"T{hour}:{minute or '00'}:{second or '00'}"
    return said if zone is None else f"{said}{zone[:3]}:{zone[3:]}"


def _day(text: str) -> str | None:
    digits = re.match(r"\d{8}|\d{6}|\d{4}", text)
    if digits is None:
        return None
    said = digits.group()
    parts = [said[:4], said[4:6], said[6:8]]
    try:
        datetime.date(int(parts[0]), int(parts[1] or 7), int(parts[2] or 1))
    except ValueError:
        return None
    return "-".join(filter(None, parts))
