"""Long polling over Flower's interface: an answer that has nothing is held back until there is something to ask for.

Whoever looks for work says in a header how long it would wait. The application answers first, with all its checks: only
an empty answer to a request that it accepted is held, until its bell rings, the asker is gone, or the time is over.
Then that same empty answer goes out, marked, and the asker looks again at once. So no request is made a second time on
somebody's behalf, none is held that was not authenticated, and no message is in a connection that breaks meanwhile.

    asker ──request, waits: 25──► Holding ──► application: nothing
                                     │  … a message is stored, the bell rings …
    asker ◄──nothing, waited────────╯
    asker ──request, waits: 25──► Holding ──► application: the message

Both ends stand here and know nothing of Flower: ASGI at the one, an interceptor of an httpx client at the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

WAITS = "consilium-waits"
"""Header of a request: seconds for which its sender would wait. Of an answer: that it was held back."""
LONGEST_SECONDS = 25.0
"""Seconds for which an answer is held. Flower's clients give one up after 30 s, and proxies cut after 30 to 60."""
LEAST_SECONDS = 1.0
"""Seconds to which an asker shortens its waiting where something on the way cuts connections that are silent."""

Key = Callable[[Any], Hashable]
"""Name, by an ASGI scope, of the bell that ends the waiting."""


class Holding:
    """ASGI wrapper that holds back empty answers on some paths."""

    def __init__(self, app: Any, keys: Mapping[str, Key]) -> None:
        """``keys``: path on which empty answers are held, to what names the bell of a request there."""
        self._app, self._keys = app, keys
        self._waiting: dict[Hashable, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        key = self._keys.get(scope["path"]) if scope["type"] == "http" else None
        wanted = _seconds(scope) if key is not None else 0.0
        if key is None or not wanted or not self._open:
            await self._app(scope, receive, send)
            return
        self._loop = asyncio.get_running_loop()
        # Before the application looks: what is stored between its look and the waiting rings this bell already.
        name, bell = key(scope), asyncio.Event()
        self._waiting.setdefault(name, set()).add(bell)
        answer: list[Any] = []

        async def keep(message: Any) -> None:
            answer.append(message)

        try:
            await self._app(scope, receive, keep)
            if answer[0]["status"] == 200 and not any(message.get("body") for message in answer):
                await _first_of(bell.wait(), receive(), seconds=wanted)
                answer[0]["headers"] = [*answer[0]["headers"], (WAITS.encode(), b"held")]
        finally:
            self._waiting[name].discard(bell)
            if not self._waiting[name]:
                del self._waiting[name]
        for message in answer:
            await send(message)

    def ring(self, *names: Hashable) -> None:
        """End the waiting of these; of everybody, without names. From any thread, at any time."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ring, names)

    def stop(self) -> None:
        """Hold nothing any more; in the loop's own thread, when the servers end."""
        self._open = False
        self._ring(())

    def _ring(self, names: tuple[Hashable, ...]) -> None:
        for name in names or tuple(self._waiting):
            for bell in self._waiting.get(name, ()):
                bell.set()


class Waits:
    """Interceptor of Flower's clients: asks for one path's answers to be held back, and notes whether one was.

    Where a connection breaks while an answer is held, as a proxy breaks one that is silent for too long, the next are
    held for a shorter time; and for a longer one again after each that was held to its end.
    """

    def __init__(self, path: str, seconds: float = LONGEST_SECONDS) -> None:
        """``seconds``: for which an answer may be held; 0 for not at all. May be set anew before each request."""
        self._path = path
        self.seconds, self._bearable, self.held = seconds, LONGEST_SECONDS, False

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Send one request."""
        if context.request.url.path != self._path:
            return call_next(context)
        self.held = False
        seconds = min(self.seconds, self._bearable)
        if not seconds:
            return call_next(context)
        context.request.headers[WAITS] = f"{seconds:.3f}"
        began = time.monotonic()
        try:
            answer = call_next(context)
        except Exception:
            waited = time.monotonic() - began
            if waited > LEAST_SECONDS:
                self._bearable = max(LEAST_SECONDS, min(waited, seconds) * 0.8)
            raise
        self.held = WAITS in answer.headers
        if self.held and time.monotonic() - began >= self._bearable:
            self._bearable = min(LONGEST_SECONDS, self._bearable * 1.1)
        return answer


def _seconds(scope: Any) -> float:
    """Seconds that the asker would wait, within our own bound; 0 where it says nothing of use."""
    said = dict(scope["headers"]).get(WAITS.encode(), b"")
    try:
        seconds = float(said[:16])
    except ValueError:
        return 0.0
    return min(seconds, LONGEST_SECONDS) if seconds > 0 else 0.0


async def _first_of(*work: Any, seconds: float) -> None:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
