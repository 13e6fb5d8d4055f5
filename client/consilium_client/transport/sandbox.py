"""Keeping the agent off the network: an empty network namespace where the system allows it, and a guard in Python.

The agent's only channels are its two Unix sockets, which are files and need no network.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from typing import Any

from consilium_shared.errors import PolicyRefusal

_WAYS = (
    ("--net",),  # with the right to do so: root, or a container that keeps CAP_SYS_ADMIN
    ("--user", "--map-current-user", "--net"),  # without it, where user namespaces are permitted
)


def without_network() -> list[str]:
    """Words to put before a command so that it runs in a network namespace with no interface at all.

    Empty where the system does not permit it (the caller says so); unshare(1) replaces itself by the command.
    """
    tool = shutil.which("unshare")
    if tool is None or sys.platform != "linux":
        return []
    for way in _WAYS:
        words = [tool, *way, "--"]
        try:
            done = subprocess.run([*words, "true"], capture_output=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return words
    return []


def forbid_network() -> None:
    """Forbid Python code of this process to open or use a network socket from here on; cannot be undone.

    A library that tries gets a PolicyRefusal. Compiled code, and programs that are started, are held by the namespace,
    not by this.
    """
    sys.addaudithook(_guard)


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse every event of the socket module (PEP 578) that is not of a Unix socket; also those that it gets later."""
    if not event.startswith("socket.") or event == "socket.gethostname":
        return
    # A new socket has no family yet; the one that is asked for is the second argument, and without one it is AF_INET.
    family = arguments[1] if event == "socket.__new__" else getattr(arguments[0], "family", None)
    if family == socket.AF_UNIX:
        return
    what = "look up a name" if family is None else "open or use a connection"
    raise PolicyRefusal("internal", f"the agent has no network: something tried to {what} ({event})")
