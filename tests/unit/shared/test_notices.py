"""What happens is told once, also over a restart, to whom IT names; whoever cannot be reached holds nothing up."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from consilium_shared.process import notices
from consilium_shared.process.notices import Condition, Mail, Notice, Notify, Watch, Watcher, send

AWAY = Condition("site-away", "south is away", 120.0, ("site-back", "south is back"))
NOTICE = Notice("site-away", "cardiology", "south is away")


def test_what_is_so_is_told_once_after_its_time_and_again_when_it_is_over(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "told.json")
    assert watch.look({}, 0.0) == []
    assert watch.look({"away:south": AWAY}, 1000.0) == []
    assert watch.look({}, 1050.0) == []  # a restart: nobody was told, nobody is
    assert watch.look({"away:south": AWAY}, 2000.0) == []
    assert watch.look({"away:south": AWAY}, 2121.0) == [AWAY]
    watch = Watch(tmp_path / "told.json")
    assert watch.look({"away:south": AWAY}, 9000.0) == []
    assert watch.look({}, 9001.0) == [Condition("site-back", "south is back")]
    assert Watch(tmp_path / "told.json").look({}, 9002.0) == []


def test_the_first_look_tells_nothing_of_what_was_so_before_anybody_was_named(tmp_path: Path) -> None:
    ended = Condition("study-ended", "study one finished")
    watch = Watch(tmp_path / "told.json")
    assert watch.look({"ended:one": ended}, 0.0) == []
    assert watch.look({"ended:one": ended, "ended:two": ended}, 1.0) == [ended]


def test_a_damaged_file_of_what_was_told_tells_nothing_twice_and_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "told.json").write_bytes(b"[")
    assert Watch(tmp_path / "told.json").look({"away:south": AWAY}, 1.0) == []
    assert json.loads((tmp_path / "told.json").read_bytes())


@pytest.fixture(autouse=True)
def nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_UNDER_WAY", {})


@pytest.fixture
def posted() -> Any:
    """(port, bodies) of a web server."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port, bodies
    server.shutdown()
    server.server_close()


def mailbox() -> tuple[int, list[str]]:
    """(port, lines that it was told) of a mail server that takes one message."""
    listener, lines = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as file:
            file.write(b"220 here\r\n")
            file.flush()
            text = False
            for line in file:
                said = line.decode().strip()
                lines.append(said)
                text = said.upper() == "DATA" or (text and said != ".")
                if not text or said.upper() == "DATA":
                    file.write({"DATA": b"354 go on\r\n", "QUIT": b"221 bye\r\n"}.get(said.upper(), b"250 ok\r\n"))
                    file.flush()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1], lines


def test_a_command_a_web_address_and_a_mailbox_get_the_notice(tmp_path: Path, posted: Any) -> None:
    file, said = tmp_path / "notice", list[str]()
    write = f"import sys; open({str(file)!r}, 'w').write(sys.stdin.read())"
    port, lines = mailbox()
    mail = Mail(to=["it@hospital"], sender="consilium@hospital", server="127.0.0.1", port=port)
    web = f"http://127.0.0.1:{posted[0]}/hook"
    send(NOTICE, Notify(command=[sys.executable, "-c", write], webhook=web, mail=mail), said.append)
    assert said == []
    assert json.loads(file.read_text()) == {"kind": "site-away", "who": "cardiology", "text": "south is away"}
    assert posted[1] == [{"kind": "site-away", "who": "cardiology", "text": "cardiology: south is away"}]
    assert "Subject: Consilium, cardiology: site-away" in lines and "south is away" in lines


def test_who_cannot_be_reached_is_said_and_the_others_get_it(tmp_path: Path, posted: Any) -> None:
    said: list[str] = []
    nobody = Mail(to=["it@hospital"], sender="consilium@hospital", server="127.0.0.1", port=1)
    web = f"http://127.0.0.1:{posted[0]}/hook"
    send(NOTICE, Notify(command=["/no/such/program"], webhook=web, mail=nobody), said.append)
    assert [line.split(":")[0].split(".")[-1] for line in said] == ["command", "mail"]
    assert len(posted[1]) == 1


def drip(connection: socket.socket) -> None:
    """One byte of an answer without end, again and again."""
    with contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)


@pytest.fixture
def odd_server() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """Starts a server that says what a function says; its port."""
    listeners: list[socket.socket] = []

    def start(say: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                say(connection)

        threading.Thread(target=serve, daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("said", [b"\x1b[2J what?\r\n\r\n", b"HTTP/1.1 503 \x1b[2J\r\n\r\n", b""])
def test_a_web_server_that_speaks_no_http_or_refuses_is_said_in_our_words(odd_server: Any, said: bytes) -> None:
    heard: list[str] = []
    port = odd_server(lambda connection: connection.sendall(said))
    send(NOTICE, Notify(webhook=f"http://127.0.0.1:{port}/T0KEN"), heard.append)
    (line,) = heard
    assert line.isprintable() and "notify.webhook" in line and "T0KEN" not in line


@pytest.mark.parametrize("address", ["http://127.0.0.1:T0KEN/", "http://127.0.0.1:9/T0KEN\x7f", "http://T0KEN..x/"])
def test_an_address_that_is_none_is_said_without_what_is_secret_in_it(address: str) -> None:
    heard: list[str] = []
    send(NOTICE, Notify(webhook=address), heard.append)
    (line,) = heard
    assert "notify.webhook" in line and "T0KEN" not in line


def test_a_server_that_answers_for_ever_holds_up_neither_the_others_nor_what_comes_later(
    odd_server: Any, posted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "SECONDS", 0.2)
    heard: list[str] = []
    port, lines = mailbox()
    mail = Mail(to=["it@hospital"], sender="consilium@hospital", server="127.0.0.1", port=port)
    send(NOTICE, Notify(webhook=f"http://127.0.0.1:{odd_server(drip)}/", mail=mail), heard.append)
    send(NOTICE, Notify(webhook=f"http://127.0.0.1:{posted[0]}/"), heard.append)
    assert [line.rpartition(": ")[2] for line in heard] == [
        "no end within 0.2 s",
        "an earlier notice still waits for its end",
    ]
    assert "south is away" in lines


def test_a_command_that_does_not_end_is_ended_and_its_arguments_stay_out_of_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notices, "SECONDS", 0.2)
    heard: list[str] = []
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)", "--token", "T0KEN", "$(touch /tmp/x)"]
    send(NOTICE, Notify(command=sleeper), heard.append)
    assert heard and all("T0KEN" not in line and "no end within" in line for line in heard)


def test_a_watcher_looks_and_sends(tmp_path: Path, posted: Any) -> None:
    now: dict[str, Condition] = {}
    to = Notify(webhook=f"http://127.0.0.1:{posted[0]}/hook")
    watcher = Watcher("cardiology", to, Watch(tmp_path / "told.json"), lambda: now, print)
    watcher.once()
    now["study"] = Condition("proposal", "study one waits")
    watcher.once()
    watcher.once()
    assert [body["kind"] for body in posted[1]] == ["proposal"]


@pytest.mark.parametrize(
    "wrong",
    [{}, {"webhook": "file:///etc/passwd"}, {"mail": {"to": ["a b@c"], "sender": "x@y", "server": "m"}}],
)
def test_settings_that_name_nobody_or_no_address_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Notify.model_validate(wrong)
