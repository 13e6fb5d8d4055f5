"""Joining: what is made, what is refused, and that a second run changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.commands.enroll import enroll
from consilium_client.site import Home as SiteHome
from consilium_server.commands.admission import admit
from consilium_server.commands.provision import provision
from consilium_server.federation import Federation
from consilium_server.federation import Home as ServerHome
from consilium_shared import documents
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError, PeerError, SignatureError
from consilium_shared.identity import Identity
from consilium_shared.protocol.joining import make_request, open_invitation, open_request
from consilium_shared.protocol.roster import open_roster

FEDERATION = """\
federation: test-federation
address: 127.0.0.1
port: 9443
sites: [hospital-a, hospital-b]
"""


@pytest.fixture
def server(tmp_path: Path) -> ServerHome:
    file = tmp_path / "federation.yaml"
    file.write_text(FEDERATION)
    home = ServerHome(tmp_path / "server")
    provision(home, file)
    return home


@pytest.fixture
def site(tmp_path: Path, server: ServerHome) -> SiteHome:
    home = SiteHome(tmp_path / "site-a")
    enroll(home, server.invitations / "hospital-a.json")
    return home


def edit(file: Path, **changes: object) -> bytes:
    document = json.loads(file.read_bytes())
    document["body"].update(changes)
    return json.dumps(document).encode()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_provisioning_twice_changes_nothing(server: ServerHome, tmp_path: Path) -> None:
    before = snapshot(server.root)
    assert provision(server, tmp_path / "federation.yaml") == []
    assert snapshot(server.root) == before


def test_a_new_site_in_the_file_gets_an_invitation_and_nothing_else_changes(server: ServerHome, tmp_path: Path) -> None:
    before = snapshot(server.root)
    (tmp_path / "federation.yaml").write_text(FEDERATION.replace("hospital-b]", "hospital-b, hospital-c]"))
    made = provision(server, tmp_path / "federation.yaml")
    after = snapshot(server.root)
    assert len(made) == 1
    assert set(after) - set(before) == {"invitations/hospital-c.json"}
    assert {name for name in before if before[name] != after[name]} == {"federation.yaml"}


def test_private_keys_are_readable_by_their_owner_alone(server: ServerHome, site: SiteHome) -> None:
    keys = [*server.keys.glob("*.key"), *site.keys.glob("*.key")]
    assert {file.name for file in keys} == {
        "coordinator.key",
        "ca.key",
        "superlink.key",
        "identity.key",
        "supernode.key",
    }
    assert all(file.stat().st_mode & 0o077 == 0 for file in keys)


def test_an_invitation_holds_no_secret(server: ServerHome) -> None:
    text = (server.invitations / "hospital-a.json").read_text()
    assert "PRIVATE" not in text
    for key in server.keys.glob("*.key"):
        body = "".join(line for line in key.read_text().splitlines() if "-----" not in line)
        assert body[:40] not in text


def test_the_certificate_is_for_the_address_that_sites_dial_and_signed_by_the_ca(server: ServerHome) -> None:
    certificate = x509.load_pem_x509_certificate((server.keys / "superlink.crt").read_bytes())
    ca = x509.load_pem_x509_certificate((server.keys / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(ca)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "127.0.0.1" in {str(name) for name in names.get_values_for_type(x509.IPAddress)}


def test_site_keys_never_leave_the_site(server: ServerHome, site: SiteHome) -> None:
    request = site.request_file.read_text()
    assert "PRIVATE" not in request
    admit(server, request.encode())
    for key in site.keys.glob("*.key"):
        secret = "".join(line for line in key.read_text().splitlines() if "-----" not in line)
        for name, content in snapshot(server.root).items():
            assert secret[40:80].encode() not in content, name


def test_enrolling_twice_changes_nothing_and_gives_the_same_request(server: ServerHome, site: SiteHome) -> None:
    before = snapshot(site.root)
    again = enroll(site, server.invitations / "hospital-a.json")
    assert not again.new
    assert again.request == site.request_file.read_bytes()
    assert snapshot(site.root) == before


def test_a_home_serves_one_federation(server: ServerHome, site: SiteHome) -> None:
    with pytest.raises(ConfigurationError, match="another invitation"):
        enroll(site, server.invitations / "hospital-b.json")


def test_a_wrong_fingerprint_stops_the_enrolment_before_anything_is_made(server: ServerHome, tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="fingerprint"):
        enroll(home, server.invitations / "hospital-a.json", "0000 " * 8)
    assert not home.root.exists()


def test_the_right_fingerprint_is_accepted_however_it_is_spaced(server: ServerHome, tmp_path: Path) -> None:
    fingerprint = server.coordinator().public.fingerprint.replace(" ", "").upper()
    assert enroll(SiteHome(tmp_path / "other"), server.invitations / "hospital-a.json", fingerprint).new


@pytest.mark.parametrize(
    "change",
    [{"address": "evil.example"}, {"site": "hospital-b"}, {"port": 1}, {"ca_fingerprint": "0" * 64}, {"extra": 1}],
)
def test_an_edited_invitation_is_refused(server: ServerHome, change: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        open_invitation(edit(server.invitations / "hospital-a.json", **change))


def test_a_reindented_invitation_is_still_the_invitation(server: ServerHome) -> None:
    data = (server.invitations / "hospital-a.json").read_bytes()
    assert open_invitation(json.dumps(json.loads(data)).encode()) == open_invitation(data)


def test_admitting_twice_changes_nothing(server: ServerHome, site: SiteHome) -> None:
    request = site.request_file.read_bytes()
    assert admit(server, request)[1]
    before = snapshot(server.root)
    assert not admit(server, request)[1]
    assert snapshot(server.root) == before
    assert [member.site for member in server.roster().members] == ["hospital-a"]


@pytest.mark.parametrize(
    "change",
    [{"site": "hospital-b"}, {"identity": "1" * 64}, {"supernode": "ssh-ed25519 AAAA"}, {"federation": "2" * 64}],
)
def test_an_edited_request_is_refused(server: ServerHome, site: SiteHome, change: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        admit(server, edit(site.request_file, **change))
    assert server.roster().members == ()


def test_a_request_for_another_sites_invitation_is_refused(server: ServerHome) -> None:
    """The thief of hospital-a's invitation cannot call himself hospital-b."""
    invitation = open_invitation((server.invitations / "hospital-a.json").read_bytes())
    stolen = invitation.model_copy(update={"site": "hospital-b"})
    request = make_request(stolen, Identity.generate(), ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(PeerError, match="invitation"):
        admit(server, request)


def test_a_request_that_does_not_prove_the_supernode_key_is_refused(server: ServerHome) -> None:
    invitation = open_invitation((server.invitations / "hospital-a.json").read_bytes())
    identity = Identity.generate()
    honest = open_request(make_request(invitation, identity, ec.generate_private_key(ec.SECP384R1())))
    other = open_request(make_request(invitation, identity, ec.generate_private_key(ec.SECP384R1())))
    body = {**honest.model_dump(mode="json"), "supernode": other.supernode}
    with pytest.raises(PeerError, match="SuperNode"):
        open_request(documents.seal(body, "join-request", identity))


def test_a_second_key_under_an_admitted_name_is_refused(server: ServerHome, site: SiteHome, tmp_path: Path) -> None:
    admit(server, site.request_file.read_bytes())
    second = SiteHome(tmp_path / "impostor")
    enroll(second, server.invitations / "hospital-a.json")
    with pytest.raises(PeerError, match="other keys"):
        admit(server, second.request_file.read_bytes())


def test_an_edited_roster_is_refused_with_the_file_and_what_to_do(server: ServerHome, site: SiteHome) -> None:
    admit(server, site.request_file.read_bytes())
    server.roster_file.write_bytes(edit(server.roster_file, version=9))
    with pytest.raises(ConfigurationError, match=r"roster\.json.*backup"):
        server.roster()


def test_a_roster_of_another_coordinator_is_refused(server: ServerHome) -> None:
    with pytest.raises(SignatureError):
        open_roster(server.roster_file.read_bytes(), Identity.generate().public, server.federation_id())


def forged(site: SiteHome, change: Callable[[str], str]) -> bytes:
    """The site's request with its SuperNode key written another way, signed by the site itself."""
    identity, document = site.identity(), json.loads(site.request_file.read_bytes())
    body = {**document["body"], "supernode": change(document["body"]["supernode"])}
    return documents.seal(body, "join-request", identity)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key + " admin@hospital",
        lambda key: key + "\n",
        lambda key: key.replace(" ", "  "),
        lambda key: key[:-3] + chr(ord(key[-3]) + 1) + "==",  # other spare bits of the same base64
        lambda key: "ssh-unknown " + key.split()[1],
        lambda key: "ecdsa-sha2-nistp384 " + "A" * 182 + "==",
    ],
)
def test_one_supernode_key_is_one_text(site: SiteHome, server: ServerHome, change: Callable[[str], str]) -> None:
    with pytest.raises(PeerError):
        open_request(forged(site, change))
    assert admit(server, site.request_file.read_bytes())[1]


def test_a_key_of_a_kind_that_nobody_knows_is_the_peers_error(site: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: bytes) -> None:
        raise UnsupportedAlgorithm("no such curve here")

    monkeypatch.setattr(serialization, "load_ssh_public_key", unsupported)
    with pytest.raises(PeerError, match="SuperNode key"):
        open_request(site.request_file.read_bytes())


@pytest.mark.parametrize("address", ["::1", "fd00:77::1", "::", "consilium.example.org", "10.0.0.1"])
def test_an_address_may_be_a_name_or_a_literal_of_either_kind(tmp_path: Path, address: str) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text(f'federation: test\naddress: "{address}"\nlisten: "{address}"\nsites: [a]\n')
    assert load_yaml(file, Federation).address == address


def test_an_address_with_a_port_or_brackets_is_told_how_to_be_written(tmp_path: Path) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text('federation: test\naddress: "a.b:8443"\nsites: [a]\n')
    with pytest.raises(ConfigurationError, match="without brackets and port"):
        load_yaml(file, Federation)
