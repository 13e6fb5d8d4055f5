"""Connections of the service: who has shown no token or certificate holds few of them, and none for long.

Leans on uvicorn's ``H11Protocol``, whose ``app_state`` comes with each request's scope, and which bounds a request's
head (``httptools`` does not).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

AT_ONCE = 256
"""Connections of everybody; one more is told to come again."""
STRANGERS = 128
"""Connections without a request that passed the guard; one more, and the oldest of them is closed."""
STRANGER_SECONDS = 30.0
"""After which a connection without a request that passed the guard is closed."""


class Connections:
    """Connections that belong to nobody known as yet, the oldest first."""

    def __init__(self) -> None:
        self._strangers: dict[Any, asyncio.TimerHandle] = {}

    def enter(self, connection: Any) -> None:
        """Let a connection's time run; the oldest gives way to it."""
        loop = asyncio.get_running_loop()
        self._strangers[connection] = loop.call_later(STRANGER_SECONDS, self._close, connection)
        if len(self._strangers) > STRANGERS:
            self._close(next(iter(self._strangers)))

    def leave(self, connection: Any) -> None:
        """Forget a connection, which belongs to somebody known, or is gone."""
        timer = self._strangers.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _close(self, connection: Any) -> None:
        self.leave(connection)
        connection.transport.abort()

    def protocol(self) -> type[asyncio.Protocol]:
        """Uvicorn's class for connections, told to this one; ``known`` in a scope's state is a call that leaves."""
        outer = self

        class Connection(H11Protocol):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                self.app_state = {**self.app_state, "known": lambda: outer.leave(self)}

            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                outer.enter(self)

            def connection_lost(self, exc: Exception | None) -> None:
                outer.leave(self)
                super().connection_lost(exc)

        return Connection
