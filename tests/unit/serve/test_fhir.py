"""A patient's vital signs and laboratory values in FHIR become a record, and the answer a RiskAssessment."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.support.published import SERIES, TABLE, study

from consilium_serve.fhir import Codes, read
from consilium_serve.home import Home
from consilium_serve.record import Record, entries
from consilium_serve.rest.app import guarded
from consilium_serve.service import Service
from consilium_shared.errors import DataError
from consilium_shared.preparation.record import prepare

LOINC = "http://loinc.org"
CODES = {
    "codes": {
        "hr": {"system": LOINC, "code": "8867-4", "unit": "/min"},
        "sbp": {"system": LOINC, "code": "8480-6", "unit": "mm[Hg]"},
    },
    "age": "age",
    "gender": "sex",
    "genders": {"female": "f", "male": "m"},
}
START = "2026-11-30T08:00:00+01:00"


def observation(code: str, value: float, unit: str, when: str, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "id": f"o-{code}-{when[11:13]}",
        "status": "final",
        "code": {"coding": [{"system": "urn:other", "code": "x"}, {"system": LOINC, "code": code}]},
        "subject": {"reference": "Patient/4711"},
        "effectiveDateTime": when,
        "valueQuantity": {"value": value, "code": unit, "system": "http://unitsofmeasure.org"},
        **more,
    }


PANEL = {
    "resourceType": "Observation",
    "id": "panel",
    "status": "final",
    "code": {"coding": [{"system": LOINC, "code": "85354-9"}]},
    "subject": {"reference": "Patient/4711"},
    "effectiveDateTime": "2026-11-30T07:30:00Z",
    "component": [
        {
            "code": {"coding": [{"system": LOINC, "code": "8480-6"}]},
            "valueQuantity": {"value": 118, "code": "mm[Hg]"},
        }
    ],
}
BUNDLE: dict[str, Any] = {
    "resourceType": "Bundle",
    "type": "collection",
    "entry": [
        {"resource": each}
        for each in (
            {"resourceType": "Patient", "id": "4711", "birthDate": "1961-12-01", "gender": "female",
             "name": [{"family": "Schmidt"}]},
            {"resourceType": "Encounter", "id": "e", "status": "in-progress", "period": {"start": START}},
            observation("8867-4", 92, "/min", "2026-11-30T08:10:00+01:00"),
            observation("8867-4", 88, "/min", "2026-11-30T09:30:00+01:00"),
            observation("8867-4", 500, "/min", "2026-11-30T09:40:00+01:00", status="entered-in-error"),
            PANEL,
        )
    ],
}  # fmt: skip


def bundle(*more: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(BUNDLE)
    found["entry"] += [{"resource": each} for each in more]
    return found


def codes() -> Codes:
    return Codes.model_validate(CODES)


def test_vital_signs_become_the_record_of_a_series() -> None:
    found = read(study("gru", SERIES), BUNDLE, codes())
    assert sorted((each["variable"], each["minutes"], each["value"]) for each in found.record["samples"]) == [
        ("hr", 10.0, 92), ("hr", 90.0, 88), ("sbp", 30.0, 118)
    ]  # fmt: skip
    assert found.record["statics"] == {"age": 64, "sex": "f"}
    assert found.patient == "4711" and found.basis == [
        "Observation/o-8867-4-08", "Observation/o-8867-4-09", "Observation/panel"
    ]  # fmt: skip


def test_a_value_in_another_unit_is_left_out_and_said() -> None:
    strange = observation("8480-6", 16, "kPa", "2026-11-30T10:00:00+01:00")
    found = read(study("gru", SERIES), bundle(strange), codes())
    assert [each["value"] for each in found.record["samples"] if each["variable"] == "sbp"] == [118]
    assert "another unit" in found.notes[0]


def test_the_newest_values_become_the_record_of_a_table() -> None:
    given = {
        "codes": {
            "chol": {"system": LOINC, "code": "2093-3", "unit": "mg/dL"},
            "pain": {"system": LOINC, "code": "pain", "values": {"LA1": "1", "LA2": "2"}},
        },
        "age": "age",
    }
    pain = observation("pain", 0, "", "2026-11-29T10:00:00Z")
    del pain["valueQuantity"]
    pain["valueCodeableConcept"] = {"coding": [{"system": LOINC, "code": "LA2"}]}
    found = read(
        study("logistic", TABLE),
        bundle(
            observation("2093-3", 260, "mg/dL", "2026-11-29T10:00:00Z"),
            observation("2093-3", 240, "mg/dL", "2026-11-20T10:00:00Z"),
            pain,
        ),
        Codes.model_validate(given),
        datetime(2026, 11, 30, tzinfo=UTC),
    )
    assert found.record == {"chol": 260, "pain": "2", "age": 64}
    assert prepare(study("logistic", TABLE), found.record).abstain == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: b.update(resourceType="Patient"), "a FHIR Bundle"),
        (lambda b: b.update(entry=[]), "one Patient"),
        (lambda b: b["entry"].append(b["entry"][0]), "one Patient"),
        (lambda b: b["entry"].pop(1), "start is needed"),
        (lambda b: b["entry"][2]["resource"].update(subject={"reference": "Patient/1"}), "somebody else"),
        (lambda b: b["entry"][2]["resource"].update(subject="Schmidt"), "somebody else"),
        (lambda b: b["entry"][2]["resource"].update(effectiveDateTime="2026-11-30T08:10:00"), "without a zone"),
        (lambda b: b["entry"][2]["resource"].update(effectiveDateTime="the day before yesterday"), "not a moment"),
        (lambda b: b["entry"][0]["resource"].update(birthDate="1961"), "whole date"),
    ],
)
def test_what_is_no_bundle_of_one_patient_is_refused(change: Any, why: str) -> None:
    found = bundle()
    change(found)
    with pytest.raises(DataError, match=why) as refused:
        read(study("gru", SERIES), found, codes())
    assert "Schmidt" not in str(refused.value) and "4711" not in str(refused.value)


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    file = home.root / "predict.yaml"
    file.write_text(file.read_text() + f"fhir: {json.dumps({'a-gru': CODES})}\n")
    service = Service(home, Record(home.records, home.identity(), 365))
    token = home.new_token("ehr")
    with TestClient(guarded(service), headers={"authorization": f"Bearer {token}"}) as made:
        yield made
    service.close()


def test_the_answer_is_a_risk_assessment_of_the_same_prediction(client: TestClient, home: Home) -> None:
    answer = client.post("/v1/models/a-gru/fhir", json=BUNDLE)
    told = answer.json()
    assert answer.headers["content-type"].startswith("application/fhir+json")
    assert (told["resourceType"], told["status"]) == ("RiskAssessment", "preliminary")
    assert told["subject"] == {"reference": "Patient/4711"}
    assert {"reference": "Observation/panel"} in told["basis"]
    record = read(study("gru", SERIES, missing="center"), BUNDLE, codes()).record
    direct = client.post("/v1/models/a-gru/predict", json={"record": record}).json()["prediction"]["probabilities"]
    assert {p["outcome"]["text"]: p["probabilityDecimal"] for p in told["prediction"]} == pytest.approx(
        direct, abs=1e-6
    )
    assert any("no diagnosis" in note["text"] for note in told["note"])
    assert "Schmidt" not in answer.text
    first = next(e for e in entries(home.records, home.identity().public) if e["kind"] == "predictions")
    assert first["body"]["predictions"][0]["patient"] is not None and "4711" not in json.dumps(first)


def test_without_a_usable_sample_the_assessment_is_cancelled_and_says_why(client: TestClient) -> None:
    found = bundle()
    found["entry"] = found["entry"][:2]
    told = client.post("/v1/models/a-gru/fhir", json=found).json()
    assert told["status"] == "cancelled" and "prediction" not in told
    assert "no usable sample" in told["note"][0]["text"]


def test_a_study_without_codes_has_no_such_path(client: TestClient) -> None:
    answer = client.post("/v1/models/a-logistic/fhir", json=BUNDLE)
    assert answer.status_code == 422 and "fhir" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"code": [1]},
        {"code": {"coding": None}},
        {"code": {"coding": [{"system": [], "code": {}}]}},
        {"component": None},
        {"component": 7},
        {"status": []},
        {"id": "\ud800"},
        {"valueCodeableConcept": {"coding": 7}, "valueQuantity": None},
        {"effectiveDateTime": "0001-01-01T00:00:00+23:59"},
    ],
)
def test_a_resource_that_is_none_is_no_defect(client: TestClient, change: dict[str, Any]) -> None:
    given = copy.deepcopy(BUNDLE)
    given["entry"][2]["resource"].update(change)
    answer = client.post("/v1/models/a-gru/fhir", content=json.dumps(given))
    assert answer.status_code in (200, 422), answer.text


def test_a_patients_id_that_cannot_be_written_is_no_defect(client: TestClient) -> None:
    given = json.dumps(BUNDLE).replace("4711", "\\ud800")
    assert client.post("/v1/models/a-gru/fhir", content=given).status_code == 422
