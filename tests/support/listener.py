"""A server with the federation's certificate, to which the site's invitation points."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from consilium_client.site import Home

Reply = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str]]]
"""By a request: status and headers of its answer, which has no body."""


@contextmanager
def listening(coordinator: Any, monkeypatch: pytest.MonkeyPatch, reply: Reply) -> Iterator[None]:
    """Let the coordinator's address be one where requests are answered so, over TLS."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers = reply(self)
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        do_POST = do_GET  # noqa: N815  (http.server's names)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context, keys = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), coordinator.home.keys
    context.load_cert_chain(keys / "superlink.crt", keys / "superlink.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    there = coordinator.site.invitation().model_copy(update={"port": server.server_port})
    monkeypatch.setattr(Home, "invitation", lambda _: there)
    yield
    server.shutdown()
    server.server_close()
