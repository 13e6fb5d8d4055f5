"""Guard before the service: who may ask, how often, how much at a time. It reads every body before the service does."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from consilium_shared.errors import IntegrityError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
"""Paths answered without a token; their answers hold nothing of any patient."""

HELD = 4
"""Number of bodies of the largest size that are in memory together; of smaller ones more."""

BODY_SECONDS = 30.0
"""Longest time that a request's body may take."""

ANSWER_SECONDS = 60.0
"""Longest time in which a client takes its answer."""


_DIGITS = 18
"""Most digits of a body's length: what is longer is not counted."""

log = logging.getLogger("consilium.predict")


class Guard:
    """An ASGI application that lets a request through to another when it may pass."""

    def __init__(
        self,
        app: App,
        tokens: Callable[[], Mapping[str, str]],
        *,
        certificates: bool,
        per_minute: int,
        body_bytes: int,
        at_once: int,
        waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wraps an application.

        Args:
            app: the application.
            tokens: gives SHA-256 of each token by client, asked for anew at each request.
            certificates: whether a client's TLS certificate, which the server has checked, is enough.
            per_minute: requests of one client.
            body_bytes: of one request.
            at_once: requests under way.
            waiting: requests that wait for their turn.
            clock: seconds.
        """
        self._app, self._tokens, self._certificates = app, tokens, certificates
        self._per_minute, self._body_bytes, self._clock = per_minute, body_bytes, clock
        self._turn, self._most = asyncio.Semaphore(at_once), at_once + waiting
        self._here = self._held = 0
        self._left: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or passes the request on with its body read."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None
        if scope["path"] in OPEN:
            return await self._app(scope, _nothing, send)
        try:
            client = self._client(scope)
        except IntegrityError as error:
            log.error("%s", error)
            return await refuse(send, 503, "the service cannot answer; its log says why")
        if client is None:
            return await refuse(
                send, 401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
            )
        scope.get("state", {}).get("known", lambda: None)()  # of ``strangers``
        if not self._may_ask(client):
            return await refuse(send, 429, "too many requests of this client in a minute", {"retry-after": "10"})
        if self._here >= self._most:
            return await refuse(send, 503, "too many requests at once", {"retry-after": "1"})
        headers = dict(scope["headers"])
        # A request with neither header has no body.
        unsaid = str(self._body_bytes).encode() if b"transfer-encoding" in headers else b"0"
        said = headers.get(b"content-length", unsaid)
        if not said.isdigit() or len(said) > _DIGITS or int(said) > self._body_bytes:
            return await refuse(send, 413, f"a body has at most {self._body_bytes} bytes")
        room = int(said)
        if self._held + room > HELD * self._body_bytes:
            return await refuse(send, 503, "too much at once", {"retry-after": "1"})
        self._here, self._held = self._here + 1, self._held + room
        try:
            body = await self._body(room, receive, send)  # a client that is slow takes nobody's turn
            if body is not None:
                scope["consilium.client"] = client
                answer: list[Message] = []
                async with self._turn:
                    await self._app(scope, _once(body), _into(answer))
                await _give(answer, send)  # nor does one that is slow to take its answer
        finally:
            self._here, self._held = self._here - 1, self._held - room
        return None

    def _client(self, scope: Scope) -> str | None:
        """Name of the client that asks, or None."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        if kind.lower() == b"bearer":
            mine, found = hashlib.sha256(token.strip()).hexdigest(), None
            for name, digest in self._tokens().items():
                if hmac.compare_digest(digest, mine):
                    found = name
            return found
        return "a client's certificate" if self._certificates else None

    def _may_ask(self, client: str) -> bool:
        now = self._clock()
        left, when = self._left.get(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - when) * self._per_minute / 60)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        return left >= 1

    async def _body(self, room: int, receive: Receive, send: Send) -> bytes | None:
        """The whole body, of at most ``room`` bytes; None where it was refused."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > room:
                        await refuse(send, 413, f"a body has at most {room} bytes here")
                        return None
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            await refuse(send, 408, f"the body did not come within {BODY_SECONDS:g} seconds")
            return None


def _into(answer: list[Message]) -> Send:
    async def keep(message: Message) -> None:
        answer.append(message)

    return keep


async def _give(answer: list[Message], send: Send) -> None:
    """Send an answer; whoever does not take it in time gets no more of it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            for message in answer:
                await send(message)


async def refuse(send: Send, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
    """Send an answer that says why there is none."""
    body = json.dumps({"error": {"status": status, "message": why}}).encode()
    own = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _once(body: bytes) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    return receive
