"""A FHIR bulk export becomes tables that a study reads: right numbers in one unit, one row a person, nobody's name."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from consilium_client.data.units import check, factor
from consilium_client.intake.fhir import import_export
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import FhirExport
from consilium_shared.errors import ConfigurationError, DataError

PLANTED = "QZPLANTED"
MRN = "urn:hospital:mrn"
LOINC, SNOMED = "http://loinc.org", "http://snomed.info/sct"
VARIABLES: dict[str, Any] = {
    "glucose": {"codes": [f"{LOINC}|2345-7", f"{LOINC}|14749-6"], "unit": "mg/dL", "molar_mass": 180.156,
                "spellings": {"mg%": "mg/dL"}, "high": 2000},
    "systolic": {"codes": [f"{LOINC}|8480-6"], "unit": "mm[Hg]", "take": "mean"},
    "temperature": {"codes": [f"{LOINC}|8310-5"], "unit": "Cel", "take": "max"},
}  # fmt: skip
FLAGS = {
    "diabetes": {"codes": [f"{SNOMED}|73211009"]},
    "insulin": {"resource": "MedicationStatement", "codes": ["urn:drugs|insulin"]},
    "pneumonia": {"resource": "DiagnosticReport", "codes": [f"{SNOMED}|233604007"]},
}


def concept(code: str) -> dict[str, Any]:
    system, _, word = code.partition("|")
    return {"coding": [{"system": system, "code": word, "display": PLANTED}], "text": PLANTED}


def patient(number: int, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Patient",
        "id": f"p{number}",
        "identifier": [{"system": MRN, "value": f"{PLANTED}{number}"}, {"system": "urn:other", "value": "x"}],
        "name": [{"family": PLANTED}],
        "gender": "female",
        "birthDate": "1950-03-01",
        **more,
    }


def quantity(value: Any, unit: str, **more: Any) -> dict[str, Any]:
    return {"value": value, "unit": PLANTED, "system": "http://unitsofmeasure.org", "code": unit, **more}


def observation(number: int, code: str, value: Any = None, when: str = "2024-01-10T10:00:00Z", **more: Any) -> dict:
    made = {
        "resourceType": "Observation",
        "status": "final",
        "code": concept(code),
        "subject": {"reference": f"Patient/p{number}"},
        "effectiveDateTime": when,
        "note": [{"text": PLANTED}],
        **more,
    }
    return made if value is None else {**made, "valueQuantity": value}


def written(folder: Path, **files: list[Any]) -> None:
    folder.mkdir(exist_ok=True)
    for name, resources in files.items():
        text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in resources)
        (folder / f"{name}.000.ndjson").write_text(text)


def declared(tmp_path: Path, **more: Any) -> FhirExport:
    return FhirExport.model_validate(
        {
            "folder": str(tmp_path / "export"),
            "patients": str(tmp_path / "out" / "patients.csv"),
            "samples": str(tmp_path / "out" / "samples.csv"),
            "identifier": MRN,
            "variables": VARIABLES,
            "flags": FLAGS,
            **more,
        }
    )


@pytest.fixture
def names(tmp_path: Path) -> Pseudonyms:
    return Pseudonyms(tmp_path / "intake", 3650)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("value", "when"),
    [
        (quantity(90, "mg/dL"), "0001-01-01"),
        (quantity(90, "mg/dL"), "0001-01-01T00:00:00+23:59"),
        (quantity(90, "mg/dL"), "9999-12-31T23:59:59-23:59"),
        (quantity(10**400, "mg/dL"), "2024-01-10"),
        (quantity(1e308, "kg/uL"), "2024-01-10"),
        (quantity(1, ".".join(["10*99"] * 5)), "2024-01-10"),
    ],
)
def test_a_value_or_time_beyond_all_bounds_is_set_aside_alone(names, tmp_path: Path, value: Any, when: str) -> None:
    export = declared(tmp_path, variables={"glucose": {**VARIABLES["glucose"], "high": None}})
    good = observation(1, f"{LOINC}|2345-7", quantity(100, "mg/dL"))
    written(
        tmp_path / "export",
        Patient=[patient(1), patient(2, birthDate="99999999999999999999-01-01")],
        Observation=[observation(1, f"{LOINC}|2345-7", value, when), good],
    )
    imported = import_export(export, names)
    assert (imported.patients, imported.samples, sum(imported.aside.values())) == (2, 1, 1)
    assert [each["value"] for each in rows(tmp_path / "out" / "samples.csv")] == ["100.0"]


def test_half_a_character_is_no_text(names, tmp_path: Path) -> None:
    export = declared(tmp_path)
    written(tmp_path / "export", Patient=[patient(1, identifier=[{"system": MRN, "value": "\ud800x"}])])
    with pytest.raises(DataError, match="line 1: no JSON"):
        import_export(export, names)


def test_an_export_becomes_a_row_a_patient_and_a_row_a_sample(names, tmp_path: Path) -> None:
    export = declared(tmp_path)
    pressure = {"component": [
        {"code": concept(f"{LOINC}|8480-6"), "valueQuantity": quantity(120, "mm[Hg]")},
        {"code": concept(f"{LOINC}|8462-4"), "valueQuantity": quantity(80, "mm[Hg]")},
    ]}  # fmt: skip
    written(
        tmp_path / "export",
        Patient=[patient(1), patient(2, gender="male", birthDate="1920")],
        Observation=[
            observation(1, f"{LOINC}|2345-7", quantity(100, "mg/dL")),
            observation(1, f"{LOINC}|14749-6", quantity(5.55, "mmol/L"), "2024-01-10T14:00:00+02:00"),
            observation(1, f"{LOINC}|85354-9", when="2024-01-11T09:00:00Z", **pressure),
            observation(2, f"{LOINC}|8310-5", quantity(98.6, "[degF]")),
            observation(2, f"{LOINC}|9999-9", quantity(1, "1")),
        ],
        Condition=[
            {"resourceType": "Condition", "subject": {"reference": "Patient/p1"},
             "code": concept(f"{SNOMED}|73211009")},
            {"resourceType": "Condition", "subject": {"reference": "Patient/p2"},
             "code": concept(f"{SNOMED}|73211009"),
             "verificationStatus": concept("http://terminology.hl7.org/CodeSystem/condition-ver-status|refuted")},
        ],
        MedicationStatement=[
            {"resourceType": "MedicationStatement", "status": "active", "subject": {"reference": "Patient/p1"},
             "medicationCodeableConcept": concept("urn:drugs|insulin")},
            {"resourceType": "MedicationStatement", "status": "not-taken", "subject": {"reference": "Patient/p2"},
             "medicationCodeableConcept": concept("urn:drugs|insulin")},
        ],
        DiagnosticReport=[
            {"resourceType": "DiagnosticReport", "status": "final", "subject": {"reference": "Patient/p2"},
             "conclusionCode": [concept(f"{SNOMED}|233604007")], "conclusion": PLANTED},
        ],
    )  # fmt: skip
    done = import_export(export, names)
    assert (done.patients, done.samples, done.aside) == (2, 4, {})
    one, two = names.patient(f"{PLANTED}1"), names.patient(f"{PLANTED}2")
    found = {row["patient"]: row for row in rows(export.patients)}
    assert float(found[one].pop("glucose")) == pytest.approx(5.55 * 18.0156)
    assert float(found[two].pop("temperature")) == pytest.approx(37.0)
    day = names.date(one, "2024-01-10")
    assert found[one] == {
        "patient": one, "sex": "F", "age": "73", "start": f"{day}T10:00:00+00:00", "systolic": "120.0",
        "temperature": "", "diabetes": "1", "insulin": "1", "pneumonia": "0",
    }  # fmt: skip
    assert (found[two]["sex"], found[two]["age"], found[two]["pneumonia"]) == ("M", "90", "1")
    assert (found[two]["diabetes"], found[two]["insulin"]) == ("0", "0")
    samples = rows(export.samples)
    assert [row["variable"] for row in samples] == ["glucose", "glucose", "systolic", "temperature"]
    assert samples[1]["time"] == f"{day}T12:00:00+00:00"
    for path in (export.patients, export.samples):
        assert PLANTED not in path.read_text() and path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"valueQuantity": quantity(1, "mm[Hg]")}, "glucose: unit mm[Hg] cannot become mg/dL"),
        ({"valueQuantity": quantity(1, "furlong")}, "glucose: unit 'furlong', which is none"),
        ({"valueQuantity": {"value": 1, "unit": "mg/dl"}}, "neither UCUM's nor declared"),
        ({"valueQuantity": {"value": 1}}, "glucose: a value without a unit"),
        ({"valueQuantity": quantity(2, "mg/dL", comparator="<")}, "a bound in place of a value"),
        ({"valueQuantity": quantity("1", "mg/dL")}, "no number"),
        ({"valueQuantity": quantity(1e9, "mg/dL")}, "outside low"),
        ({"valueString": "high"}, "no number"),
        ({"dataAbsentReason": {}}, "no value"),
        ({"valueQuantity": quantity(1, "mg/dL"), "status": "entered-in-error"}, "not final"),
        ({"valueQuantity": quantity(1, "mg/dL"), "effectiveDateTime": "2024"}, "exact to the day"),
        ({"valueQuantity": quantity(1, "mg/dL"), "effectiveDateTime": "2024-13-01"}, "a time that is none"),
        ({"valueQuantity": quantity(1, "mg/dL"), "subject": {"reference": "Patient/nobody"}}, "not in the export"),
        ({"valueQuantity": quantity(1, "mg/dL"), "subject": {"display": PLANTED}}, "no reference"),
    ],
)
def test_what_cannot_be_used_is_counted_with_its_reason(names, tmp_path: Path, changes: Any, said: str) -> None:
    written(tmp_path / "export", Patient=[patient(1)], Observation=[observation(1, f"{LOINC}|2345-7", **changes)])
    done = import_export(declared(tmp_path), names)
    assert done.samples == 0
    ((reason, count),) = done.aside.items()
    assert said in reason and count == 1 and PLANTED not in reason


def test_a_source_s_own_spelling_of_a_unit_counts_where_it_is_declared(names, tmp_path: Path) -> None:
    value = {"value": 90, "unit": "mg%"}
    written(tmp_path / "export", Patient=[patient(1)], Observation=[observation(1, f"{LOINC}|2345-7", value)])
    export = declared(tmp_path)
    assert import_export(export, names).samples == 1
    assert rows(export.patients)[0]["glucose"] == "90.0"


def test_two_resources_of_one_person_are_one_patient(names, tmp_path: Path) -> None:
    twin = {**patient(1), "id": "p9"}
    nobody = {**patient(3), "identifier": []}
    written(
        tmp_path / "export",
        Patient=[patient(1), twin, nobody],
        Observation=[observation(number, f"{LOINC}|2345-7", quantity(90 + number, "mg/dL")) for number in (1, 9)],
    )
    export = declared(tmp_path)
    done = import_export(export, names)
    assert done.patients == len(rows(export.patients)) == 1
    assert done.aside == {"Patient: no identifier of the declared system": 1}
    assert rows(export.patients)[0]["glucose"] == "99.0"


@pytest.mark.parametrize("bad", ["{", "[]", '{"resourceType": "Patient"}', "[" * 100_000])
def test_a_damaged_line_is_named_and_no_table_appears(names, tmp_path: Path, bad: str) -> None:
    good = observation(1, f"{LOINC}|2345-7", quantity(1, "mg/dL"))
    written(tmp_path / "export", Patient=[patient(1)], Observation=[good, bad])
    with pytest.raises(DataError, match=r"Observation\.000\.ndjson, line 2"):
        import_export(declared(tmp_path), names)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bomb_and_a_line_without_end_are_refused(names, tmp_path: Path) -> None:
    written(tmp_path / "export", Patient=[patient(1)])
    packed = tmp_path / "export" / "Observation.ndjson.gz"
    packed.write_bytes(gzip.compress((b" " * (2**20 - 1) + b"\n") * 100, 9))
    with pytest.raises(DataError, match="holds more than"):
        import_export(declared(tmp_path), names)
    packed.unlink()
    (tmp_path / "export" / "Observation.ndjson").write_bytes(b"x" * (17 * 2**20))
    with pytest.raises(DataError, match="line 1: longer"):
        import_export(declared(tmp_path), names)


def test_memory_does_not_grow_with_the_observations(names, tmp_path: Path) -> None:
    written(tmp_path / "export", Patient=[patient(number) for number in range(20)])
    peaks = []
    for count in (200, 2000):
        written(
            tmp_path / "export",
            Observation=[
                observation(each % 20, f"{LOINC}|2345-7", quantity(each % 300, "mg/dL")) for each in range(count)
            ],
        )
        tracemalloc.start()
        assert import_export(declared(tmp_path), names).samples == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.5 + 200_000


@pytest.mark.parametrize(
    ("unit", "wanted", "value", "expected"),
    [
        ("g/L", "mg/dL", 1, 100),
        ("10*3/uL", "10*9/L", 4.5, 4.5),
        ("/min", "/s", 60, 1),
        ("{beats}/min", "/min", 72, 72),
        ("[degF]", "Cel", 212, 100),
        ("K", "Cel", 273.15, 0),
        ("kPa", "mm[Hg]", 1, 7.50062),
        ("cm[H2O]", "mm[Hg]", 1, 0.735559),
        ("[lb_av]", "kg", 1, 0.45359237),
        ("[in_i]", "cm", 1, 2.54),
        ("meq/L", "eq/L", 1000, 1),
        ("ug/(L)", "mg/L", None, None),
        ("kg/m2", "g/cm2", 10, 1),
        ("mL/min/{1.73_m2}", "L/h", 1000, 60),
        ("ng/mL", "ug/L", 3, 3),
        ("%", "1", 50, 0.5),
        ("mm[Hg]", "m[Hg]", 1000, 1),
    ],
)
def test_units_are_converted_as_ucum_means_them(unit: str, wanted: str, value: Any, expected: Any) -> None:
    if value is None:
        with pytest.raises(DataError):
            factor(unit, wanted)
        return
    scale, offset = factor(unit, wanted)
    assert scale * value + offset == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("unit", ["mg", "[IU]/L", "meq/L", "U/L", "mmol/L"])
def test_what_is_not_the_same_kind_is_not_converted(unit: str) -> None:
    with pytest.raises(DataError):
        factor(unit, "mg/dL")


@pytest.mark.parametrize(
    "unit", ["", " ", "mg/dL/", "__import__('os')", "mg**9**9", "10*99999", "x" * 100, "mcg", "(mg)"]
)
def test_a_unit_that_is_none_is_not_guessed(unit: str) -> None:
    with pytest.raises(ValueError):
        check(unit)


@pytest.mark.parametrize(
    "changes",
    [
        {"variables": {"a": {"codes": ["x|1"], "unit": "1"}, "b": {"codes": ["x|1"], "unit": "1"}}},
        {"variables": {"age": {"codes": ["x|1"], "unit": "1"}}},
        {"flags": {"glucose": {"codes": ["x|1"]}}},
        {"variables": {"a,b": {"codes": ["x|1"], "unit": "1"}}},
        {"variables": {"a": {"codes": ["2345-7"], "unit": "1"}}},
    ],
)
def test_a_declaration_with_two_meanings_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        declared(tmp_path, **changes)


def test_a_declared_unit_that_is_none_is_said_before_anything_is_read(names, tmp_path: Path) -> None:
    export = declared(tmp_path, variables={"a": {"codes": ["x|1"], "unit": "mcg/dL"}})
    with pytest.raises(ConfigurationError, match="a: unit 'mcg/dL'"):
        import_export(export, names)
