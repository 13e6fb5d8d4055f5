"""What happens is told once, also over a restart, to whom IT names; whoever cannot be reached holds nothing up."""

from __future__ import annotations

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

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
