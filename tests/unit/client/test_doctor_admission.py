"""A SuperNode key that the server does not take is named at the site, with the cure; the real gate looks at it here."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from tests.support.listener import listening

from consilium_client.commands import doctor
from consilium_client.commands.doctor import Finding
from consilium_client.site import Home
from consilium_client.transport import admission
from consilium_server.superlink.gate import signer

OK = Finding("clock", "ok", "")
Registered = Callable[[bytes | None], bool]


@pytest.fixture
def server(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Registered], Finding]]:
    """``server(registered)``: the finding where a server takes a signer's key as that says."""
    answer: list[Registered] = []

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        headers = {name.lower().encode(): value.encode() for name, value in request.headers.items()}
        key = signer(headers, datetime.datetime.now(datetime.UTC))
        taken = request.command == "POST" and request.path.startswith("/v1/fleet/") and answer[-1](key)
        return 404 if taken else 401, {}

    def found(registered: Registered) -> Finding:
        answer.append(registered)
        return doctor._admission(coordinator.site, OK)

    with listening(coordinator, monkeypatch, reply):
        yield found


@pytest.fixture
def own(coordinator: Any) -> bytes:
    """The site's public key, as the SuperLink has it."""
    key = serialization.load_ssh_private_key((coordinator.site.keys / "supernode.key").read_bytes(), password=None)
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(*pem)


def test_a_site_that_was_admitted_is_told_so(server: Callable[[Registered], Finding], own: bytes) -> None:
    assert server(lambda key: key == own) == Finding("admission", "ok", "the server takes this site's SuperNode key")


def test_one_that_was_not_or_is_no_longer_reads_it_with_what_to_send_to_whom(
    server: Callable[[Registered], Finding], coordinator: Any
) -> None:
    finding = server(lambda _: False)
    assert finding.state == "error" and finding.detail.startswith("not admitted: the server does not take")
    assert str(coordinator.site.request_file) in finding.detail and "consilium-server admit" in finding.detail


def test_a_server_that_takes_anybody_so_far_tells_nothing(server: Callable[[Registered], Finding]) -> None:
    """As one of release 0.1 does, which looks at a key after it has read the body of a path that it knows."""
    finding = server(lambda _: True)
    assert finding.state == "warning" and "answers any key alike" in finding.detail


def test_with_a_wrong_clock_it_is_the_clock_that_is_named(
    server: Callable[[Registered], Finding], coordinator: Any
) -> None:
    server(lambda _: False)
    finding = doctor._admission(coordinator.site, Finding("clock", "error", "2 h ahead"))
    assert finding.state == "warning" and "with this clock" in finding.detail


def test_without_a_server_or_a_key_other_checks_say_why(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = coordinator.site.invitation().model_copy(update={"port": 1})
    monkeypatch.setattr(Home, "invitation", lambda _: there)
    assert doctor._admission(coordinator.site, OK).state == "warning"
    (coordinator.site.keys / "supernode.key").write_bytes(b"damaged")
    assert doctor._admission(coordinator.site, OK).state == "warning"


def test_the_question_is_signed_as_flower_signs() -> None:
    key, when = ec.generate_private_key(ec.SECP384R1()), datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
    assert admission.HEADERS == (TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    headers = {name.encode(): value.encode() for name, value in admission.signed(key, when).items()}
    assert signer(headers, when) is not None
    assert signer(headers, when + datetime.timedelta(hours=1)) is None
