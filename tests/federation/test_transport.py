"""The transport in real processes over TLS: a SuperLink, two SuperNodes with their couriers, and two agents.

The agents are small stand-ins on real Unix sockets: they answer with the question's header, and the payload
turned by a number of bytes that differs between the sites.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from consilium_client.agent_socket import AgentAway, AgentChannel
from consilium_server import superlink
from consilium_server.exchange import Answer, StudyGrid, ask, open_grid
from consilium_server.superlink_settings import SuperLinkSettings
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

AGENT = """
import sys, time
from pathlib import Path
from consilium_client.agent_socket import serve
home = Path(sys.argv[1])

def answer(header, payload):
    with (home / "deliveries").open("ab") as file:
        file.write(header + b"\\n")
    if header.startswith(b"slow"):
        time.sleep(float(header.split()[1]))
    if header.startswith(b"fail"):
        raise ValueError("Erika Mustermann, born 1964")
    turn = home.name.encode()[0]
    return b"answer to " + header, payload[turn:] + payload[:turn]

serve(home / "run" / "agent.sock", answer).wait_for_termination()
"""


def turned(payload: bytes, site: str) -> bytes:
    """What the stand-in agent of ``site`` answers."""
    turn = site.encode()[0]
    return payload[turn:] + payload[:turn]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.write_bytes(content)


@dataclass
class Authority:
    """A certificate authority and the server certificates that it signs."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        self.certificate = self._sign(name, self.key.public_key(), name, x509.BasicConstraints(True, None), None)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        issuer: x509.Name,
        constraints: x509.BasicConstraints,
        names: x509.SubjectAlternativeName | None,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(constraints, critical=True)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA384())

    def issue(self, home: Path) -> None:
        """Write the server's certificate and key, and the authority's certificate, into HOME/keys."""
        key = ec.generate_private_key(ec.SECP384R1())
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "superlink")])
        certificate = self._sign(
            subject,
            key.public_key(),
            self.certificate.subject,
            x509.BasicConstraints(False, None),
            x509.SubjectAlternativeName(names),
        )
        write_private(home / "keys" / "superlink.key", private_bytes(key))
        write_private(home / "keys" / "superlink.crt", certificate.public_bytes(serialization.Encoding.PEM))
        write_private(home / "keys" / "ca.crt", self.pem)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def private_bytes(key: ec.EllipticCurvePrivateKey, *, openssh: bool = False) -> bytes:
    form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


class Program:
    """One process of the federation, its log, and the two ways to end it."""

    def __init__(self, log: Path, *command: str) -> None:
        self._log, self._command = log, command
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, *self._command], stdout=log, stderr=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()


class Site:
    def __init__(self, home: Path, address: str, ca: bytes) -> None:
        self.home, self.address = home, address
        (home / "run").mkdir(parents=True, mode=0o700)
        self.key = ec.generate_private_key(ec.SECP384R1())
        write_private(home / "keys" / "ca.crt", ca)
        write_private(home / "keys" / "supernode.key", private_bytes(self.key, openssh=True))
        self.runtime_port = str(free_port())

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)

    def up(self) -> None:
        common = ("--home", str(self.home), "--runtime-port", self.runtime_port)
        self.agent = Program(self.home / "agent.log", "-c", AGENT, str(self.home))
        self.supernode = Program(
            self.home / "supernode.log", "-m", "consilium_client.supernode", "--superlink", self.address, *common
        )
        self.courier = Program(self.home / "courier.log", "-m", "consilium_client.courier", *common)

    def down(self) -> None:
        for program in (self.supernode, self.courier, self.agent):
            program.stop()

    def deliveries(self, header: bytes) -> int:
        seen = self.home / "deliveries"
        return seen.read_bytes().splitlines().count(header) if seen.exists() else 0


class Federation:
    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self.root = root
        authority = Authority()
        self.authority = authority
        self.settings = SuperLinkSettings(root / "server", "127.0.0.1", free_port(), free_port())
        authority.issue(self.settings.home)
        address = f"localhost:{self.settings.public_port}"
        self.sites = {name: Site(root / name, address, authority.pem) for name in names}

    def up(self) -> None:
        ports = ("--public-port", str(self.settings.public_port), "--private-port", str(self.settings.private_port))
        home = ("--home", str(self.settings.home), "--public-host", "127.0.0.1")
        log = self.root / "superlink.log"
        self.superlink = Program(log, "-m", "consilium_server.superlink", *home, *ports)
        superlink.wait_until_ready(self.settings, timeout=60)
        self.nodes = superlink.register_nodes(self.settings, {name: s.public_key for name, s in self.sites.items()})
        for site in self.sites.values():
            site.up()

    def down(self) -> None:
        for site in self.sites.values():
            site.down()
        self.superlink.stop()

    def ask(
        self, grid: StudyGrid, header: bytes, payload: bytes = b"", *, sites: tuple[str, ...] = (), timeout: float = 60
    ) -> dict[str, Answer]:
        requests = {name: (header, payload) for name in sites or self.sites}
        return {each.site: each for each in ask(grid, requests, self.nodes, timeout)}

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cadata=self.authority.pem.decode("ascii"))
        return httpx.Client(verify=context)


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    root = Path(tempfile.mkdtemp(prefix="fed"))  # short: a socket's path has at most 100 bytes
    running = Federation(root, ("north", "south"))
    try:
        running.up()
        yield running
    finally:
        running.down()
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def grid(federation: Federation) -> Iterator[StudyGrid]:
    with open_grid(federation.settings) as opened:
        yield opened


def eventually(condition: object, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_large_payload_reaches_every_site_and_comes_back(federation: Federation, grid: StudyGrid) -> None:
    payload = secrets.token_bytes(12_000_000)
    answers = federation.ask(grid, b"question", payload)
    assert set(answers) == {"north", "south"}
    for site, answer in answers.items():
        assert (answer.problem, answer.header) == (None, b"answer to question")
        assert answer.payload == turned(payload, site)


def test_a_second_question_without_payload_is_answered(federation: Federation, grid: StudyGrid) -> None:
    answers = federation.ask(grid, b"again")
    assert {(each.header, each.payload, each.problem) for each in answers.values()} == {(b"answer to again", b"", None)}
