"""Who listens where, and who may not come in: open ports, a site that was not admitted, a false authority."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from consilium_client.transport.sandbox import without_network
from consilium_server.federation import Home
from consilium_server.superlink.control import node_names, online_nodes
from consilium_server.superlink.settings import settings_of
from consilium_shared.protocol.version import about

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals


SITES = ["north", "south", "west"]
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
STATES = {"tcp": "0A", "udp": "07"}
"""Of sockets that take connections or datagrams, in /proc/net (include/net/tcp_states.h): LISTEN and CLOSE."""


def plain(table: str) -> str:
    """Words of a table without its lines."""
    return " ".join(re.sub("[│┃ ]+", " ", table).split())


@dataclass(frozen=True)
class Listener:
    """A socket that a process accepts connections or datagrams on."""

    pid: int
    loopback: bool
    port: int


def listeners(pid: int) -> Iterator[Listener]:
    """The listening TCP and UDP sockets of one process, in its own network namespace; one that has ended has none."""
    own = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                own.add(str(link.readlink()))
        tables = {
            protocol: Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]
            for protocol in ("tcp", "tcp6", "udp", "udp6")
        }
    except (FileNotFoundError, ProcessLookupError):
        return
    for protocol, lines in tables.items():
        for line in lines:
            words = line.split()
            address, port = words[1].split(":")
            if words[3] == STATES[protocol[:3]] and f"socket:[{words[9]}]" in own:
                yield Listener(pid, address in LOOPBACK, int(port, 16))


def test_only_the_fleet_interface_listens_beyond_this_machine(hospitals: Hospitals) -> None:
    federation = yaml.safe_load((hospitals.root / "federation.yaml").read_text())
    found = [each for pid in hospitals.processes("server") for each in listeners(pid)]
    assert federation["listen"] == "0.0.0.0"
    assert {each.port for each in found if not each.loopback} == {federation["port"]}
    assert federation["private_port"] in {each.port for each in found}


@pytest.mark.parametrize("site", SITES)
def test_a_site_listens_on_loopback_alone_and_its_agent_on_no_port(hospitals: Hospitals, site: str) -> None:
    agent, supernode = (hospitals.pid(site, f"consilium_client.{name}") for name in ("agent", "transport.supernode"))
    hospitals.until(lambda: list(listeners(supernode)), "the SuperNode serves its courier", site)
    found = [each for pid in hospitals.processes(site) for each in listeners(pid)]
    assert {(each.pid, each.loopback) for each in found} == {(supernode, True)}
    assert all(each.pid != agent for each in found)
    if without_network():
        assert Path(f"/proc/{agent}/ns/net").readlink() != Path(f"/proc/{supernode}/ns/net").readlink()
        interfaces = [
            line.split(":")[0].strip() for line in Path(f"/proc/{agent}/net/dev").read_text().splitlines()[2:]
        ]
        assert set(interfaces) <= {"lo"}


@pytest.mark.parametrize("site", SITES)
def test_sockets_keys_and_ledgers_are_for_the_owner_alone(hospitals: Hospitals, site: str) -> None:
    home = hospitals.site(site)
    secret = [home / "ledger.jsonl", home / "keys" / "identity.key", home / "keys" / "supernode.key"]
    secret += [home / "run" / "agent.sock", home / "run" / "admin.sock"]
    assert [path.name for path in secret if path.stat().st_mode & 0o077] == []


def test_a_site_that_was_not_admitted_cannot_connect_and_takes_no_part(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    log = hospitals.site("stranger") / "log" / "supernode.log"
    hospitals.up("stranger")
    try:
        hospitals.until(lambda: log.exists() and "Exit Code: 305" in log.read_text(), "it is refused")  # not connected
        doctor = hospitals.at_site("stranger", "doctor", check=False)
        assert doctor.returncode == 2
        assert "the server does not take this site's SuperNode key" in plain(doctor.stdout)
        study = hospitals.run_study(contract("without-stranger", private=False, rounds=1))
        assert hospitals.ended("without-stranger") == "finished"
        assert hospitals.proposed("stranger") == {}
    finally:
        hospitals.down("stranger")
    assert hospitals.status()["sites"]["stranger"] == "invited"
    assert online_nodes(settings_of(Home(hospitals.server))) == set(SITES)
    assert {entry.kind for entry in hospitals.ledger("stranger").entries} == {"open"}
    (record,) = hospitals.records(study.study)
    assert (record["participants"], record["away"], record["refused"]) == (SITES, {}, {})


def test_a_site_with_another_authority_turns_away_from_the_server_and_doctor_says_why(hospitals: Hospitals) -> None:
    certificate = hospitals.site("west") / "keys" / "ca.crt"
    log = hospitals.site("west") / "log" / "supernode.log"
    doctor = hospitals.at_site("west", "doctor")
    assert doctor.returncode == 0 and "the server takes this site's" in plain(doctor.stdout)
    file, other = hospitals.root / "federation.yaml", hospitals.root / "other"
    hospitals.command("consilium-server", "provision", "--home", other, file)
    right, another = certificate.read_bytes(), other / "keys" / "ca.crt"
    hospitals.down("west")
    before = len(log.read_bytes())
    certificate.write_bytes(another.read_bytes())
    try:
        hospitals.up("west")
        hospitals.until(lambda: b"CERTIFICATE_VERIFY_FAILED" in log.read_bytes()[before:], "it turns away", "west")
        assert "west" not in online_nodes(settings_of(Home(hospitals.server)))
        doctor = hospitals.at_site("west", "doctor", check=False)
        assert doctor.returncode == 2
        assert "certificate" in " ".join(doctor.stdout.split())
        hospitals.down("west")
    finally:
        certificate.write_bytes(right)
    hospitals.up("west")
    hospitals.until(lambda: "west" in online_nodes(settings_of(Home(hospitals.server))), "west is back", "west")


@pytest.mark.long
def test_in_mid_study_a_key_is_rotated_the_certificate_renewed_and_then_a_site_removed(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    hospitals = shaken  # a removed site would be missing in other tests
    server = Home(hospitals.server)
    before = {"west": node_names(settings_of(server))["west"], "key": server.roster().members[-1].supernode}
    study = hospitals.run_study(contract("long-lived", private=False, rounds=3, min_sites=2, corrupt_sites=0))
    hospitals.until_phase("long-lived", 2, "training")
    shown = (server.keys / "superlink.crt").read_bytes()
    hospitals.at_server("renew")
    hospitals.at_site("west", "rotate")
    hospitals.at_server("admit", hospitals.site("west") / "rotation-request.json")
    assert hospitals.ended("long-lived") == "finished"
    hospitals.until(lambda: "west" in online_nodes(settings_of(server)), "west is back with its new key", "west")
    assert node_names(settings_of(server))["west"] != before["west"]
    assert (
        server.roster().members[-1].supernode != before["key"] and (server.keys / "superlink.crt").read_bytes() != shown
    )
    records = hospitals.records(study.study)
    assert len(records) == 3 and records[0]["participants"] == SITES
    presence = hospitals.status()["presence"]
    assert {site: presence[site]["release"] for site in SITES} == dict.fromkeys(SITES, about()["consilium"])

    hospitals.start(contract("without-west", private=False, rounds=1, min_sites=2, corrupt_sites=0))
    hospitals.at_server("remove", "west", "--reason", "a test")
    hospitals.decide("without-west", "approve", "north", "south")
    assert hospitals.ended("without-west") == "finished"
    (record,) = hospitals.records("without-west")
    reason, detail = record["refused"]["west"]
    assert record["participants"] == ["north", "south"]
    assert reason == "removed" and "removed from the federation" in detail
    hospitals.until(lambda: "west" not in online_nodes(settings_of(server)), "west is cut off")
    log = hospitals.site("west") / "log" / "supernode.log"
    hospitals.until(lambda: "the SuperNode ends: admission: not admitted" in log.read_text(), "its end has a cause")
