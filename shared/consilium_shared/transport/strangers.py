"""Connections of strangers to a listener: few at a time, and none for long.

Leans on uvicorn's ``H11Protocol``, whose ``app_state`` comes with each request's scope, and which bounds a request's
head (``httptools`` does not).
"""

from __future__ import annotations

import asyncio
from typing import Any


class Strangers:
    """Connections that belong to nobody known as yet, the oldest first."""

    def __init__(self, most: int, seconds: float) -> None:
        """``most``: connections at a time; one more, and the oldest is closed. ``seconds``: after which each is."""
        self._most, self._seconds = most, seconds
        self._connections: dict[Any, asyncio.TimerHandle] = {}

    def enter(self, connection: Any) -> None:
        """Let a connection's time run; the oldest gives way to it."""
        loop = asyncio.get_running_loop()
        self._connections[connection] = loop.call_later(self._seconds, self._close, connection)
        if len(self._connections) > self._most:
            self._close(next(iter(self._connections)))

    def leave(self, connection: Any) -> None:
        """Forget a connection, which belongs to somebody known, or is gone."""
        timer = self._connections.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _close(self, connection: Any) -> None:
        self.leave(connection)
        connection.transport.abort()

    def protocol(self) -> type[asyncio.Protocol]:
        """Uvicorn's class for connections, told to this one; ``known`` in a scope's state is a call that leaves."""
        from uvicorn.protocols.http.h11_impl import H11Protocol

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
