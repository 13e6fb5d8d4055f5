"""Faults that are planted at a site, each with how its doctor names it: the table of docs/results/doctor.md."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support import listener

from consilium_client.commands.checks import installation, resources
from consilium_client.commands.enroll import STARTER
from consilium_client.site import Home
from consilium_server.commands import provision
from consilium_server.federation import Home as ServerHome
from consilium_server.superlink.gate import signer
from consilium_shared import findings
from consilium_shared.canonical import digest
from consilium_shared.errors import TransportError
from consilium_shared.protocol.version import about

_invitation = Home.invitation


@dataclass
class Ground:
    """A sound site and its server; what a fault changes about them."""

    home: Home
    server: ServerHome
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack
    ahead: float = 0.0
    """Seconds by which the site's clock is ahead of the server's."""
    date: str | None = None
    """The server's, as it says it; empty: none."""
    admitted: bool = True
    anybody: bool = False
    """Whether the server answers every key alike."""
    about: Any = field(default_factory=about)
    """What the server tells of itself."""
    status: dict[str, Any] | None = None
    """The running agent's; None: no programs run."""

    def begin(self) -> None:
        """Let the server answer."""
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
            self.monkeypatch.delenv(name, raising=False)
        self.monkeypatch.setattr(resources, "without_network", lambda: True)
        self.listen(self.server.keys)
        self.status = {
            "release": about()["consilium"],
            "site_yaml": digest(self.home.config_file.read_bytes()),
            "up_seconds": 5,
        }
        self.monkeypatch.setattr(installation, "ask", lambda *_: self.status)
        self.home.admin_socket.parent.mkdir(exist_ok=True)
        self.home.admin_socket.touch()

    def listen(self, keys: Path) -> None:
        """Let a server with the certificate of this folder be at the address of the invitation."""
        self.port(self.stack.enter_context(listener.serving(keys, self._reply)))

    def _reply(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        told = formatdate(time.time() - self.ahead, usegmt=True) if self.date is None else self.date
        date = {"Date": told} if told else {}
        headers = {name.lower().encode(): value.encode() for name, value in request.headers.items()}
        key = serialization.load_ssh_private_key(self.supernode.read_bytes(), None).public_key()
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        asked = request.command == "POST" and (self.anybody or signer(headers, datetime.now(UTC)) == pem)
        return (200, date, json.dumps(self.about).encode()) if asked and self.admitted else (401, date, b"")

    def port(self, port: int, address: str | None = None) -> None:
        """Let the invitation name this port, and address."""
        there = {"port": port, **({"address": address} if address else {})}
        self.monkeypatch.setattr(Home, "invitation", lambda home: _invitation(home).model_copy(update=there))

    def proxy(self, status: int, login: str = "") -> list[bytes]:
        """Let the way out be a proxy that answers so; returns what it is asked."""
        heads: list[bytes] = []
        port = self.stack.enter_context(listener.proxying(status, heads))
        self.monkeypatch.setenv("HTTPS_PROXY", f"http://{login}127.0.0.1:{port}")
        return heads

    def certificate(self, days: float = 825, address: str = "127.0.0.1", *, own_ca: bool = False) -> None:
        """Let the server have another certificate: of so many days, for this address, of a CA of its own."""
        self.monkeypatch.setattr(provision, "CERTIFICATE_DAYS", days)
        federation = self.server.federation().model_copy(update={"address": address})
        if own_ca:
            provision._make_ca(self.server, "synthetic proxy")
        if address != "127.0.0.1":
            self.monkeypatch.setattr(provision, "_names", lambda _: [address])
        provision._make_certificate(self.server, federation)
        self.listen(self.server.keys)

    def edit(self, old: str, new: str) -> None:
        """Change site.yaml, and let the agent have read that."""
        text = self.home.config_file.read_text()
        assert old in text
        self.home.config_file.write_text(text.replace(old, new))
        if self.status is not None:
            self.status["site_yaml"] = digest(self.home.config_file.read_bytes())

    @property
    def supernode(self) -> Path:
        return self.home.keys / "supernode.key"


Plant = Callable[[Ground], Any]


@dataclass(frozen=True)
class Fault:
    """A fault of a site, and the finding that names it."""

    what: str
    plant: Plant
    check: str
    words: str
    state: str = "error"


def _another_key(ground: Ground) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    ground.supernode.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def _set(**values: Any) -> Plant:
    def plant(ground: Ground) -> None:
        for name, value in values.items():
            setattr(ground, name, value)

    return plant


def _table(change: Callable[[Path], Any]) -> Plant:
    return lambda ground: change(ground.home.root / "synthetic.csv")


def _become_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _begun(ground: Ground, ledger: bytes | None) -> None:
    """Let the site have had a ledger."""
    ground.home.ledger.with_name("ledger.jsonl.lock").write_text("begun")
    if ledger is not None:
        ground.home.ledger.write_bytes(ledger)


def _forbidden(ground: Ground) -> None:
    from consilium_client.data import lines

    def forbid(path: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    ground.monkeypatch.setattr(lines, "_chunks", forbid)


def _memory(available: str, limit: str | None = None) -> Plant:
    def plant(ground: Ground) -> None:
        root = ground.home.root / "root"
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:    {available} kB\n")
        group = root / "sys/fs/cgroup/system.slice/site"
        group.mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("0::/system.slice/site\n")
        (group / "memory.max").write_text(limit or "max")
        (group / "memory.current").write_text("1000000")
        real = findings.memory
        ground.monkeypatch.setattr(findings, "memory", lambda least, enough, use: real(least, enough, use, root))

    return plant


def _disk(free: int) -> Plant:
    def plant(ground: Ground) -> None:
        usage = shutil.disk_usage(ground.home.root)._replace(free=free)
        ground.monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    return plant


def _gpu_that_torch_cannot_use(ground: Ground) -> None:
    driver = ground.home.root / "nvidia"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.1  Mon Nov 30\n")
    ground.monkeypatch.setattr(resources, "DRIVER", driver)
    ground.edit("device: cpu", "device: auto")


def _libraries(ground: Ground) -> None:
    real = findings.pinned
    ground.monkeypatch.setattr(findings, "pinned", lambda role: real(role, ['flwr==1.40.0; extra == "site"']))


def _dead_agent(ground: Ground) -> None:
    def ask(*_: Any) -> Any:
        raise TransportError("the agent closed the connection")

    ground.monkeypatch.setattr(installation, "ask", ask)


def _receiver(tls: str = "") -> Plant:
    return lambda ground: ground.edit(
        "device: cpu",
        f"device: cpu\nintake: {{receive: {{host: 127.0.0.1, port: 1, peers: [{{ae_title: PACS, addresses: "
        f"[10.0.0.1]}}]{tls}}}}}",
    )


def _taken_port(ground: Ground) -> None:
    _receiver()(ground)
    ground.edit("port: 1,", f"port: {ground.home.invitation().port},")


def _unit(line: str) -> Plant:
    def plant(ground: Ground) -> None:
        units = ground.home.root / "units"
        units.mkdir()
        (units / "consilium-site.service").write_text(f"[Service]\n{line}\n")
        ground.monkeypatch.setattr(resources, "UNITS", units)
        folder = {"ProtectHome=yes": "HIDDEN_BY_PROTECT_HOME", "PrivateTmp=yes": "HIDDEN_BY_PRIVATE_TMP"}[line]
        ground.monkeypatch.setattr(resources, folder, (str(ground.home.root),))

    return plant


def _other_account(ground: Ground) -> None:
    owner = ground.home.root.stat().st_uid
    ground.monkeypatch.setattr(os, "geteuid", lambda: owner + 4321)


def _long_path(ground: Ground) -> None:
    there = ground.home.root / ("a" * 100)
    ground.monkeypatch.setattr(Home, "agent_socket", property(lambda _: there / "agent.sock"))


def _opening_proxy(ground: Ground) -> None:
    ground.proxy(200)
    ground.certificate(own_ca=True)


def _nobody_listens(ground: Ground) -> None:
    ground.port(1)


FAULTS = (
    Fault("the doctor runs as another account than the agent", _other_account, "account", "sudo -u"),
    Fault(
        "the invitation is gone", lambda g: g.home.invitation_file.unlink(), "enrolment", "run: consilium-site enroll"
    ),
    Fault(
        "the invitation was edited",
        lambda g: g.home.invitation_file.write_bytes(g.home.invitation_file.read_bytes().replace(b"test", b"tast")),
        "enrolment",
        "was edited",
    ),
    Fault(
        "site.yaml has a key that does not exist",
        lambda g: g.edit("device:", "devise:"),
        "site.yaml",
        "'device'",
    ),
    Fault(
        "site.yaml is as enrolling wrote it",
        lambda g: g.home.config_file.write_text(STARTER.format(site="hospital-a")),
        "site.yaml",
        "name under assets: what data there is",
        "warning",
    ),
    Fault(
        "a budget is for an asset that does not exist",
        lambda g: g.edit("budgets: {synthetic-table:", "budgets: {synthetic-tabel:"),
        "site.yaml",
        "correct the name on one side",
        "warning",
    ),
    Fault("the identity key is gone", lambda g: (g.home.keys / "identity.key").unlink(), "keys", "cannot read the key"),
    Fault(
        "the identity key is readable by others",
        lambda g: (g.home.keys / "identity.key").chmod(0o644),
        "keys",
        "run: chmod 600",
    ),
    Fault("the SuperNode's key is gone", lambda g: g.supernode.unlink(), "SuperNode key", "restore keys/ from"),
    Fault("the SuperNode's key is damaged", lambda g: g.supernode.write_bytes(b"-"), "SuperNode key", "is damaged"),
    Fault("the SuperNode's key is another", _another_key, "SuperNode key", "another key than the server knows"),
    Fault(
        "the SuperNode's key is readable by others",
        lambda g: g.supernode.chmod(0o640),
        "SuperNode key",
        "run: chmod 600",
    ),
    Fault(
        "the CA's certificate is damaged",
        lambda g: (g.home.keys / "ca.crt").write_bytes(b"-"),
        "CA",
        "copy it out of invitation.json",
    ),
    Fault("the ledger is gone", lambda g: _begun(g, None), "ledger", "missing, although this site had a ledger"),
    Fault("the ledger is damaged", lambda g: _begun(g, b"{}\n"), "ledger", "the newest whole copy"),
    Fault("the home's path is too long for a socket", _long_path, "sockets", "move the home to a shorter path"),
    Fault("the data is not there", _table(Path.unlink), "asset synthetic-table", "correct the path in site.yaml"),
    Fault("the data may not be read", _forbidden, "asset synthetic-table", "Permission denied"),
    Fault("a folder is where a table is meant", _table(_become_folder), "asset synthetic-table", "is a folder"),
    Fault(
        "the data lies where the unit hides it (ProtectHome)",
        _unit("ProtectHome=yes"),
        "asset synthetic-table",
        "ProtectHome=read-only",
    ),
    Fault(
        "the data lies where the unit hides it (PrivateTmp)",
        _unit("PrivateTmp=yes"),
        "asset synthetic-table",
        "PrivateTmp=no",
    ),
    Fault(
        "site.yaml maps a column that the table lacks",
        lambda g: g.edit("synthetic.csv}", "synthetic.csv, columns: {chol: cholesterin}}"),
        "asset synthetic-table",
        "no column 'cholesterin'",
    ),
    Fault(
        "δ promises so few patients nothing",
        lambda g: g.edit("delta: 1.0e-3", "delta: 0.1"),
        "asset synthetic-table",
        "delta = 0.1 is too large for 80 patients",
    ),
    Fault("HTTPS_PROXY cannot be read", lambda g: g.monkeypatch.setenv("HTTPS_PROXY", "http://"), "proxy", "write"),
    Fault(
        "HTTPS_PROXY is of another kind",
        lambda g: g.monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9"),
        "proxy",
        "only http:// will do",
    ),
    Fault(
        "the proxy does not answer",
        lambda g: g.monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1"),
        "coordinator",
        "the proxy 127.0.0.1:1 that HTTPS_PROXY names does not answer",
    ),
    Fault("the proxy asks for a password", lambda g: g.proxy(407), "coordinator", "asks for a name and a password"),
    Fault(
        "the proxy refuses the password",
        lambda g: g.proxy(407, "it:wrong@"),
        "coordinator",
        "refuses this name or password",
    ),
    Fault("the proxy forbids the address", lambda g: g.proxy(403), "coordinator", "permit CONNECT"),
    Fault(
        "the proxy opens TLS",
        _opening_proxy,
        "coordinator",
        "by 'Consilium CA synthetic proxy': the proxy 127.0.0.1",
    ),
    Fault("nobody listens at the server", _nobody_listens, "coordinator", "is the server up"),
    Fault(
        "the server's name is unknown",
        lambda g: g.port(8443, "coordinator.invalid"),
        "coordinator",
        "its entry in the DNS",
    ),
    Fault(
        "another CA signed the server's certificate",
        lambda g: g.certificate(own_ca=True),
        "coordinator",
        "a proxy opens TLS, or that is another server",
    ),
    Fault("the server's certificate ran out", lambda g: g.certificate(-0.02), "coordinator", "ran out on"),
    Fault(
        "the server's certificate runs out in 10 days",
        lambda g: g.certificate(10.1),
        "certificate",
        "10 days, for localhost, 127.0.0.1: the coordinator's people renew it",
        "warning",
    ),
    Fault(
        "the server's certificate is for another name",
        lambda g: g.certificate(address="elsewhere.example"),
        "coordinator",
        "is for elsewhere.example, and this site calls 127.0.0.1",
    ),
    Fault("the clock is a minute ahead", _set(ahead=60.0), "clock", "ahead of the server's; Flower refuses"),
    Fault("the clock is 20 minutes behind", _set(ahead=-1200.0), "clock", "behind the server's; Flower refuses"),
    Fault("the server's answers have no time", _set(date=""), "clock", "cannot be told: the server's", "warning"),
    Fault("the server's answers have no time that can be read", _set(date="then"), "clock", "by hand", "warning"),
    Fault("the server answers any key alike", _set(anybody=True), "admission", "ask the coordinator", "warning"),
    Fault("the clock is three minutes behind", _set(ahead=-200.0), "clock", "set it (NTP)", "warning"),
    Fault("the server does not take this key", _set(admitted=False), "admission", "whose people run consilium-server"),
    Fault(
        "the server speaks none of this site's protocols",
        _set(about={"consilium": "9.9", "formats": {"protocol": {"oldest": 90, "newest": 99}}}),
        "releases",
        "upgrade Consilium here",
    ),
    Fault("a library is of another version", _libraries, "libraries", "this release is made for 1.40.0"),
    Fault("the disk is full", _disk(0), "disk", "make room"),
    Fault("the disk is nearly full", _disk(2**30), "disk", "make room", "warning"),
    Fault("memory is used up", _memory("102400"), "memory", "end other programs"),
    Fault("a control group leaves little memory", _memory("99999999", "1048576000"), "memory", "not for a", "warning"),
    Fault(
        "site.yaml names a GPU that is not there", lambda g: g.edit("device: cpu", "device: cuda:7"), "device", "write"
    ),
    Fault("torch cannot use the GPU's driver", _gpu_that_torch_cannot_use, "device", "driver 470.1", "warning"),
    Fault(
        "the system lets nobody start programs without network",
        lambda g: g.monkeypatch.setattr(resources, "without_network", lambda: False),
        "isolation",
        "PrivateNetwork=yes",
        "warning",
    ),
    Fault(
        "the programs do not run",
        lambda g: g.home.admin_socket.unlink(),
        "programs",
        "start them: consilium-site up",
        "warning",
    ),
    Fault("the agent does not answer", _dead_agent, "programs", "agent.log"),
    Fault(
        "site.yaml is newer than what runs",
        lambda g: g.home.config_file.write_text(g.home.config_file.read_text() + "# later\n"),
        "programs",
        "site.yaml was changed since the agent read it",
        "warning",
    ),
    Fault(
        "an older release runs than is installed",
        lambda g: (g.status or {}).update(release="0.0.9"),
        "programs",
        "release 0.0.9 runs",
        "warning",
    ),
    Fault("images are to be received, and nobody does", _receiver(), "receiver", "does not run", "warning"),
    Fault("another program has the receiver's port", _taken_port, "receiver", "another program has port"),
    Fault(
        "the receiver's certificate is not there",
        _receiver(", tls: {certificate: keys/r.crt, key: keys/r.key, ca: keys/h.crt}"),
        "receiver",
        "cannot read",
    ),
)


def copy(sound: Path, here: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> Ground:
    """Ground of its own for one fault, in the folder ``here``."""
    shutil.copytree(sound, here)
    made = Ground(Home(here / "a"), ServerHome(here / "server"), monkeypatch, stack)
    made.begin()
    return made
