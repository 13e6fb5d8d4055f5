"""The agent's guard in Python: no network socket is opened or used, whatever the call; Unix sockets are."""

from __future__ import annotations

import _socket
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consilium_client.transport.sandbox import _guard
from consilium_shared.errors import PolicyRefusal

ALLOWED = {"socket.gethostname"}
"""Events that ask nobody."""
MODULE = Path(getattr(_socket, "__file__", sys.executable))


def events() -> list[str]:
    """Every audit event that this Python's socket module can raise: they stand in its machine code as text."""
    found = re.findall(rb"(?<![\w.])socket\.(?:__new__|[a-z]+)(?=\0)", MODULE.read_bytes())
    return sorted({each.decode() for each in found} - {"socket.socket"})


def test_the_events_are_found() -> None:
    """Those of which the documentation says that they use the network."""
    documented = "__new__ bind connect sendto sendmsg getaddrinfo gethostbyname gethostbyaddr getnameinfo"
    assert {f"socket.{name}" for name in documented.split()} <= set(events())


@pytest.mark.parametrize("event", [each for each in events() if each not in ALLOWED])
@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "none"])
def test_every_event_is_refused_for_every_family_but_unix(event: str, family: str) -> None:
    number = getattr(_socket, family, -1)
    made = SimpleNamespace(family=number)
    arguments: tuple[Any, ...] = (made, number, 1, 0) if event == "socket.__new__" else (made, ("127.0.0.1", 1))
    with pytest.raises(PolicyRefusal, match="no network"):
        _guard(event, arguments)
    if event in ("socket.__new__", "socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg"):
        unix = SimpleNamespace(family=_socket.AF_UNIX)
        _guard(event, (unix, _socket.AF_UNIX, 1, 0) if event == "socket.__new__" else (unix, "/a/path"))


@pytest.mark.parametrize("argument", ["localhost", ("127.0.0.1", 1), b"localhost"])
def test_a_look_up_of_a_name_is_refused(argument: object) -> None:
    for event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"):
        with pytest.raises(PolicyRefusal, match="look up a name"):
            _guard(event, (argument,))


def test_other_events_are_none_of_its_business() -> None:
    for event in ("open", "import", "os.listdir", "socket.gethostname"):
        _guard(event, ())


PROCESS = """
import socket, tempfile
from consilium_client.transport.sandbox import forbid_network

before = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listening.bind(("127.0.0.1", 0))
listening.setblocking(False)
address = listening.getsockname()
forbid_network()
calls = {
    "new": lambda: socket.socket(),
    "new inet6": lambda: socket.socket(socket.AF_INET6),
    "from a descriptor": lambda: socket.socket(fileno=before.fileno()),
    "create_connection": lambda: socket.create_connection(address),
    "create_server": lambda: socket.create_server(("127.0.0.1", 0)),
    "connect": lambda: before.connect(address),
    "connect_ex": lambda: before.connect_ex(address),
    "bind": lambda: before.bind(("127.0.0.1", 0)),
    "sendto": lambda: before.sendto(b"patient", address),
    "sendmsg": lambda: before.sendmsg([b"patient"], [], 0, address),
    "getaddrinfo": lambda: socket.getaddrinfo("localhost", 1),
    "gethostbyname": lambda: socket.gethostbyname("localhost"),
    "gethostbyname_ex": lambda: socket.gethostbyname_ex("localhost"),
    "gethostbyaddr": lambda: socket.gethostbyaddr("127.0.0.1"),
    "getnameinfo": lambda: socket.getnameinfo(("127.0.0.1", 1), 0),
    "getfqdn": lambda: socket.getfqdn("127.0.0.1"),
}
for name, call in calls.items():
    try:
        call()
        print(name, "passed")
    except Exception as error:
        if type(error).__name__ != "PolicyRefusal":
            print(name, "ended otherwise:", repr(error))
try:
    print("received", listening.recv(99))
except BlockingIOError:
    pass
with tempfile.TemporaryDirectory() as folder:
    server = socket.socket(socket.AF_UNIX)
    server.bind(folder + "/s")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(folder + "/s")
    accepted, _ = server.accept()
    client.sendmsg([b"through a Unix socket"])
    assert accepted.recv(99) == b"through a Unix socket"
    socket.socketpair()
print("done")
"""


def test_a_real_process_reaches_nobody_and_keeps_its_unix_sockets() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False, timeout=100)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
