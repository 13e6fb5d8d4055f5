"""Nobody asks without a token, nobody asks too often, too much or too long."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from consilium_serve.rest import guard
from consilium_serve.rest.guard import Guard
from consilium_shared.transport.strangers import Strangers

TOKENS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("ward", "icu")}


class Inner:
    """An application that keeps what came through, and can be held up."""

    def __init__(self) -> None:
        self.came: list[tuple[str, bytes]] = []
        self.most = self.now = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.gate.wait()
        self.came.append((scope.get("consilium.client", ""), (await receive())["body"]))
        self.now -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def made(inner: Inner, **changes: Any) -> Guard:
    limits = {"certificates": False, "per_minute": 60, "body_bytes": 100, "at_once": 2, "waiting": 2, **changes}
    return Guard(inner, lambda: TOKENS, **limits)


async def ask(
    app: Guard,
    token: str | None = "ward",
    parts: tuple[bytes, ...] = (b"x",),
    said: int | None = None,
    path: str = "/v1",
) -> int:
    headers = [] if token is None else [(b"authorization", b"Bearer " + token.encode())]
    headers.append((b"transfer-encoding", b"chunked") if said is None else (b"content-length", str(said).encode()))
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "path": path, "headers": headers}, receive, send)
    status: int = sent[0]["status"]
    if status != 200:
        assert json.loads(sent[1]["body"])["error"]["status"] == status
    return status


def test_only_a_known_token_passes() -> None:
    inner = Inner()

    async def run() -> list[int]:
        app = made(inner)
        return [await ask(app, token) for token in ("ward", "icu", "Ward", "", None, TOKENS["ward"])]

    assert asyncio.run(run()) == [200, 200, 401, 401, 401, 401]
    assert [client for client, _ in inner.came] == ["ward", "icu"]


def test_health_needs_no_token_and_reads_no_body() -> None:
    inner = Inner()
    assert asyncio.run(ask(made(inner), None, (b"x" * 10,), path="/health/live")) == 200
    assert inner.came == [("", b"")]


def test_with_certificates_a_wrong_token_is_still_wrong() -> None:
    async def run() -> list[int]:
        app = made(Inner(), certificates=True)
        return [await ask(app, None), await ask(app, "wrong")]

    assert asyncio.run(run()) == [200, 401]


@pytest.mark.parametrize("said", [None, 40])
def test_a_body_is_bounded_whatever_its_length_is_said_to_be(said: int | None) -> None:
    inner = Inner()
    assert asyncio.run(ask(made(inner), parts=(b"x" * 60,) * 3, said=said)) == 413
    assert asyncio.run(ask(made(inner), parts=(b"x",), said=101)) == 413
    assert inner.came == []
    assert asyncio.run(ask(made(inner), parts=(b"x" * 60, b"y" * 40), said=100)) == 200
    assert inner.came == [("ward", b"x" * 60 + b"y" * 40)]


def test_a_client_that_asks_too_often_is_turned_away_and_another_is_not() -> None:
    clock = [0.0]

    async def run() -> tuple[list[int], int, int]:
        app = made(Inner(), per_minute=3, clock=lambda: clock[0])
        many = [await ask(app) for _ in range(5)]
        other = await ask(app, "icu")
        clock[0] = 20.0
        return many, other, await ask(app)

    assert asyncio.run(run()) == ([200, 200, 200, 429, 429], 200, 200)


def test_so_many_are_computed_at_once_so_many_wait_and_more_are_turned_away() -> None:
    inner = Inner()

    async def run() -> list[int]:
        inner.gate.clear()
        app = made(inner)
        tasks = [asyncio.create_task(ask(app, said=1)) for _ in range(6)]
        for _ in range(20):
            await asyncio.sleep(0)
        inner.gate.set()
        return sorted([await task for task in tasks])

    assert asyncio.run(run()) == [200, 200, 200, 200, 503, 503]
    assert inner.most == 2


def test_large_bodies_do_not_fill_the_memory_together() -> None:
    inner = Inner()

    async def run() -> list[int]:
        inner.gate.clear()
        app = made(inner, waiting=50)
        tasks = [asyncio.create_task(ask(app, parts=(b"x" * 100,), said=100)) for _ in range(10)]
        for _ in range(20):
            await asyncio.sleep(0)
        inner.gate.set()
        return sorted([await task for task in tasks])

    assert asyncio.run(run()) == [200] * guard.HELD + [503] * (10 - guard.HELD)


def test_a_slow_body_ends_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)

    async def run() -> tuple[list[int], int]:
        app = made(Inner())
        slow = [asyncio.create_task(ask(app, parts=(), said=10)) for _ in range(3)]
        await asyncio.sleep(0.01)
        return [await ask(app), *[await task for task in slow]], 0

    assert asyncio.run(run())[0] == [200, 408, 408, 408]


def test_a_request_without_a_body_takes_no_room() -> None:
    inner = Inner()

    async def run() -> list[int]:
        inner.gate.clear()
        app = made(inner, waiting=50)
        tasks = [asyncio.create_task(ask(app, parts=(b"",), said=0)) for _ in range(10)]
        tasks += [asyncio.create_task(asked_without_lengths(app)) for _ in range(10)]
        for _ in range(20):
            await asyncio.sleep(0)
        inner.gate.set()
        return [await task for task in tasks]

    assert asyncio.run(run()) == [200] * 20


async def asked_without_lengths(app: Guard) -> int:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "path": "/v1", "headers": [(b"authorization", b"Bearer ward")]}, receive, send)
    return int(sent[0]["status"])


def test_who_does_not_take_an_answer_takes_nobodys_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "ANSWER_SECONDS", 0.2)

    async def run() -> int:
        app = made(Inner(), at_once=1)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def stuck(_: Any) -> None:
            await asyncio.Event().wait()

        headers = [(b"authorization", b"Bearer icu"), (b"content-length", b"1")]
        slow = asyncio.create_task(app({"type": "http", "path": "/v1", "headers": headers}, receive, stuck))
        await asyncio.sleep(0.01)
        status = await asyncio.wait_for(ask(app), 0.1)
        await asyncio.wait_for(slow, 5)
        return status

    assert asyncio.run(run()) == 200


def test_strangers_hold_few_connections_and_known_clients_keep_theirs() -> None:
    async def run() -> tuple[list[bool], bool]:
        config = uvicorn.Config(made(Inner()), log_config=None, ws="none", http=Strangers(2, 0.5).protocol())
        config.load()
        loop, state = asyncio.get_running_loop(), ServerState()
        connection: Any = config.http_protocol_class
        server = await loop.create_server(lambda: connection(config, state, {}), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        known = await asyncio.open_connection("127.0.0.1", port)
        known[1].write(b"GET /v1 HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ward\r\n\r\n")
        assert b"200" in await known[0].readline()
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        await asyncio.sleep(0.1)
        gone = [reader.at_eof() or reader.exception() is not None for reader, _ in opened]
        await asyncio.sleep(0.8)
        assert all(reader.at_eof() or reader.exception() is not None for reader, _ in opened)
        alive = known[0].exception() is None and not known[0].at_eof()
        server.close()
        return gone, alive

    assert asyncio.run(run()) == ([True, True, False, False], True)
