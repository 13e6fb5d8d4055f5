"""A site with an intake, and archives beside it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.intake.archives import KINDS, Archive, free_port

from consilium_client.intake.inbox import Inbox
from consilium_client.intake.settings import Limits


class Site:
    """A site's home, and its programs as processes."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, free_port()
        self.settings: dict[str, Any] = {
            "receive": {
                "host": "127.0.0.1",
                "port": self.port,
                "peers": [{"ae_title": Archive.title, "addresses": ["127.0.0.0/8"]}],
            },
            "limits": {"keep_free_gib": 0.01},
        }
        self.policy: dict[str, Any] = {"budgets": {}}
        self.assets: dict[str, Any] = {}
        self._running: list[subprocess.Popen[bytes]] = []

    def write(self) -> None:
        self.root.mkdir(exist_ok=True)
        content = {"site": "hospital-a", "assets": self.assets, "policy": self.policy, "intake": self.settings}
        (self.root / "site.yaml").write_text(yaml.safe_dump(content))

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        self.write()
        with (self.root / "out").open("ab") as out:
            running = subprocess.Popen(
                [sys.executable, "-m", "consilium_client.commands.cli", *command, "--home", str(self.root)],
                stdout=out,
                stderr=out,
            )
        self._running.append(running)
        return running

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        self.write()
        return subprocess.run(
            [sys.executable, "-m", "consilium_client.commands.cli", *command, "--home", str(self.root)],
            capture_output=True,
            text=True,
            timeout=300,
        )

    def receive(self) -> subprocess.Popen[bytes]:
        """The receiver as a process; comes back when it listens."""
        running = self.start("receive")
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert running.poll() is None, (self.root / "out").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return running
            time.sleep(0.05)
        raise AssertionError((self.root / "out").read_text())

    def said(self) -> str:
        return (self.root / "out").read_text()

    def inbox(self) -> Inbox:
        return Inbox(self.root / "intake" / "inbox", Limits())

    def kill(self) -> None:
        for running in self._running:
            with contextlib.suppress(ProcessLookupError):
                running.send_signal(signal.SIGKILL)
            running.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "site")
    yield made
    made.kill()


@pytest.fixture
def archive_of(tmp_path: Path, site: Site) -> Iterator[Callable[..., Archive]]:
    made: list[Archive] = []

    def make(kind: str, **more: Any) -> Archive:
        made.append(Archive(kind, tmp_path / f"archive-{len(made)}", site.port, **more))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(params=KINDS)
def archive(request: pytest.FixtureRequest, archive_of: Callable[..., Archive]) -> Archive:
    return archive_of(request.param)
