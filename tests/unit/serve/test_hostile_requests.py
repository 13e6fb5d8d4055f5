"""Whatever a client with a token sends is answered, in bounded memory; whatever lies in the home ends no request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from consilium_serve.home import MOST_RECORDS, Home
from consilium_serve.record import Record
from consilium_serve.rest import kserve
from consilium_serve.rest.app import guarded
from consilium_serve.rest.guard import Guard
from consilium_serve.service import Service


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    token = service.home.new_token("ward")
    with TestClient(guarded(service), headers={"authorization": f"Bearer {token}"}, raise_server_exceptions=False) as c:
        yield c


SAMPLE = {"minutes": 1, "value": 80}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models/a-gru/predict", {"record": {"samples": [{**SAMPLE, "variable": [["hr"]]}]}}),
        ("/v1/models/a-gru/predict", {"record": {"samples": [{**SAMPLE, "variable": {}}]}}),
        ("/v1/models/a-small-cnn/predict", {"record": {"pixels": [[10**400]]}}),
        ("/v1/models/a-small-cnn/predict", {"record": {"pixels": 10**400}}),
        ("/v1/models/a-logistic/batch", {"records": [{"record": {}}] * (MOST_RECORDS + 1)}),
    ],
)
def test_a_body_of_odd_values_is_told_as_such(client: TestClient, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422 and "error" in answer.json()


def test_nothing_is_made_of_more_records_than_are_answered(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kserve, "Prepared", None)
    count = service.settings.limits.records + 1
    for shape, data in (([count, 4], [0.0] * 4 * count), ([2**31, 4], [])):
        tensor = {"name": "record", "shape": shape, "datatype": "FP32", "data": data}
        answer = client.post("/v2/models/a-logistic/infer", json={"inputs": [tensor]})
        assert answer.status_code == 422 and "records in one request" in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", ["[1]", '"x"', "{", '{"ward": "ß"}'])
def test_damaged_tokens_admit_nobody_and_break_nothing(client: TestClient, service: Service, content: str) -> None:
    (service.home.root / "tokens.json").write_text(content)
    assert client.get("/v1/models").status_code in (401, 503)
    assert client.get("/health/live").status_code == 200


def test_a_length_of_any_number_of_digits_is_too_long(service: Service) -> None:
    sent: list[Any] = []

    async def ask(app: Guard) -> None:
        async def receive() -> Any:
            raise AssertionError("read")

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {token}".encode()), (b"content-length", b"9" * 10_000)]
        await app({"type": "http", "path": "/v1/models", "headers": headers}, receive, send)

    token = service.home.new_token("ward")
    asyncio.run(ask(guarded(service)))
    assert sent[0]["status"] == 413


def test_an_image_that_a_killed_service_was_reading_goes_at_the_next_start(home: Home) -> None:
    home.asked.mkdir(parents=True)
    left, other = home.asked / "tmpabcd_123.dcm", home.asked / "mine.dcm"
    for file in (left, other):
        file.write_bytes(b"an image")
    Service(home, Record(home.records, home.identity(), 365)).close()
    assert not left.exists() and other.exists()
