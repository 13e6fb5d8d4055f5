"""The life of a federation: a site is removed, has another SuperNode key, the server moves; each is signed for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.site import CONTRACT, Coordinator

from consilium_client.commands.checks import installation
from consilium_client.commands.enroll import enroll
from consilium_client.commands.rotate import rotate
from consilium_client.site import Home as SiteHome
from consilium_client.transport import connection, supernode
from consilium_server import removed
from consilium_server.commands import up
from consilium_server.commands.admission import admit, exchange
from consilium_server.commands.provision import provision
from consilium_server.federation import Home
from consilium_server.state.study_folder import folder
from consilium_server.study.context import RemovedSite, StudyContext
from consilium_shared import certificates, documents
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.protocol.joining import make_request
from consilium_shared.protocol.rotation import DOMAIN, Rotation, is_rotation, open_rotation
from consilium_shared.study import Study

FILE = "federation: test\naddress: {address}\nport: {port}\nsites: [{sites}]\n"
ALL = "clinic-c, hospital-a, hospital-b"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sound")
    Coordinator(made)
    return made


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A federation of three sites, in a folder of its own."""
    return shutil.copytree(sound, tmp_path / "f")


def reprovision(place: Path, address: str = "127.0.0.1", port: int = 8443, sites: str = ALL) -> list[str]:
    (place / "federation.yaml").write_text(FILE.format(address=address, port=port, sites=sites))
    return provision(Home(place / "server"), place / "federation.yaml")


def test_a_removed_site_is_out_of_the_roster_and_neither_its_name_nor_its_keys_come_back(place: Path) -> None:
    server = Home(place / "server")
    before = server.roster()
    after = removed.remove(server, "hospital-b", "its keys were copied")
    assert [member.site for member in after.members] == ["clinic-c", "hospital-a"]
    assert server.roster() == after and after.version == before.version + 1
    (gone,) = removed.read(server)
    assert (gone.site, gone.reason) == ("hospital-b", "its keys were copied")
    with pytest.raises(ConfigurationError, match="was removed before"):
        removed.remove(server, "hospital-b", "again")
    with pytest.raises(ConfigurationError, match="no site of this federation"):
        removed.remove(server, "hospital-z", "unknown")
    with pytest.raises(PeerError, match="never invited"):
        admit(server, (place / "b" / "join-request.json").read_bytes())
    with pytest.raises(ConfigurationError, match="hospital-b was removed; invite"):
        reprovision(place)
    reprovision(place, sites="clinic-c, hospital-a")
    with pytest.raises(PeerError, match="its name and keys are not taken again"):
        removed.check_keys(server, next(each for each in before.members if each.site == "hospital-b"))
    with pytest.raises(ConfigurationError, match="to take a site out: consilium-server remove clinic-c"):
        reprovision(place, sites="hospital-a")


def test_an_invitation_is_withdrawn_and_an_edited_list_of_removed_sites_stops_everything(place: Path) -> None:
    server = Home(place / "server")
    reprovision(place, sites=f"{ALL}, later")
    removed.remove(server, "later", "changed its mind")
    assert not (server.invitations / "later.json").exists() and removed.read(server) == ()
    removed.remove(server, "clinic-c", "closed")
    server.removed_file.write_text(server.removed_file.read_text().replace("closed", "open"))
    with pytest.raises(ConfigurationError, match="was edited or damaged"):
        removed.read(server)


def test_of_a_removed_site_no_answer_is_taken_in_a_study_that_runs(place: Path) -> None:
    server = Home(place / "server")
    study = folder(server, CONTRACT["study"])
    study.create(Study.model_validate(CONTRACT), server.roster_file.read_bytes())
    nodes = {"clinic-c": 1, "hospital-a": 2, "hospital-b": 3}
    there = dict(nodes)
    context = StudyContext(server, study, None, nodes, lambda: dict(there))  # type: ignore[arg-type]
    assert context.removal("hospital-b") is None and not context.nodes_changed()
    removed.remove(server, "hospital-b", "its keys were copied")
    arrival: Any = type("Arrival", (), {"site": "hospital-b", "header": b"{}"})
    with pytest.raises(RemovedSite, match="its keys were copied"):
        context.decode(arrival, b"question")
    assert context.removal("hospital-a") is None
    del there["hospital-b"]
    assert context.nodes_changed() and context.nodes == {"clinic-c": 1, "hospital-a": 2}


def test_a_new_supernode_key_is_signed_by_both_keys_and_the_identity_stays(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, site = Home(place / "server"), SiteHome(place / "a")
    old = server.roster().member("hospital-a")
    request = rotate(site)
    assert rotate(site) == request and is_rotation(request)
    assert open_rotation(request).old_proof is not None
    assert installation._supernode_key(site)  # the old one serves on
    _, changed = exchange(server, request)
    assert changed and not exchange(server, request)[1]
    new = server.roster().member("hospital-a")
    assert old is not None and new is not None
    assert (new.identity, new.supernode != old.supernode) == (old.identity, True)
    (kept,) = server.rotations.glob("*.json")
    assert open_rotation(kept.read_bytes()).old == old.supernode

    monkeypatch.setattr(connection, "takes", lambda *_: False)
    assert not supernode.take_new_key(site.root)
    monkeypatch.setattr(connection, "takes", lambda *_: True)
    assert supernode.take_new_key(site.root) and not supernode.take_new_key(site.root)
    assert installation._supernode_key(site)

    (site.keys / "supernode.key").unlink()  # lost: the identity alone vouches for the next one
    third = rotate(site)
    assert open_rotation(third).old_proof is None and open_rotation(third).old == new.supernode
    assert exchange(server, third)[1]


@pytest.mark.parametrize("rotations", [0, 1], ids=["first", "second"])
def test_a_rotation_that_was_killed_before_its_request_was_written_is_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch, rotations: int
) -> None:
    server, site = Home(place / "server"), SiteHome(place / "a")
    monkeypatch.setattr(connection, "takes", lambda *_: True)
    for _ in range(rotations):
        assert exchange(server, rotate(site))[1] and supernode.take_new_key(site.root)
    with monkeypatch.context() as killed:
        killed.setattr("consilium_client.commands.rotate.write_atomically", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rotate(site)
    request = rotate(site)
    assert open_rotation(request).old_proof is not None and rotate(site) == request
    assert exchange(server, request)[1] and supernode.take_new_key(site.root)
    assert installation._supernode_key(site)


@pytest.mark.parametrize("admitted", [False, True])
def test_of_a_lost_new_key_the_server_is_asked_whether_it_took_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, admitted: bool
) -> None:
    server, site = Home(place / "server"), SiteHome(place / "a")
    lost = rotate(site)
    if admitted:
        exchange(server, lost)
    (site.keys / "supernode.key.new").unlink()
    monkeypatch.setattr(connection, "takes", lambda *_: None)
    with pytest.raises(ConfigurationError, match="run this again"):
        rotate(site)
    monkeypatch.setattr(connection, "takes", lambda *_: not admitted)
    again = rotate(site)
    assert again != lost and exchange(server, again)[1]


def test_a_key_that_a_site_had_once_admits_nobody(place: Path) -> None:
    server, site = Home(place / "server"), SiteHome(place / "a")
    reprovision(place, sites=f"{ALL}, later")
    later = SiteHome(place / "later")
    enroll(later, server.invitations / "later.json")
    old = serialization.load_ssh_private_key((site.keys / "supernode.key").read_bytes(), None)
    assert isinstance(old, ec.EllipticCurvePrivateKey) and exchange(server, rotate(site))[1]
    brought = make_request(later.invitation(), later.identity(), old)
    with pytest.raises(PeerError, match="a SuperNode key that a site had before"):
        admit(server, brought)
    assert admit(server, later.request_file.read_bytes())[1]


def test_the_last_site_that_is_removed_is_registered_no_longer(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, told = Home(place / "server"), list[set[str]]()
    monkeypatch.setattr(up, "register_nodes", lambda _, keys: told.append(set(keys)))
    supervisor: Any = type("Supervisor", (), {"process": lambda *_: 1})()
    watch = up._Watch(server, None, supervisor, lambda _: None)  # type: ignore[arg-type]
    for site in ALL.split(", "):
        removed.remove(server, site, "the study ends")
        watch._sync_roster()
    assert told == [{"hospital-a", "hospital-b"}, {"hospital-b"}, set()]


def test_a_rotation_that_was_edited_or_is_of_another_site_or_for_a_used_key_is_refused(place: Path) -> None:
    server, site, other = Home(place / "server"), SiteHome(place / "a"), SiteHome(place / "b")
    request = rotate(site)
    body, _ = documents.parse(request)
    for name, value, words in (
        ("site", "hospital-b", "new SuperNode key"),
        ("new", open_rotation(rotate(other)).new, "new SuperNode key"),
        ("old", open_rotation(rotate(other)).old, "new SuperNode key"),
    ):
        forged = documents.seal({**body, name: value}, DOMAIN, site.identity())
        with pytest.raises(PeerError, match=words):
            open_rotation(forged)
    with pytest.raises(PeerError, match="edited"):
        open_rotation(documents.seal(body, DOMAIN, other.identity()))
    foreign = Rotation.model_validate({**body, "federation": "0" * 64})
    with pytest.raises(PeerError):
        exchange(server, documents.seal(foreign.model_dump(exclude_none=True), DOMAIN, site.identity()))
    assert exchange(server, request)[1]
    back = json.loads(request)["body"]
    from consilium_shared.protocol import rotation

    keys = [
        serialization.load_ssh_private_key((site.keys / name).read_bytes(), None)
        for name in ("supernode.key", "supernode.key.new")
    ]
    again = rotation.make(back["federation"], "hospital-a", site.identity(), back["new"], keys[0], keys[1])  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="was used before"):
        exchange(server, again)


def test_the_server_moves_and_its_sites_follow_in_the_homes_that_they_have(place: Path) -> None:
    server, site = Home(place / "server"), SiteHome(place / "a")
    late = site.request_file.read_bytes()
    roster, before = server.roster(), site.invitation()
    made = reprovision(place, "moved.example", 9443)
    assert [line for line in made if line.startswith("SuperLink's certificate for moved.example")]
    shown = x509.load_pem_x509_certificate((server.keys / "superlink.crt").read_bytes())
    assert "moved.example" in certificates.names(shown)
    assert server.roster() == roster
    done = enroll(site, server.invitations / "hospital-a.json")
    assert done.moved and (site.invitation().address, site.invitation().port) == ("moved.example", 9443)
    assert site.invitation().federation == before.federation and site.request_file.read_bytes() == late
    assert not enroll(site, server.invitations / "hospital-a.json").moved
    assert admit(server, late)[1] is False  # the request of before answers an invitation of before
    with pytest.raises(ConfigurationError, match="enrolled with another invitation"):
        enroll(site, server.invitations / "hospital-b.json")
    other = place / "other"
    provision(Home(other), place / "federation.yaml")
    with pytest.raises(ConfigurationError, match="enrolled with another invitation"):
        enroll(site, other / "invitations" / "hospital-a.json")


def test_another_name_of_the_federation_is_refused(place: Path) -> None:
    (place / "federation.yaml").write_text(FILE.format(address="a.b", port=1, sites=ALL).replace("test", "renamed"))
    with pytest.raises(ConfigurationError, match="cannot be changed"):
        provision(Home(place / "server"), place / "federation.yaml")
