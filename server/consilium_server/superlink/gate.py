"""Gate of the SuperLink's HTTP listeners: which paths each answers, and how little of a stranger's request is read.

A SuperNode signs the time in its requests' headers. The public listener checks that signature before it reads a body,
so that whoever has no registered key is answered from the headers alone and keeps nothing in this process's memory.
Flower's own check, which also looks at who the body speaks for, comes after this one; only the signature that was
verified here is not verified again (``economy.py``).

Leans on these internals of flwr 1.41 (pinned): the names of the headers and their tolerances; the routes under
``/v1/fleet/``, all of which are signed; ``LinkState.get_node_id_by_public_key``.
"""

from __future__ import annotations

import asyncio
import binascii
import datetime
import json
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from typing import Any

from consilium_server.superlink.economy import PASSED, Passed
from consilium_server.superlink.presence import Presences
from consilium_shared.protocol.version import about
from consilium_shared.transport.strangers import Strangers

RELEASE = b"consilium-release"
"""Header in which a SuperNode of ours says its release."""
ABOUT_PATH = "/v1/fleet/consilium-doctor"
"""Asked by a site's doctor; answered by the release, and the formats that it speaks."""
REQUEST_BYTES = 8 * 1024**2
"""Largest request of a site: Flower cuts arrays into pieces of 5 MiB, everything else is far smaller."""
REQUESTS_OF_A_SITE = 16
"""Most requests of one site at a time. A SuperNode sends 8 pieces at a time, and little else."""
BODY_SECONDS = 600.0
"""Seconds for the whole body of a site's request: 5 MiB in that time are 70 kbit/s."""
DISCARDED_BYTES = 64 * 1024
"""Longest unread body that is read and dropped after the answer; with a longer one the connection is closed."""
STRANGERS = 256
"""Most connections without any signed request; one more, and the oldest of them is closed."""
STRANGER_SECONDS = 30.0
"""Seconds after which a connection without any signed request is closed."""


class OnlyPaths:
    """ASGI wrapper: 404 for every path outside ``prefixes``; keeps the exception that ended the application's start."""

    def __init__(self, app: Any, prefixes: tuple[str, ...]) -> None:
        self._app = app
        self._prefixes = prefixes
        self.failure: Exception | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            except Exception as error:
                self.failure = error
                raise
        elif scope["type"] == "http":
            path: str = scope["path"]
            if any(path == each or (each.endswith("/") and path.startswith(each)) for each in self._prefixes):
                await self._app(scope, receive, send)
            else:
                await _answer(scope, send, 404)


class SignedOnly:
    """ASGI wrapper: a body is read for a registered SuperNode alone, of bounded size, in bounded time."""

    def __init__(self, app: Any, node_of: Callable[[bytes], int | None], presences: Presences | None = None) -> None:
        """Wraps an application.

        Args:
            app: what answers requests that pass; finds the SuperNode's id as ``node`` in the state of the scope.
            node_of: the id of the SuperNode with a public key (PEM), or None; may block, and is called in a thread.
            presences: told who was heard, and whose clock was refused.
        """
        self._app = app
        self._node_of = node_of
        self._presences = presences
        self._under_way: Counter[bytes] = Counter()
        self.strangers = Strangers(STRANGERS, STRANGER_SECONDS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request from its head alone, or read it and hand it on."""
        if scope["type"] != "http":
            return
        # ``Strangers`` put it there: called, it takes this connection off the list of strangers.
        known = scope["state"].pop("known", lambda: None)
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        # Without a declared length a body could grow in memory before anyone counts it.
        if b"transfer-encoding" in headers or not declared.isdigit():
            await _answer(scope, send, 411)
        elif int(declared[:20]) > REQUEST_BYTES:
            await _answer(scope, send, 413)
        elif not scope["path"].startswith("/v1/fleet/"):
            if int(declared):
                await _answer(scope, send, 413)
            else:
                await self._app(scope, receive, send)
        else:
            key, ahead = stamped(headers, datetime.datetime.now(datetime.UTC))
            node = None if key is None else await _in_thread(self._node_of, key)
            if key is None or node is None or not _in_time(ahead):
                if key is not None and node is not None and self._presences is not None:
                    self._presences.refused(key, ahead)
                await _answer(scope, send, 401)
                return
            known()
            if self._presences is not None:
                self._presences.taken(key, headers.get(RELEASE))
            if scope["path"] == ABOUT_PATH:
                await _answer(scope, send, 200, json.dumps(about()).encode())
                return
            scope["state"]["node"] = node
            PASSED.set(Passed(key, *_signed(headers)))
            await self._pass(key, scope, receive, send)

    async def _pass(self, key: bytes, scope: Any, receive: Any, send: Any) -> None:
        if self._under_way[key] >= REQUESTS_OF_A_SITE:
            await _answer(scope, send, 429)
            return
        self._under_way[key] += 1
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await _whole(receive)
            except TimeoutError:
                await _answer(scope, send, 408)
                return
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        finally:
            self._under_way[key] -= 1
            if not self._under_way[key]:
                del self._under_way[key]


def signer(headers: dict[bytes, bytes], now: datetime.datetime) -> bytes | None:
    """The public key (PEM) with which a request's time is signed; None where it is not, or is not of ``now``."""
    key, ahead = stamped(headers, now)
    return key if _in_time(ahead) else None


def _in_time(ahead: float) -> bool:
    """True for a time that Flower takes, so many seconds ahead of ours."""
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    return -SYSTEM_TIME_TOLERANCE < -ahead < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE


def stamped(headers: dict[bytes, bytes], now: datetime.datetime) -> tuple[bytes | None, float]:
    """The public key (PEM) with which a request's time is signed, None where it is not; seconds of it after ``now``."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    try:
        key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        stamp, signature = _signed(headers)
        ahead = (datetime.datetime.fromisoformat(stamp.decode("ascii")) - now).total_seconds()
        return (key if verify_signature(bytes_to_public_key(key), stamp, signature) else None), ahead
    except (KeyError, ValueError, TypeError, AttributeError, binascii.Error, UnsupportedAlgorithm):
        return None, 0.0


def _signed(headers: dict[bytes, bytes]) -> tuple[bytes, bytes]:
    """Time and signature of a request's headers. Raises KeyError or ValueError where they are missing or are none."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER

    signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
    return headers[TIMESTAMP_HEADER.encode()], signature


async def _in_thread(work: Callable[[bytes], int | None], argument: bytes) -> int | None:
    from anyio.to_thread import run_sync

    return await run_sync(work, argument)


async def _whole(receive: Any) -> bytes | None:
    """A request's body; None when its sender is gone."""
    pieces: list[bytes] = []
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        pieces.append(event.get("body", b""))
        if not event.get("more_body", False):
            return b"".join(pieces)


def _replay(body: bytes, receive: Any) -> Any:
    """ASGI's ``receive`` of a request whose body was read."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Any:
        return first.pop() if first else await receive()

    return replayed


async def _answer(scope: Any, send: Any, status: int, body: bytes = b"") -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > DISCARDED_BYTES:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
