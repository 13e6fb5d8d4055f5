"""The SuperLink's listeners: what a stranger sends is not read, and a site's requests are bounded."""

from __future__ import annotations

import asyncio
import datetime
import json
from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import sign_message

from consilium_server.superlink import gate as superlink_gate
from consilium_server.superlink.gate import DISCARDED_BYTES, REQUEST_BYTES, SignedOnly, signer

KEY, OTHER = (ec.generate_private_key(curve) for curve in (ec.SECP384R1(), ec.SECP256R1()))
NOW = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(key: ec.EllipticCurvePrivateKey, when: datetime.datetime) -> dict[bytes, bytes]:
    """The headers with which a SuperNode authenticates itself."""
    stamp = when.isoformat().encode()
    return {
        b"flwr-public-key": b64encode(pem(key)),
        b"flwr-signature": b64encode(sign_message(key, stamp)),
        b"flwr-timestamp": stamp,
    }


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Request:
    """One request to a gate that knows ``KEY``; what was read of it, and the answer."""

    def __init__(
        self, headers: dict[bytes, bytes], length: int = 5, path: str = "/v1/fleet/push-object", whole: bool = True
    ) -> None:
        fields = [*headers.items(), (b"content-length", b"%d" % length)]
        self.scope: dict[str, Any] = {"type": "http", "path": path, "headers": fields, "state": {}}
        self.length, self.whole = length, whole
        self.read = 0
        self.answer: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        self.read += 1
        if not self.whole:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": bytes(self.length), "more_body": False}

    async def send(self, event: dict[str, Any]) -> None:
        self.answer.append(event)

    @property
    def status(self) -> int:
        return int(self.answer[0]["status"])

    @property
    def closes(self) -> bool:
        return (b"connection", b"close") in self.answer[0]["headers"]


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body that it was given."""
    event = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [], "read": len(event["body"])})


def gate() -> SignedOnly:
    return SignedOnly(application, {pem(KEY): 7}.get)


def ask(request: Request, at: SignedOnly | None = None) -> Request:
    asyncio.run((at or gate())(request.scope, request.receive, request.send))
    return request


def test_a_registered_sites_request_is_read_and_handed_on() -> None:
    request = ask(Request(signed(KEY, now()), 1000))
    assert (request.status, request.read) == (200, 1)
    assert request.answer[0]["read"] == 1000
    assert request.scope["state"]["node"] == 7


STRANGERS: dict[str, Callable[[], dict[bytes, bytes]]] = {
    "nothing": dict,
    "another key": lambda: signed(OTHER, now()),
    "the key, without a signature of its own": lambda: signed(OTHER, now()) | {b"flwr-public-key": b64encode(pem(KEY))},
    "yesterday's signature": lambda: signed(KEY, now() - datetime.timedelta(days=1)),
    "no key at all": lambda: signed(KEY, now()) | {b"flwr-public-key": b64encode(b"no key")},
    "no base64": lambda: signed(KEY, now()) | {b"flwr-signature": b"\xff"},
    "a time without a zone": lambda: signed(KEY, now().replace(tzinfo=None)),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("length", [5, REQUEST_BYTES])
def test_of_a_strangers_request_no_byte_is_read(kind: str, length: int) -> None:
    request = ask(Request(STRANGERS[kind](), length, whole=False))
    assert (request.status, request.read, request.closes) == (401, 0, length > DISCARDED_BYTES)


@pytest.mark.parametrize(
    ("path", "fields", "length", "status"),
    [
        ("/v1/fleet/push-object", {}, REQUEST_BYTES + 1, 413),
        ("/v1/fleet/push-object", {b"transfer-encoding": b"chunked"}, 5, 411),
        ("/health", {}, 1, 413),
        ("/health", {}, 0, 200),
    ],
)
def test_a_request_of_the_wrong_size_is_refused_even_of_a_site(
    path: str, fields: dict[bytes, bytes], length: int, status: int
) -> None:
    request = ask(Request(signed(KEY, now()) | fields, length, path))
    assert request.status == status
    assert bool(request.read) == (status == 200)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink_gate, "BODY_SECONDS", 0.01)
    request = ask(Request(signed(KEY, now()), REQUEST_BYTES, whole=False))
    assert (request.status, request.closes) == (408, True)


def test_a_site_has_a_bounded_number_of_requests_under_way_and_takes_none_from_another() -> None:
    at = SignedOnly(application, {pem(KEY): 7, pem(OTHER): 8}.get)

    async def all_at_once() -> tuple[list[Request], Request]:
        slow = [Request(signed(KEY, now()), whole=False) for _ in range(superlink_gate.REQUESTS_OF_A_SITE)]
        tasks = [asyncio.ensure_future(at(each.scope, each.receive, each.send)) for each in slow]
        while not all(each.read for each in slow):
            await asyncio.sleep(0)
        more, others = (Request(signed(key, now())) for key in (KEY, OTHER))
        await run(at, more)
        await run(at, others)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        again = Request(signed(KEY, now()))
        await run(at, again)
        return [more, others], again

    async def run(at: SignedOnly, request: Request) -> None:
        await at(request.scope, request.receive, request.send)

    (more, others), again = asyncio.run(all_at_once())
    assert (more.status, more.read) == (429, 0)
    assert (others.status, again.status) == (200, 200)


class Connection:
    """A connection that notes that it was closed."""

    def __init__(self) -> None:
        self.transport = self
        self.closed = False

    def abort(self) -> None:
        self.closed = True


def in_a_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await work()

    asyncio.run(run())


def test_connections_without_a_signed_request_give_way_to_newer_ones_and_those_of_sites_do_not() -> None:
    async def work() -> None:
        at = gate()
        site = Connection()
        at.strangers.enter(site)
        request = Request(signed(KEY, now()))
        request.scope["state"] = {"known": lambda: at.strangers.leave(site)}
        await at(request.scope, request.receive, request.send)
        strangers = [Connection() for _ in range(superlink_gate.STRANGERS + 3)]
        for each in strangers:
            at.strangers.enter(each)
        assert [each.closed for each in strangers[:4]] == [True, True, True, False]
        assert not site.closed

    in_a_loop(work)


def test_a_connection_on_which_nothing_signed_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink_gate, "STRANGER_SECONDS", 0.01)

    async def work() -> None:
        at, silent, gone = gate(), Connection(), Connection()
        at.strangers.enter(silent)
        at.strangers.enter(gone)
        at.strangers.leave(gone)
        while not silent.closed:
            await asyncio.sleep(0.01)
        assert not gone.closed

    in_a_loop(work)


def test_a_signature_is_taken_while_flower_takes_it() -> None:
    """Flower's window: five seconds ahead, five minutes behind."""
    for seconds, taken in ((-6, False), (-4, True), (0, True), (304, True), (306, False)):
        headers = signed(KEY, NOW - datetime.timedelta(seconds=seconds))
        assert (signer(headers, NOW) == pem(KEY)) is taken, seconds


def test_only_a_registered_site_is_told_the_release() -> None:
    known, stranger = (ask(Request(signed(key, now()), 0, superlink_gate.ABOUT_PATH)) for key in (KEY, OTHER))
    assert (known.status, stranger.status) == (200, 401)
    assert set(json.loads(known.answer[1]["body"])) == {"consilium", "formats"}
    assert stranger.answer[1]["body"] == b""
