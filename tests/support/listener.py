"""A server with the federation's certificate, to which the site's invitation points; and a proxy on the way to it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from consilium_client.site import Home

Reply = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str]] | tuple[int, dict[str, str], bytes]]
"""By a request: status and headers of its answer, and its body where it has one."""


@contextmanager
def serving(keys: Path, reply: Reply) -> Iterator[int]:
    """Port of a server with the certificate of a folder of keys, which answers requests so, over TLS."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, *rest = reply(self)
            body = rest[0] if rest else b""
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815  (http.server's names)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(HTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # whoever does not trust the certificate hangs up

    server = Quiet(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "superlink.crt", keys / "superlink.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def listening(coordinator: Any, monkeypatch: pytest.MonkeyPatch, reply: Reply) -> Iterator[None]:
    """Let the coordinator's address be one where requests are answered so, over TLS."""
    with serving(coordinator.home.keys, reply) as port:
        there = coordinator.site.invitation().model_copy(update={"port": port})
        monkeypatch.setattr(Home, "invitation", lambda _: there)
        yield


@contextmanager
def proxying(status: int, heads: list[bytes]) -> Iterator[int]:
    """Port of an HTTP proxy that answers CONNECT with a status, and connects with 200. ``heads``: what it was asked."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def connect(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head and (more := client.recv(4096)):
            head += more
        heads.append(head)
        client.sendall(b"HTTP/1.1 %d as told\r\n\r\n" % status)
        if status != 200:
            client.close()
            return
        host, _, port = head.split()[1].decode().rpartition(":")
        server = socket.create_connection((host, int(port)))
        threading.Thread(target=pump, args=(server, client), daemon=True).start()
        pump(client, server)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=connect, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
