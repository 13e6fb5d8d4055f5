"""A whole federation on one machine: every program real, each started as its user would start it.

Imports none of them. Used by the demonstration and by the federation tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

START_SECONDS = 120.0


class LocalFederationError(Exception):
    """A program of the federation did not do what it was told; the text has its output."""


def free_ports(count: int) -> list[int]:
    """Find ``count`` different loopback ports that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@dataclass
class LocalFederation:
    """A coordinator and its sites under one folder.

    Attributes:
        root: gets ``server/`` and ``sites/<name>/``.
        sites: site name to the text of its site.yaml.
        listen: address of the fleet interface; the others are on loopback whatever stands here.
        address: what the sites dial.
        say: told each command as a user would type it; None for silence.
        prefixes: service (``server`` or a site) to the words before its ``up``, such as ``ip netns exec NAME``, which
            must replace themselves by the command.
    """

    root: Path
    sites: Mapping[str, str]
    name: str = "local-federation"
    listen: str = "127.0.0.1"
    address: str = "127.0.0.1"
    say: Callable[[str], None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    prefixes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    services: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The coordinator's home."""
        return self.root / "server"

    def site(self, name: str) -> Path:
        """A site's home."""
        return self.root / "sites" / name

    # -- commands

    def command(self, program: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run consilium-server or consilium-site to its end and return what it printed.

        Raises:
            LocalFederationError: with ``check``, when the exit status is not 0.
        """
        words = [str(word) for word in arguments]
        if self.say is not None:
            self.say(f"$ {program} {' '.join(_short(word, self.root) for word in words)}")
        done = subprocess.run(
            [*_program(program), *words], capture_output=True, text=True, env=self._environment(), check=False
        )
        if check and done.returncode != 0:
            raise LocalFederationError(
                f"{program} {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def at_server(self, command: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the coordinator."""
        return self.command("consilium-server", command, "--home", self.server, *arguments, check=check)

    def at_site(
        self, site: str, command: str, *arguments: str | Path, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command of one site's IT."""
        words = command.split()
        return self.command("consilium-site", *words, "--home", self.site(site), *arguments, check=check)

    def json_at_site(self, site: str, command: str, *arguments: str | Path) -> Any:
        """A command's ``--json`` output."""
        return json.loads(self.at_site(site, command, "--json", *arguments).stdout)

    def status(self) -> dict[str, Any]:
        """``consilium-server status --json``."""
        found: dict[str, Any] = json.loads(self.at_server("status", "--json").stdout)
        return found

    # -- setting up

    def provision(self, admitted: Sequence[str] | None = None) -> None:
        """Provision, enroll every site, write every site.yaml, admit the requests (all by default)."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / "federation.yaml"
        if not file.exists():
            port, private = free_ports(2)
            file.write_text(
                f"federation: {self.name}\naddress: {self.address}\nport: {port}\nprivate_port: {private}\n"
                f"listen: {self.listen}\nsites: [{', '.join(self.sites)}]\n"
            )
        self.at_server("provision", file)
        for name, config in self.sites.items():
            self.at_site(name, "enroll", self.server / "invitations" / f"{name}.json")
            (self.site(name) / "site.yaml").write_text(config)
        chosen = self.sites if admitted is None else admitted
        self.at_server("admit", *(self.site(name) / "join-request.json" for name in chosen))

    def up(self, *names: str) -> None:
        """Start ``server`` and the sites (all of them by default) and wait until each serves."""
        for name in names or ("server", *self.sites):
            home = self.server if name == "server" else self.site(name)
            program = "consilium-server" if name == "server" else "consilium-site"
            if self.say is not None:
                self.say(f"$ {program} up --home {_short(str(home), self.root)} &")
            (home / "log").mkdir(parents=True, exist_ok=True)
            with (home / "log" / "up.log").open("ab") as log:
                self.services[name] = subprocess.Popen(
                    [*self.prefixes.get(name, ()), *_program(program), "up", "--home", str(home)],
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                )
            if name == "server":
                self.wait(lambda: self._listens() and self.status()["up"], "the server listens")
        for name in names or self.sites:
            if name != "server":
                socket_file = self.site(name) / "run" / "admin.sock"
                self.wait(socket_file.exists, f"the agent of {name} serves", name)

    def down(self, *names: str) -> None:
        """Stop services (all by default) as Ctrl-C would."""
        chosen = [name for name in names or tuple(reversed(self.services)) if name in self.services]
        for name in chosen:
            self.services[name].send_signal(signal.SIGTERM)
        for name in chosen:
            try:
                self.services.pop(name).wait(timeout=40)
            except subprocess.TimeoutExpired as error:
                raise LocalFederationError(f"{name} does not stop") from error

    def approve(self, study: str, sites: Sequence[str] = (), by: str = "demonstration") -> None:
        """Wait until the study is pending at each site, then approve it there."""
        for site in sites or self.sites:
            self.wait(partial(self.standing, site, study), f"{site} hears of {study}", site)
            if self.standing(site, study) == "pending":
                self.at_site(site, "approve", study, "--yes", "--by", by)

    def standing(self, site: str, study: str) -> str | None:
        """``pending``, ``approved``, ``rejected``, ``refused``, or None when the site does not know the study."""
        done = self.at_site(site, "studies", "--json", check=False)
        if done.returncode != 0:
            return None
        return next((entry["state"] for entry in json.loads(done.stdout) if entry["study"] == study), None)

    # -- looking

    def wait(
        self, look: Callable[[], Any], what: str, service: str | None = None, seconds: float = START_SECONDS
    ) -> Any:
        """Wait until ``look`` returns something true.

        Raises:
            LocalFederationError: time is up, or the service ended; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            say, self.say = self.say, None
            try:
                found = look()
            finally:
                self.say = say
            if found:
                return found
            if service in self.services and self.services[service].poll() is not None:
                break
            time.sleep(0.3)
        raise LocalFederationError(f"waited in vain until {what}\n{self.logs(service)}")

    def logs(self, service: str | None) -> str:
        """The ends of the logs of a service's programs."""
        if service is None:
            return ""
        folder = (self.server if service == "server" else self.site(service)) / "log"
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in folder.glob("*.log")
        )

    def events(self, study: str) -> list[dict[str, Any]]:
        """The study's events so far; one that is being written is not there yet."""
        file = self.server / "studies" / study / "events.jsonl"
        written = file.read_bytes() if file.exists() else b""
        return [json.loads(line) for line in written[: written.rfind(b"\n") + 1].splitlines() if line.strip()]

    def state(self, study: str) -> str:
        """The study's state by its events (cheaper to ask often than ``status``)."""
        return next((e["state"] for e in reversed(self.events(study)) if e["event"] == "state"), "unknown")

    def closed(self, study: str) -> list[dict[str, Any]]:
        """The ``closed`` events so far, one for each finished round."""
        return [event for event in self.events(study) if event["event"] == "closed"]

    def pid(self, service: str, program: str) -> int:
        """Process id of one supervised program, by its command line.

        Raises:
            LocalFederationError: it does not run.
        """
        for pid, words in self.processes(service).items():
            if program in words and pid != self.services[service].pid:
                return pid
        raise LocalFederationError(f"{program} of {service} does not run\n{self.logs(service)}")

    def processes(self, service: str) -> dict[int, list[str]]:
        """Process id to command line of a service: its ``up`` and every program below it."""
        parents: dict[int, int] = {}
        words: dict[int, list[str]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            words[int(entry.name)] = command
        found = [self.services[service].pid]
        for pid in found:  # grows while it is read
            found += [child for child, parent in parents.items() if parent == pid]
        return {pid: words[pid] for pid in found if pid in words}

    def kill(self, service: str, program: str | None = None) -> None:
        """``kill -9`` of one supervised program by its module name, or of the whole ``up`` (which nobody restarts)."""
        if program is not None:
            os.kill(self.pid(service, program), signal.SIGKILL)
            return
        gone = self.services.pop(service)
        gone.kill()
        gone.wait()

    def _listens(self) -> bool:
        text = (self.root / "federation.yaml").read_text()
        port = next(int(line.split(":")[1]) for line in text.splitlines() if line.startswith("port:"))
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((self.address, port)) == 0

    def _environment(self) -> dict[str, str]:
        # Sites that share a machine would otherwise each start as many threads as it has cores.
        return {**os.environ, "COLUMNS": "150", "OMP_NUM_THREADS": "1", **self.environment}

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


def _program(name: str) -> list[str]:
    module = {"consilium-server": "consilium_server.commands.cli", "consilium-site": "consilium_client.commands.cli"}[
        name
    ]
    return [sys.executable, "-m", module]


def _short(word: str, root: Path) -> str:
    return word.replace(str(root), ".").removeprefix("./") if word.startswith(str(root)) else word
