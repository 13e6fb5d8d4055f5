"""The service answers as the trained model does, abstains outside the declared range, and says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tests.unit.serve.conftest import Bundles

from consilium_serve.home import Home
from consilium_serve.record import entries
from consilium_serve.rest.app import guarded
from consilium_serve.service import Service
from consilium_shared.models import onnx_graph
from consilium_shared.preparation.record import prepare
from consilium_shared.protocol.bundle import open_bundle
from consilium_shared.study import Study

GOOD = {"age": 61, "pain": "2", "chol": 250.5}
SECRET = "Schmidt-4711"


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    token = service.home.new_token("ward")
    with TestClient(guarded(service), headers={"authorization": f"Bearer {token}"}, raise_server_exceptions=False) as c:
        yield c


def trained(bundles: Bundles, name: str, record: dict[str, Any]) -> list[float]:
    """Probabilities that torch gives with the published weights."""
    found = open_bundle(bundles[name], bundles.fingerprint)
    study = Study.from_contract(found.card["contract"])
    inputs = {key: values[None] for key, values in prepare(study, record).inputs.items()}
    return list(onnx_graph.answers(found.files["model.safetensors"], study, inputs)["probabilities"][0])


def example(bundles: Bundles, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(open_bundle(bundles[name], bundles.fingerprint).files["example.json"])
    return found


@pytest.mark.parametrize(("name", "study"), [("table", "a-logistic"), ("series", "a-gru"), ("image", "a-small-cnn")])
def test_an_answer_is_the_trained_models(client: TestClient, bundles: Bundles, name: str, study: str) -> None:
    record = example(bundles, name)["record"]
    told = client.post(f"/v1/models/{study}/predict", json={"record": record}).json()
    expected = trained(bundles, name, record)
    assert told["prediction"]["probabilities"] == pytest.approx({"no": expected[0], "yes": expected[1]}, abs=1e-5)
    assert told["prediction"]["class"] == ("yes" if expected[1] >= 0.5 else "no")
    assert told["prediction"]["probability"] == pytest.approx(expected[1], abs=1e-5)
    assert told["threshold"] == 0.5 and told["abstained"] == []
    assert told["model"]["sha256"].startswith(told["model"]["version"])
    assert "no diagnosis" in told["notice"]


def test_a_batch_is_answered_in_order_and_as_one_by_one(client: TestClient) -> None:
    records = [{**GOOD, "age": age} for age in (20, 90, 55)]
    one_by_one = [client.post("/v1/models/a-logistic/predict", json={"record": r}).json() for r in records]
    batch = client.post("/v1/models/a-logistic/batch", json={"records": [{"record": r} for r in records]}).json()
    for one, each in zip(one_by_one, batch["answers"], strict=True):
        assert each["prediction"]["probabilities"] == pytest.approx(one["prediction"]["probabilities"], abs=1e-6)
    assert len({round(each["prediction"]["probability"], 6) for each in batch["answers"]}) == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"age": 17.9}, "age: outside 18 … 110"),
        ({"age": 540}, "age: outside 18 … 110"),
        ({"age": None}, "age: missing"),
        ({"age": "NaN"}, "age: not a number"),
        ({"chol": 1e300}, "chol: outside"),
        ({"pain": "4"}, "pain: none of 1, 2, 3"),
        ({"pain": ""}, "pain: missing"),
    ],
)
def test_outside_the_declared_range_there_is_no_prediction(client: TestClient, change: Any, why: str) -> None:
    answer = client.post("/v1/models/a-logistic/predict", json={"record": {**GOOD, **change}})
    told = answer.json()
    if answer.status_code == 422:
        assert why in told["error"]["message"]
        return
    assert told["prediction"] is None
    assert why in told["abstained"][0]
    assert str(next(iter(change.values()))) not in json.dumps(told["abstained"]) or change == {"pain": ""}


def test_one_record_that_is_abstained_from_changes_no_other_answer(client: TestClient) -> None:
    records = [{"record": GOOD}, {"record": {**GOOD, "age": 5}}, {"record": {**GOOD, "age": 70}}]
    told = client.post("/v1/models/a-logistic/batch", json={"records": records}).json()["answers"]
    assert [each["prediction"] is None for each in told] == [False, True, False]
    alone = client.post("/v1/models/a-logistic/predict", json=records[2]).json()
    assert told[2]["prediction"]["probability"] == pytest.approx(alone["prediction"]["probability"], abs=1e-6)


def test_a_category_may_be_written_as_a_number(client: TestClient) -> None:
    told = [
        client.post("/v1/models/a-logistic/predict", json={"record": {**GOOD, "pain": p}}).json() for p in ("2", 2, 2.0)
    ]
    assert len({each["prediction"]["probability"] for each in told}) == 1


def test_a_series_in_the_wrong_unit_is_abstained_from(client: TestClient) -> None:
    """Pressure in kPa lies below the study's range in every sample."""
    samples = [{"variable": "hr", "minutes": 5.0, "value": 80}, {"variable": "sbp", "minutes": 9.0, "value": 16.0}]
    record = {"samples": samples, "statics": {"age": 60, "sex": "f"}}
    told = client.post("/v1/models/a-gru/predict", json={"record": record}).json()
    assert told["prediction"] is None and "is the unit the study's?" in told["abstained"][0]
    samples.append({"variable": "sbp", "minutes": 200.0, "value": 120.0})
    told = client.post("/v1/models/a-gru/predict", json={"record": record}).json()
    assert told["prediction"] is not None and any("1 of 2 samples" in note for note in told["notes"])


def test_a_missing_static_is_taken_as_in_training(client: TestClient, bundles: Bundles) -> None:
    record = {"samples": [{"variable": "hr", "minutes": 61.0, "value": 100}], "statics": {"sex": "m"}}
    told = client.post("/v1/models/a-gru/predict", json={"record": record}).json()
    assert told["prediction"]["probability"] == pytest.approx(trained(bundles, "series", record)[1], abs=1e-5)
    assert any("age: missing" in note for note in told["notes"])


def test_an_image_of_one_brightness_is_abstained_from(client: TestClient) -> None:
    told = client.post("/v1/models/a-small-cnn/predict", json={"record": {"pixels": [[0.5] * 16] * 16}}).json()
    assert told["prediction"] is None and "one brightness" in told["abstained"][0]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/models/a-logistic/predict", {"record": {**GOOD, SECRET: 1}}, 422),
        ("/v1/models/a-logistic/predict", {"record": {**GOOD, "age": SECRET}}, 422),
        ("/v1/models/a-logistic/predict", {"record": {**GOOD, "age": {"a": SECRET}}}, 422),
        ("/v1/models/a-logistic/predict", {"record": [SECRET]}, 422),
        ("/v1/models/a-logistic/predict", {"records": SECRET}, 422),
        ("/v1/models/a-logistic/predict", {"record": {**GOOD, "pain": [SECRET]}}, 422),
        ("/v1/models/a-gru/predict", {"record": {"samples": [{"variable": SECRET, "minutes": 1, "value": 1}]}}, 422),
        ("/v1/models/a-gru/predict", {"record": {"samples": [{"variable": "hr", "minutes": SECRET, "value": 1}]}}, 422),
        ("/v1/models/a-gru/predict", {"record": {"samples": SECRET}}, 422),
        ("/v1/models/a-small-cnn/predict", {"record": {"pixels": [[SECRET]]}}, 422),
        ("/v1/models/a-small-cnn/predict", {"record": {"pixels": [[0.1]]}}, 422),
        ("/v1/models/none/predict", {"record": {}}, 404),
        (
            "/v2/models/a-logistic/infer",
            {"inputs": [{"name": SECRET, "shape": [1], "datatype": "FP32", "data": [1]}]},
            422,
        ),
    ],
)
def test_what_is_wrong_is_said_without_what_was_sent(
    client: TestClient, caplog: pytest.LogCaptureFixture, path: str, body: Any, status: int
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status
    assert SECRET not in answer.text and SECRET not in caplog.text
    assert set(answer.json()["error"]) == {"status", "message"}


def test_a_defect_gives_no_trace_to_a_client_and_no_data_to_the_log(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(Service, "predict", broken)
    answer = client.post("/v1/models/a-logistic/predict", json={"record": GOOD})
    assert answer.status_code == 500
    assert "Traceback" not in answer.text and ".py" not in answer.text and SECRET not in answer.text
    assert SECRET not in caplog.text and "test_answers.py" in caplog.text


def test_kserves_paths_answer_the_same(client: TestClient, bundles: Bundles) -> None:
    told = example(bundles, "series")
    inputs = [
        {"name": name, "shape": list(np.shape(values)), "datatype": "FP32", "data": np.ravel(values).tolist()}
        for name, values in told["inputs"].items()
    ]
    answer = client.post("/v2/models/a-gru/infer", json={"id": "7", "inputs": inputs}).json()
    assert answer["id"] == "7" and answer["outputs"][0]["shape"] == [1, 2]
    assert answer["outputs"][0]["data"] == pytest.approx(told["probabilities"][0], abs=1e-5)
    described = client.get("/v2/models/a-gru").json()
    assert [each["name"] for each in described["inputs"]] == ["series", "statics"]
    version = described["versions"][0]
    assert client.get(f"/v2/models/a-gru/versions/{version}/ready").json()["ready"] is True
    assert client.get("/v2/models/a-gru/versions/000000000000").status_code == 404
    inputs[0]["data"][3] = None
    answer = client.post("/v2/models/a-gru/infer", json={"inputs": inputs}).json()
    assert answer["parameters"]["abstained"] == [0] and answer["outputs"][0]["data"] == [None, None]


def test_the_record_has_every_answer_and_no_identifier(client: TestClient, home: Home) -> None:
    for age in (30, 5):
        client.post("/v1/models/a-logistic/predict", json={"record": {**GOOD, "age": age}, "patient": SECRET})
    found = [each["body"] for each in entries(home.records, home.identity().public) if each["kind"] == "predictions"]
    assert [len(each["predictions"]) for each in found] == [1, 1]
    first, second = (each["predictions"][0] for each in found)
    assert first["patient"] == second["patient"] and first["input"] != second["input"]
    assert first["class"] in ("yes", "no") and second["class"] is None and second["abstained"]
    assert found[0]["client"] == "ward"
    text = "".join(file.read_text() for file in home.records.glob("*.jsonl"))
    assert SECRET not in text and "chol" not in text


def test_nothing_is_answered_that_the_record_does_not_have(client: TestClient, service: Service) -> None:
    service.record.close()
    answer = client.post("/v1/models/a-logistic/predict", json={"record": GOOD})
    assert answer.status_code == 503 and "prediction" not in answer.json()


def test_openapi_describes_every_path(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/models/{study}/predict", "/v1/models/{study}/batch", "/v2/models/{name}/infer"} <= set(paths)
    assert client.get("/docs").status_code == 404  # its page would load scripts from a content network


def test_the_page_of_a_model_runs_no_script(client: TestClient) -> None:
    page = client.get("/v1/models/a-logistic/page")
    assert page.status_code == 200 and "<h1" in page.text
    assert page.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
