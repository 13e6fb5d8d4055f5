"""The transport in real processes over TLS: a SuperLink, two SuperNodes with their couriers, and two agents.

The agents are small stand-ins on real Unix sockets: they answer with the question's header, and the payload
turned by a number of bytes that differs between the sites.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab as FabProto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from tests.support.live_files import contents, modes, nameless

from consilium_client.transport.agent_socket import AgentAway, AgentChannel
from consilium_server.superlink import control
from consilium_server.superlink.settings import SuperLinkSettings
from consilium_server.transport import study_run
from consilium_server.transport.exchange import ask
from consilium_server.transport.study_run import StudyGrid, open_grid
from consilium_shared.errors import TransportError

AGENT = """
import sys, time
from pathlib import Path
from consilium_client.transport.agent_socket import cut, serve
home = Path(sys.argv[1])

def answer(header, payload):
    with (home / "deliveries").open("ab") as file:
        file.write(header + b"\\n")
    if header.startswith(b"slow"):
        time.sleep(float(header.split()[1]))
    if header.startswith(b"fail"):
        raise ValueError("Erika Mustermann, born 1964")
    turn = home.name.encode()[0]
    return b"answer to " + header, cut(payload[turn:] + payload[:turn])

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
            self.home / "supernode.log",
            "-m",
            "consilium_client.transport.supernode",
            "--superlink",
            self.address,
            *common,
        )
        self.courier = Program(self.home / "courier.log", "-m", "consilium_client.transport.courier", *common)

    def down(self) -> None:
        for program in (self.supernode, self.courier, self.agent):
            program.stop()

    def deliveries(self, header: bytes) -> int:
        seen = self.home / "deliveries"
        return seen.read_bytes().splitlines().count(header) if seen.exists() else 0


@dataclass(frozen=True)
class Heard:
    """An answer with its payload as bytes."""

    site: str
    header: bytes
    payload: bytes
    problem: str | None


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
        self.register()
        for site in self.sites.values():
            site.up()

    def register(self) -> None:
        """As ``consilium-server up`` does after each start of the SuperLink."""
        control.wait_until_ready(self.settings, timeout=60)
        self.nodes = control.register_nodes(self.settings, {name: s.public_key for name, s in self.sites.items()})

    def down(self) -> None:
        for site in self.sites.values():
            site.down()
        self.superlink.stop()

    def ask(
        self, grid: StudyGrid, header: bytes, payload: bytes = b"", *, sites: tuple[str, ...] = (), timeout: float = 60
    ) -> dict[str, Heard]:
        requests = dict.fromkeys(sites or self.sites, (header, payload))
        return {each.site: each for each in self.answers(grid, requests, timeout)}

    def answers(
        self, grid: StudyGrid, requests: Mapping[str, tuple[bytes, bytes]], timeout: float, **options: Any
    ) -> Iterator[Heard]:
        for each in ask(grid, requests, self.nodes, timeout, spool=self.root, **options):
            yield Heard(each.site, each.header, each.payload.read(), each.problem)

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


def eventually(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
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


@contextlib.contextmanager
def asking(federation: Federation, grid: StudyGrid, header: bytes, site: str) -> Iterator[dict[str, Heard]]:
    """Ask one site in the background; yield once its agent has the message; at the end the answer is there."""
    answers: dict[str, Heard] = {}
    before = federation.sites[site].deliveries(header)
    thread = threading.Thread(target=lambda: answers.update(federation.ask(grid, header, sites=(site,), timeout=180)))
    thread.start()
    eventually(lambda: federation.sites[site].deliveries(header) > before)
    yield answers
    thread.join()


def test_nothing_is_held_after_the_answers_were_pulled(federation: Federation, grid: StudyGrid) -> None:
    federation.ask(grid, b"leave nothing", secrets.token_bytes(6_000_000))
    eventually(lambda: nameless(federation.superlink.process.pid, federation.settings.directory) == [])


def test_secrets_are_for_the_owner_alone(federation: Federation) -> None:
    runs = [site.home / "run" for site in federation.sites.values()]
    found = [*modes(federation.settings.directory, *runs), *((run, run.stat().st_mode) for run in runs)]
    assert [path for path, mode in found if mode & 0o077] == []


@pytest.mark.parametrize("path", ["/v1/control/list-nodes", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/"])
def test_the_public_port_serves_the_fleet_interface_alone(federation: Federation, path: str) -> None:
    with federation.client() as client:
        address = f"https://localhost:{federation.settings.public_port}"
        assert client.post(address + path).status_code == 404
        assert client.get(address + path).status_code == 404
        assert client.get(address + "/health").status_code == 200


def test_the_public_port_takes_no_oversized_request(federation: Federation) -> None:
    with federation.client() as client:
        address = f"https://localhost:{federation.settings.public_port}/v1/fleet/push-object"
        assert client.post(address, content=bytes(9 * 1024**2)).status_code == 413
        assert client.post(address, content=iter([b"no length"])).status_code == 411


def test_strangers_fill_no_memory_and_the_sites_are_served_meanwhile(federation: Federation, grid: StudyGrid) -> None:
    """Forty requests of the largest size, each but for its last byte: 320 MiB, and no key."""
    size, number = 8 * 1024**2, 40
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n"
    context = ssl.create_default_context(cadata=federation.authority.pem.decode("ascii"))
    before = memory(federation.superlink.process.pid)
    with contextlib.ExitStack() as open_ones:
        for _ in range(number):
            plain = socket.create_connection(("127.0.0.1", federation.settings.public_port))
            stranger = open_ones.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
            stranger.sendall(head.encode() + b"content-type: application/protobuf\r\n\r\n")
            with contextlib.suppress(OSError):  # answered, and closed, long before all of it is sent
                stranger.sendall(bytes(size - 1))
        heard = federation.ask(grid, b"meanwhile", secrets.token_bytes(1_000_000))
        assert {each.problem for each in heard.values()} == {None}
        grown = memory(federation.superlink.process.pid) - before
    assert grown < 64 * 2**20, "all that the strangers sent are 320 MiB"


def memory(pid: int) -> int:
    """Bytes that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def test_the_private_port_wants_the_token(federation: Federation) -> None:
    settings = federation.settings
    impostor = replace(settings, home=federation.root / "impostor")
    federation.authority.issue(impostor.home)
    write_private(impostor.ca_certificate, settings.ca_certificate.read_bytes())
    impostor.directory.mkdir(mode=0o700)
    write_private(impostor.control_token_file, b"0" * 64)
    with pytest.raises(TransportError, match="HTTP 401"):
        control.node_names(impostor)


def test_the_private_port_hands_out_no_task_without_the_secret(federation: Federation) -> None:
    client = RuntimeHttpClient.from_server_address(
        federation.settings.private_address,
        False,
        federation.authority.pem,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="impostor")],
    )
    with contextlib.closing(client), pytest.raises(httpx.HTTPStatusError) as refusal:
        client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    assert refusal.value.response.status_code == 401


def test_a_supernode_that_was_not_admitted_is_refused(federation: Federation) -> None:
    stranger = Site(federation.root / "stranger", federation.sites["north"].address, federation.authority.pem)
    stranger.up()
    try:
        assert stranger.supernode.process.wait(60) == 1
    finally:
        stranger.down()
    assert set(control.node_names(federation.settings)) == {"north", "south"}


def test_a_site_turns_away_from_a_superlink_of_another_authority(federation: Federation) -> None:
    careful = Site(federation.root / "careful", federation.sites["north"].address, Authority().pem)
    careful.up()
    try:
        assert careful.supernode.process.wait(60) == 1
    finally:
        careful.down()


def test_registering_again_changes_nothing(federation: Federation) -> None:
    keys = {name: site.public_key for name, site in federation.sites.items()}
    assert control.register_nodes(federation.settings, keys) == federation.nodes


def test_a_reply_in_another_sites_name_is_refused(federation: Federation, grid: StudyGrid) -> None:
    key = federation.sites["north"].key
    fleet = FleetHttpClient.from_server_address(
        f"localhost:{federation.settings.public_port}",
        False,
        federation.authority.pem,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    )

    def push(sender: str) -> None:
        """Push a reply, signed by north, in the name of ``sender``."""
        metadata = ProtoMetadata(
            run_id=grid.run.run_id,
            message_id="f" * 64,
            src_node_id=federation.nodes[sender],
            dst_node_id=1,
            reply_to_message_id="0" * 64,
            message_type="train",
            created_at=time.time(),
            ttl=60,
        )
        request = PushMessagesRequest(
            node=Node(node_id=federation.nodes["north"]),
            messages_list=[ProtoMessage(metadata=metadata, content=ProtoRecordDict())],
            message_object_trees=[ObjectTree(object_id="f" * 64)],
        )
        fleet.PushMessages(request)

    with contextlib.closing(fleet):
        push("north")  # stock Flower accepts, and ignores, a reply to no question
        with pytest.raises(httpx.HTTPStatusError) as refusal:
            push("south")
    assert refusal.value.response.status_code == 403


def test_an_agents_exception_does_not_leave_the_site(federation: Federation, grid: StudyGrid) -> None:
    answer = federation.ask(grid, b"fail", sites=("north",))["north"]
    assert (answer.problem, answer.header, answer.payload) == ("crashed", b"", b"")
    logs = [*contents(federation.root, "*.log"), *contents(federation.settings.directory, "*")]
    assert [path for path, content in logs if b"Mustermann" in content] == []


def test_a_reply_above_the_limit_is_malformed(federation: Federation, grid: StudyGrid) -> None:
    requests = {"north": (b"big", secrets.token_bytes(2_000_000)), "south": (b"small", b"x")}
    answers = {each.site: each for each in federation.answers(grid, requests, 60, payload_bytes=1_000_000)}
    assert {site: answer.problem for site, answer in answers.items()} == {"north": "malformed", "south": None}


def test_a_message_that_is_not_ours_does_not_reach_the_agent(
    federation: Federation, grid: StudyGrid, tmp_path: Path
) -> None:
    foreign = RecordDict({"header": ConfigRecord({"header": b"foreign", "more": 1})})
    (message_id,) = grid.push_messages([Message(foreign, federation.nodes["north"], "train", ttl=60)])
    replies: list[Any] = []

    def answered() -> bool:
        replies.extend(grid.receive({message_id}, 1000, tmp_path))
        return bool(replies)

    eventually(answered)
    assert replies[0].problem == "crashed"
    assert federation.sites["north"].deliveries(b"foreign") == 0


def test_an_agent_killed_over_a_message_gets_the_same_message_again(federation: Federation, grid: StudyGrid) -> None:
    site = federation.sites["north"]
    with asking(federation, grid, b"slow 3 agent", "north") as answers:
        site.agent.kill()
        site.agent.start()
    assert answers["north"].header == b"answer to slow 3 agent"
    assert site.deliveries(b"slow 3 agent") == 2


def test_a_killed_supernode_costs_one_repetition(federation: Federation, grid: StudyGrid) -> None:
    site = federation.sites["south"]
    with asking(federation, grid, b"slow 3 supernode", "south") as answers:
        site.supernode.kill()
        site.supernode.start()
    assert answers["south"].header == b"answer to slow 3 supernode"


def test_a_site_that_comes_back_within_the_time_is_still_asked(federation: Federation, grid: StudyGrid) -> None:
    site = federation.sites["south"]
    site.supernode.stop()
    eventually(lambda: control.online_nodes(federation.settings) == {"north"})
    states: list[dict[str, str]] = []

    def come_back(waiting: Mapping[str, str]) -> None:
        states.append(dict(waiting))
        if states[-1] == {"south": "offline"} and site.supernode.process.poll() is not None:
            site.supernode.start()

    requests = dict.fromkeys(federation.sites, (b"both", b""))
    answers = list(federation.answers(grid, requests, 90, on_wait=come_back))
    assert [(each.site, each.problem) for each in answers] == [("north", None), ("south", None)]


def test_a_site_that_stays_away_is_reported_and_waiting_can_be_aborted(federation: Federation, grid: StudyGrid) -> None:
    site = federation.sites["south"]
    site.supernode.stop()
    eventually(lambda: control.online_nodes(federation.settings) == {"north"})
    try:
        assert federation.ask(grid, b"where", sites=("south",), timeout=1.5)["south"].problem == "unavailable"
        assert federation.ask(grid, b"slow 4", sites=("north",), timeout=2)["north"].problem == "timeout"
        aborted = list(federation.answers(grid, {"north": (b"never mind", b"")}, 60, abort=lambda: True))
        assert [answer.problem for answer in aborted] == ["aborted"]
    finally:
        site.supernode.start()


def test_a_run_whose_starter_died_does_not_block_the_next(federation: Federation) -> None:
    with control.open_control(federation.settings) as stub:
        bundle, _ = build_fab_from_files(study_run._BUNDLE)
        abandoned = stub.StartRun(StartRunRequest(fab=FabProto(content=bundle))).run_id
    with open_grid(federation.settings) as opened:
        assert opened.run.run_id != abandoned
        with control.open_control(federation.settings) as stub:
            run = stub.ListRuns(ListRunsRequest(run_id=abandoned)).run_dict[abandoned]
        assert run.status.status == "finished"


def test_asking_in_an_ended_run_is_a_transport_error(federation: Federation) -> None:
    with open_grid(federation.settings) as opened:
        with control.open_control(federation.settings) as stub:
            stub.StopRun(StopRunRequest(run_id=opened.run.run_id))
        with pytest.raises(TransportError, match="Resume the study"):
            federation.ask(opened, b"too late")


def test_nobody_at_the_socket_is_told_apart_from_an_agent_that_died(tmp_path: Path) -> None:
    with pytest.raises(AgentAway) as away:
        AgentChannel(tmp_path / "agent.sock").exchange(b"header", b"")
    assert away.value.delivered is False


def test_a_killed_superlink_ends_the_run_at_once_and_a_new_run_gets_the_answer(federation: Federation) -> None:
    """The last here: the other tests' run ends with it."""
    question, site = b"slow 3 superlink", federation.sites["north"]

    def kill() -> None:
        eventually(lambda: site.deliveries(question) > 0)
        federation.superlink.kill()
        federation.superlink.start()

    killing = threading.Thread(target=kill)
    killing.start()
    with pytest.raises(TransportError, match=r"Resume the study"), open_grid(federation.settings) as first:
        federation.ask(first, question, sites=("north",), timeout=180)
    killing.join()
    federation.register()

    def connected() -> bool:
        """As ``consilium-site up``: a SuperNode that is not known any more ends, and is started again."""
        for each in federation.sites.values():
            if each.supernode.process.poll() is not None:
                each.supernode.start()
        return control.online_nodes(federation.settings) == set(federation.sites)

    eventually(connected)
    with open_grid(federation.settings) as second:
        answer = federation.ask(second, question, sites=("north",), timeout=180)["north"]
    assert (answer.problem, answer.header) == (None, b"answer to slow 3 superlink")
