"""Ends of different releases: they speak what both know, or refuse each other by number before anything is trained."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from consilium_audit import cli as audit_cli
from consilium_client.commands import cli as site_cli
from consilium_server.commands import cli as server_cli
from consilium_server.state.study_folder import StudyFolder
from consilium_server.study.context import StudyContext
from consilium_shared import documents
from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.errors import IntegrityError, PeerError, VersionError
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.protocol import messages
from consilium_shared.protocol.joining import make_request, open_invitation, open_request
from consilium_shared.protocol.messages import Advertised, ApprovalStatus, Head, Payload, Propose, Refusal, Update
from consilium_shared.protocol.records import RECORD_DOMAIN, open_record
from consilium_shared.protocol.roster import open_roster
from consilium_shared.schema import SCHEMA, written_out
from consilium_shared.study import Study

JOINING = Path(__file__).parents[2] / "vectors" / "joining"
INDEX: dict[str, str] = json.loads((JOINING / "index.json").read_text())


def signed(key: Identity, body: dict[str, Any], domain: str = messages.REQUEST_DOMAIN) -> bytes:
    return canonical_bytes({"body": body, "signature": key.sign(domain, canonical_bytes(body)).hex()})


def body_of(header: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(header)["body"]
    return body


# -- at a site


def test_a_message_of_a_protocol_to_come_is_refused_by_its_number_and_not_entered(site: Any) -> None:
    c = site.coordinator
    before = site.kinds()
    to_come = {**body_of(c.propose()), "protocol": SCHEMA + 1, "unheard_of": {}}
    header, pieces = site.requests.handle(signed(c.key, to_come), b"")
    answer = c.read((header, pieces))
    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.protocol) == ("version", SCHEMA)
    assert f"protocol {SCHEMA + 1}; its reader speaks protocols 1 to {SCHEMA}: upgrade" in answer.detail
    assert site.kinds() == before


def test_an_unknown_field_in_a_known_protocol_is_no_version_but_malformed(site: Any) -> None:
    c = site.coordinator
    answer = c.read(site.requests.handle(signed(c.key, {**body_of(c.propose()), "unheard_of": 1}), b""))
    assert (answer.reason, answer.protocol) == ("malformed", SCHEMA)


def test_a_study_of_a_schema_to_come_is_refused_before_anybody_decides(site: Any) -> None:
    c = site.coordinator
    contract = {**c.study.contract, "schema_version": SCHEMA + 1, "unheard_of": 1}
    about = {**c.common(), "study": digest(canonical_bytes(contract))}
    proposal = Propose(**about, contract=contract, roster_document=c.roster)
    answer = site.ask(messages.encode(proposal, c.key))
    assert answer.reason == "version"
    assert f"schema {SCHEMA + 1}; its reader knows schemas 1 to {SCHEMA}" in answer.detail
    assert not site.service.proposals.digests()


def test_a_coordinator_of_release_0_1_is_answered_in_its_protocol(site: Any) -> None:
    """It refuses every field that it does not know, so it is sent none: not in an answer, not in a refusal."""
    c = site.coordinator
    old = Study.from_contract(written_out(c.study, 1))
    assert "schema_version" not in old.contract

    def ask(request: bytes, payload: bytes = b"") -> messages.Answer:
        message = messages.decode_request(request, c.key.public)
        header, pieces = site.requests.handle(messages.encode(message, c.key, 1), payload)
        assert "protocol" not in body_of(header)
        return cast(messages.Answer, c.read((header, pieces)))

    assert isinstance(ask(c.propose(old)), ApprovalStatus)
    site.service.approvals.approve(site.service.proposals.find(old.digest), "tester")
    assert isinstance(ask(c.train(model=c.pack(old), study=old), c.pack(old)), Update)
    header, _ = site.requests.handle(signed(c.key, {"kind": "nothing"}), b"")
    assert "protocol" not in body_of(header)
    header, _ = site.requests.handle(b"noise", b"")
    assert "protocol" not in body_of(header)


def test_an_answer_is_of_the_protocol_of_its_request(site: Any) -> None:
    assert body_of(site.requests.handle(site.coordinator.propose(), b"")[0])["protocol"] == SCHEMA


def test_a_site_that_went_back_to_an_older_release_says_so_and_calls_nothing_damaged(site: Any) -> None:
    c = site.coordinator
    contract = {**c.study.contract, "schema_version": SCHEMA + 1}
    file = site.service.proposals.folder / f"{digest(canonical_bytes(contract))}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(canonical_bytes({"contract": contract, "roster": "0" * 64, "identities": {}}))
    with pytest.raises(IntegrityError, match=f"later release: a contract of schema {SCHEMA + 1}"):
        site.service.proposals.get(file.stem)


# -- at the coordinator


def conversation(c: Any, study: Study) -> StudyContext:
    folder = StudyFolder(c.home.studies / study.study)
    folder.create(study, c.home.roster_file.read_bytes())
    return StudyContext(c.home, folder, cast(Any, None), {})


def refusal_of_release_0_1(c: Any, header: bytes) -> Any:
    """How a site of release 0.1 answers what it cannot read."""
    refusal = Refusal(
        federation=c.home.roster().federation,
        study="0" * 64,
        site="hospital-a",
        request=digest(header),
        head=Head(seq=1, sha256="e" * 64),
        reason="malformed",
        detail="a message with unknown or missing fields, or values out of bounds",
    )
    return SimpleNamespace(
        site="hospital-a", header=messages.encode(refusal, c.site.identity(), 1), payload=Payload.of(b"")
    )


def test_a_site_of_release_0_1_is_named_with_its_protocol_and_what_to_do(coordinator: Any) -> None:
    context = conversation(coordinator, coordinator.study)
    request = coordinator.propose()
    answer = context.decode(refusal_of_release_0_1(coordinator, request), request)
    assert isinstance(answer, Refusal)
    assert answer.reason == "version"
    assert "the site speaks protocol 1 (release 0.1), the study protocol 2" in answer.detail
    assert "schema_version: 1" in answer.detail


def test_a_refusal_of_something_else_is_nobodys_answer(coordinator: Any) -> None:
    context = conversation(coordinator, coordinator.study)
    arrival = refusal_of_release_0_1(coordinator, b"another request")
    with pytest.raises(PeerError, match="another question"):
        context.decode(arrival, coordinator.propose())


def test_a_study_in_schema_1_is_proposed_in_the_bytes_of_release_0_1(coordinator: Any) -> None:
    old = Study.from_contract(written_out(coordinator.study, 1))
    context = conversation(coordinator, old)
    proposal = Propose(**context.common, contract=old.contract, roster_document=context.folder.roster_document())
    body = body_of(context.encode(proposal))
    assert set(body) == {"kind", "federation", "study", "roster", "payload", "contract", "roster_document"}
    assert "schema_version" not in body["contract"]


def test_an_answer_of_a_protocol_to_come_is_refused_by_its_number(coordinator: Any) -> None:
    """No site sends one: it answers in the protocol of the request."""
    key = coordinator.site.identity()
    for kind in (Advertised, Update):
        header = signed(key, {"kind": kind.model_fields["kind"].default, "protocol": SCHEMA + 1}, "answer")
        with pytest.raises(VersionError, match=f"protocol {SCHEMA + 1}"):
            messages.decode_answer(header, key.public)


# -- documents


def test_a_record_of_a_protocol_to_come_is_refused_by_its_number() -> None:
    key = Identity.generate()
    record = documents.seal({"protocol": SCHEMA + 1, "unheard_of": 1}, RECORD_DOMAIN, key)
    with pytest.raises(VersionError, match=f"protocol {SCHEMA + 1}; its reader speaks protocols 1 to {SCHEMA}"):
        open_record(record, key.public)


def test_documents_of_release_0_1_are_read_under_their_digests() -> None:
    invitation = open_invitation((JOINING / "invitation.json").read_bytes())
    assert (
        invitation.digest
        == INDEX["invitation"]
        == open_request((JOINING / "join-request.json").read_bytes()).invitation
    )
    coordinator = PublicIdentity.from_hex(INDEX["coordinator"])
    roster = open_roster((JOINING / "roster.json").read_bytes(), coordinator, INDEX["federation"])
    assert roster.digest == INDEX["roster"]


def test_a_request_to_release_0_1_has_no_field_that_it_does_not_know() -> None:
    """Its coordinator refuses unknown fields; so this release's site joins it by what its invitation shows."""
    key, supernode = Identity.generate(), ec.generate_private_key(ec.SECP384R1())
    old = open_invitation((JOINING / "invitation.json").read_bytes())
    request = make_request(old, key, supernode)
    assert body_of(request).keys() == body_of((JOINING / "join-request.json").read_bytes()).keys()
    assert open_request(request).formats is None


def test_a_request_to_this_release_says_what_the_site_speaks(coordinator: Any) -> None:
    request = open_request(coordinator.site.request_file.read_bytes())
    assert request.formats is not None
    assert (request.formats.oldest, request.formats.newest) == (1, SCHEMA)


def test_ends_without_a_common_protocol_refuse_each_other_when_they_join(coordinator: Any) -> None:
    formats = {"oldest": SCHEMA + 1, "newest": SCHEMA + 3}
    invitation = coordinator.home.invitations / "hospital-a.json"
    to_come = {**body_of(invitation.read_bytes()), "formats": formats, "unheard_of": 1}
    with pytest.raises(
        VersionError, match=f"coordinator's end speaks protocols {SCHEMA + 1} to .*upgrade Consilium here"
    ):
        open_invitation(documents.seal(to_come, "invitation", coordinator.key))
    request = {**body_of(coordinator.site.request_file.read_bytes()), "formats": formats, "unheard_of": 1}
    with pytest.raises(VersionError, match=f"site's end speaks protocols {SCHEMA + 1} to .*upgrade Consilium here"):
        open_request(documents.seal(request, "join-request", coordinator.site.identity()))


def test_a_neighbour_of_a_release_to_come_joins(coordinator: Any) -> None:
    """As long as it still speaks what this release speaks."""
    body = body_of(coordinator.site.request_file.read_bytes())
    request = {**body, "formats": {"oldest": SCHEMA, "newest": SCHEMA + 5}}
    sealed = documents.seal(request, "join-request", coordinator.site.identity())
    assert open_request(sealed).site == body["site"]


# -- the programs


@pytest.mark.parametrize(
    ("app", "program"),
    [(server_cli.app, "consilium-server"), (site_cli.app, "consilium-site"), (audit_cli.app, "consilium-audit")],
    ids=["server", "site", "audit"],
)
def test_every_program_says_its_release_and_what_it_speaks(app: typer.Typer, program: str) -> None:
    release = importlib.metadata.version("consilium")
    assert CliRunner().invoke(app, ["--version"], prog_name=program).stdout == f"{program} {release}\n"
    told = json.loads(CliRunner().invoke(app, ["version", "--json"]).stdout)
    assert told["consilium"] == release
    assert told["formats"]["contract_schema"] == told["formats"]["protocol"] == {"oldest": 1, "newest": SCHEMA}
