"""The same invented stays in the layouts of four databases, and as the plain tables that they should become."""

from __future__ import annotations

import csv
import datetime
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consilium_client.intake.pseudonyms import Pseudonyms

Rows = Iterable[Sequence[Any]]
GLUCOSE = 18.0156
"""mg/dL of a mmol/L."""


@dataclass(frozen=True)
class Stay:
    patient: int
    admission: int
    stay: int
    start: datetime.datetime
    minutes: int
    age: int
    died: bool
    samples: tuple[tuple[int, str, float], ...]
    """Minutes since the start, variable, value (per minute; mg/dL)."""

    def at(self, minutes: int) -> datetime.datetime:
        return self.start + datetime.timedelta(minutes=minutes)


def stays(patients: int = 24) -> list[Stay]:
    """Stays of adults; each third patient has two, in one admission, of which the second begins as the first ends."""
    made, rng = [], np.random.default_rng(7)
    for patient in range(patients):
        died, start = bool(patient % 4 == 0), datetime.datetime(2020, 1, 1) + datetime.timedelta(days=3 * patient)
        for number in range(2 if patient % 3 == 0 else 1):
            length = 180 + 10 * patient
            at = sorted(rng.choice(length, size=6, replace=False).tolist())
            samples = [(minute, "heart_rate", 60.0 + float(rng.integers(60))) for minute in at]
            samples += [(at[2], "glucose", round(float(rng.integers(4, 12)) * GLUCOSE, 4))]
            stay = 3000 + 2 * patient + number
            age = 30 + patient
            made.append(Stay(100 + patient, 500 + patient, stay, start, length, age, died, tuple(samples)))
            start += datetime.timedelta(minutes=length + 1)
    return made


def write(path: Path, names: Sequence[str], rows: Rows, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)


def plain(folder: Path, found: list[Stay], names: Pseudonyms) -> None:
    """The tables as a person would make them by hand, in the order of the pseudonyms."""
    rows = sorted((names.patient(str(s.patient)), names.record(str(s.stay)), s) for s in found)
    write(folder / "table.csv", ["patient", "record", "age", "died"], [(p, r, s.age, int(s.died)) for p, r, s in rows])
    samples = [(p, r, minute, name, repr(value)) for p, r, s in rows for minute, name, value in s.samples]
    write(folder / "samples.csv", ["patient", "record", "time", "variable", "value"], samples)


def mimic(folder: Path, found: list[Stay]) -> None:
    """MIMIC-IV: moments, items by number; laboratory values know the admission alone; also a minor, and other items."""
    people = {s.patient: s for s in found}
    hosp, icu = folder / "hosp", folder / "icu"
    patients = [(p, "F", s.age) for p, s in people.items()] + [(1, "M", 12)]
    write(hosp / "patients.csv.gz", ["subject_id", "gender", "anchor_age"], patients)
    admissions = [(p, s.admission, int(s.died)) for p, s in people.items()] + [(1, 1, 0)]
    write(hosp / "admissions.csv", ["subject_id", "hadm_id", "hospital_expire_flag"], admissions)
    rows = [(s.patient, s.admission, s.stay, s.start, s.at(s.minutes)) for s in found]
    rows.append((1, 1, 1, datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 2)))
    write(icu / "icustays.csv", ["subject_id", "hadm_id", "stay_id", "intime", "outtime"], rows)
    charted = [
        (s.stay, s.at(minute), 220045, "as text", value, "bpm")
        for s in found
        for minute, name, value in s.samples
        if name == "heart_rate"
    ]
    charted += [(s.stay, s.at(5), 220179, "", 120, "mmHg") for s in found]
    charted += [
        (1, datetime.datetime(2020, 1, 1, 1), 220045, "", 99, "bpm"),
        (found[0].stay, found[0].at(3), 220045, "", "", "bpm"),
    ]
    write(icu / "chartevents.csv", ["stay_id", "charttime", "itemid", "value", "valuenum", "valueuom"], charted)
    labs = [
        (s.patient, s.admission, s.at(minute), 50931, value, "mg/dL")
        for s in found
        for minute, name, value in s.samples
        if name == "glucose"
    ]
    write(hosp / "labevents.csv", ["subject_id", "hadm_id", "charttime", "itemid", "valuenum", "valueuom"], labs)


def eicu(folder: Path, found: list[Stay]) -> None:
    """eICU-CRD: minutes since the stay began, a column for each vital sign."""
    rows = [(s.stay, f"p-{s.patient}", s.age, "Female", "Expired" if s.died else "Alive") for s in found]
    names = ["patientunitstayid", "uniquepid", "age", "gender", "hospitaldischargestatus"]
    write(folder / "patient.csv.gz", names, rows)
    vital = [(s.stay, minute, value, "") for s in found for minute, name, value in s.samples if name == "heart_rate"]
    names = ["patientunitstayid", "observationoffset", "heartrate", "temperature"]
    write(folder / "vitalPeriodic.csv.gz", names, vital)
    labs = [
        (s.stay, minute, name, value, "mg/dL") for s in found for minute, name, value in s.samples if name == "glucose"
    ]
    names = ["patientunitstayid", "labresultoffset", "labname", "labresult", "labmeasurenamesystem"]
    write(folder / "lab.csv.gz", names, labs)


def aumc(folder: Path, found: list[Stay]) -> None:
    """AmsterdamUMCdb: milliseconds since the patient's first admission, latin-1, glucose in mmol/l."""
    first: dict[int, datetime.datetime] = {}
    for stay in found:
        first.setdefault(stay.patient, stay.start)

    def ms(stay: Stay, minutes: int) -> int:
        return int((stay.at(minutes) - first[stay.patient]).total_seconds() * 1000)

    names = ["patientid", "admissionid", "admittedat", "dischargedat", "agegroup", "gender", "destination"]
    rows = [
        (s.patient, s.stay, ms(s, 0), ms(s, s.minutes), s.age, "Vrouw", "Overleden" if s.died else "Huis")
        for s in found
    ]
    write(folder / "admissions.csv", names, rows, "latin-1")
    items = {"heart_rate": (6640, "Hartfrequentie", "/min"), "glucose": (9947, "Glucose (bloed) één", "mmol/l")}
    numeric = [
        (
            s.stay,
            *items[name][:2],
            round(value / (GLUCOSE if name == "glucose" else 1), 8),
            items[name][2],
            ms(s, minute),
        )
        for s in found
        for minute, name, value in s.samples
    ]
    names = ["admissionid", "itemid", "item", "value", "unit", "measuredat"]
    write(folder / "numericitems.csv", names, numeric, "latin-1")


OMOP = {
    "person": {"person_id": "bigint", "gender_concept_id": "int", "year_of_birth": "int"},
    "visit_occurrence": {
        "visit_occurrence_id": "bigint", "person_id": "bigint", "visit_concept_id": "int", "visit_start_date": "date",
        "visit_start_datetime": "timestamp", "visit_end_date": "date", "visit_end_datetime": "timestamp",
    },
    "condition_occurrence": {"person_id": "bigint", "condition_concept_id": "int", "condition_start_date": "date"},
    "observation_period": {
        "person_id": "bigint", "observation_period_start_date": "date", "observation_period_end_date": "date",
    },
    "measurement": {
        "person_id": "bigint", "visit_occurrence_id": "bigint", "measurement_concept_id": "int",
        "measurement_date": "date", "measurement_datetime": "timestamp", "value_as_number": "numeric",
        "unit_concept_id": "int",
    },
    "observation": {
        "person_id": "bigint", "visit_occurrence_id": "bigint", "observation_concept_id": "int",
        "observation_date": "date", "observation_datetime": "timestamp", "value_as_number": "numeric",
        "unit_concept_id": "int",
    },
    "concept": {"concept_id": "int", "concept_code": "varchar", "vocabulary_id": "varchar"},
    "concept_ancestor": {"ancestor_concept_id": "int", "descendant_concept_id": "int"},
}  # fmt: skip
"""Tables of OMOP's and types of their columns, those that are read."""


def omop(found: list[Stay]) -> dict[str, list[tuple[Any, ...]]]:
    """OMOP CDM: visits by concept, a stroke of a more special concept for those who died; rows of each table."""
    rate, sugar, stroke, below, mg, minute = 3027018, 3004501, 372924, 443454, 8840, 8541
    rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in OMOP}
    people = {s.patient: s for s in found}
    rows["person"] = [(p, 8532, s.start.year - s.age) for p, s in people.items()]
    rows["concept"] = [(mg, "mg/dL", "UCUM"), (minute, "/min", "UCUM"), (rate, "8867-4", "LOINC")]
    rows["concept_ancestor"] = [(stroke, stroke), (stroke, below), (9201, 9201), (rate, rate), (sugar, sugar)]
    for p, s in people.items():
        day = s.start.date()
        end = day + datetime.timedelta(days=3 if s.died else 400)  # who has the outcome need not be observed to the end
        rows["observation_period"].append((p, day - datetime.timedelta(days=30), end))
        rows["condition_occurrence"].append((p, below, day - datetime.timedelta(days=9)))  # before the index date
        if s.died:
            rows["condition_occurrence"].append((p, below, day + datetime.timedelta(days=2)))
    for s in found:
        end = s.at(s.minutes)
        rows["visit_occurrence"].append((s.stay, s.patient, 9201, s.start.date(), s.start, end.date(), end))
        for at, name, value in s.samples:
            concept, unit = (rate, minute) if name == "heart_rate" else (sugar, mg)
            when = s.at(at)
            rows["measurement"].append((s.patient, s.stay, concept, when.date(), when, value, unit))
    some = found[0]
    rows["visit_occurrence"].append(
        (9, some.patient, 9202, some.start.date(), some.start, some.start.date(), some.start)
    )
    return rows
