"""Memory of large messages, given back when they are done with.

A request and its answer hold each other, in the HTTP libraries of both ends, so Python frees them when it next looks
for such circles: after some number of objects, whatever they hold. Two dozen pieces of 5 MiB would wait for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

LARGE_BYTES = 1 << 20


class Served:
    """ASGI wrapper that frees what a large request or answer has left."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        size = 0

        async def received() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message

        async def sent(message: Any) -> None:
            nonlocal size
            size += len(message.get("body", b""))
            await send(message)

        await self._app(scope, received, sent)
        if size >= LARGE_BYTES:
            gc.collect(1)


class Asked:
    """Interceptor of Flower's clients that frees, before the next request, what a large one has left."""

    def __init__(self) -> None:
        self._left = 0

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Send one request."""
        if self._left >= LARGE_BYTES:
            gc.collect(1)
        answer = call_next(context)
        self._left = len(context.request.content) + len(answer.content)
        return answer
