"""What an agent refuses when it is asked through its real socket, and what the hospital's people and budget refuse."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from consilium_client.site import Home as SiteHome
from consilium_client.transport.agent_socket import AgentChannel
from consilium_server.federation import Home
from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.ledger.entry import Refuse, Release
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import (
    Advertise,
    Advertised,
    Evaluate,
    Handshake,
    Payload,
    Propose,
    Recorded,
    Refusal,
    Train,
    Update,
)
from consilium_shared.protocol.roster import Roster
from consilium_shared.secagg.handshake import SessionKeys, encode_bundles
from consilium_shared.secagg.keys import private_key
from consilium_shared.secagg.terms import Advert
from consilium_shared.study import Study

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ["north", "south", "west"]


def digest_bytes(site: str, number: int) -> bytes:
    """32 bytes for a key of a site in these tests."""
    return bytes.fromhex(digest(f"{site} {number}".encode()))


@dataclass
class Coordinator:
    """Whoever holds the coordinator's key and can reach the socket of the site "north"."""

    hospitals: Hospitals
    study: Study
    key: Identity
    roster: Roster
    adverts: dict[int, dict[str, Advert]] = field(default_factory=dict)
    """Round to the keys of all three sites."""

    def meet(self, number: int) -> None:
        """Keys for a round: "north" is asked, and we have those of the others' identities at hand."""
        asked = Advertise(**self.common(), of="training", round=number, attempt=1)
        answer, _, _ = self.ask(messages.encode(asked, self.key))
        assert isinstance(answer, Advertised)
        self.adverts[number], bundles = {"north": answer.advert}, {"north": answer.bundle}
        for site in SITES[1:]:
            identity = SiteHome(self.hospitals.site(site)).identity()
            key = private_key(digest_bytes(site, number), "a test").public_key().public_bytes_raw()
            self.adverts[number][site] = Advert.sign(asked.slot, site, key, identity)
            about = (self.study.digest, self.roster.digest, site, identity)
            bundles[site] = SessionKeys(digest_bytes(site, 0), *about).bundle
        payload = encode_bundles(bundles)
        self.ask(messages.encode(Handshake(**self.common(payload=Payload.of(payload))), self.key), payload)

    @property
    def model(self) -> bytes:
        """A global model of the study."""
        return pack(to_vector(build(self.study)), self.study)

    def common(self, **changes: Any) -> dict[str, Any]:
        """The fields of every request."""
        fields = {"federation": self.roster.federation, "study": self.study.digest, "roster": self.roster.digest}
        return {**fields, **changes}

    def train(self, number: int, **changes: Any) -> bytes:
        """The header of a request to train from ``model``."""
        shown = Recorded(round=number - 1, record=digest(b"a record"), heads={}) if number > 1 else None
        fields = self.common(**{"payload": Payload.of(self.model), "recorded": shown, **self.keys(number), **changes})
        return messages.encode(Train(round=number, **fields), self.key)

    def keys(self, number: int) -> dict[str, Any]:
        """What a request says of the cohort."""
        return {"attempt": 1, "adverts": self.adverts.get(number, self.adverts[1]), "encapsulated": {}}

    def propose(self, roster: Roster | None = None, signer: Identity | None = None, **changes: Any) -> bytes:
        """The header of a proposal of the study."""
        roster = roster or self.roster
        document = json.loads(roster.sign(signer or self.key))
        fields = self.common(**{"roster": roster.digest, "contract": self.study.contract, **changes})
        return messages.encode(Propose(roster_document=document, **fields), self.key)

    def evaluate(self, number: int) -> bytes:
        """The header of a request to evaluate ``model``."""
        fields = self.common(payload=Payload.of(self.model), **self.keys(number))
        return messages.encode(Evaluate(round=number, **fields), self.key)

    def propose_with(self, **unknown: str) -> bytes:
        """A proposal whose contract has more fields than a study has, under its own digest."""
        contract = {**self.study.contract, **unknown}
        return self.propose(contract=contract, study=digest(canonical_bytes(contract)))

    def without_north(self) -> Roster:
        """A roster of the others, which the coordinator may well sign."""
        others = tuple(member for member in self.roster.members if member.site != "north")
        return self.roster.model_copy(update={"members": others, "version": self.roster.version + 1})

    def signed_by(self, key: Identity, purpose: str = "request", **unknown: int) -> bytes:
        """The body of ``train(3)`` with ``unknown`` fields, signed by that key for that purpose."""
        body = {**json.loads(self.train(3))["body"], **unknown}
        signature = key.sign(purpose, canonical_bytes(body)).hex()
        return canonical_bytes({"body": body, "signature": signature})

    def ask(self, header: bytes, payload: bytes = b"") -> tuple[messages.Answer, bytes, bytes]:
        """The verified answer of "north", its header and its payload."""
        member = self.roster.member("north")
        assert member is not None
        socket = self.hospitals.site("north") / "run" / "agent.sock"
        answer, body = AgentChannel(socket).exchange(header, payload)
        decoded = messages.decode_answer(answer, PublicIdentity.from_hex(member.identity))
        assert decoded.request == digest(header)
        return decoded, answer, body


@pytest.fixture(scope="module")
def coordinator(hospitals: Hospitals, contract: Callable[..., dict[str, Any]]) -> Iterator[Coordinator]:
    """The site "north" alone has approved the study, and we asked it for rounds 1 and 2."""
    study = hospitals.start(contract("asked", private=False))
    hospitals.decide("asked", "approve", "north")
    heard = {"event": "proposal", "site": "north", "state": "approved"}
    hospitals.until(lambda: any(heard.items() <= event.items() for event in hospitals.events("asked")), "it is heard")
    home = Home(hospitals.server)
    coordinator = Coordinator(hospitals, study, home.coordinator(), hospitals.folder("asked").roster(home))
    for number in (1, 2, 3):
        coordinator.meet(number)
    first = pack(to_vector(build(study)) + 5e-7, study)  # without privacy no model is worked on twice
    for number, model in ((1, first), (2, coordinator.model)):
        answer, _, _ = coordinator.ask(coordinator.train(number, payload=Payload.of(model)), model)
        assert isinstance(answer, Update), answer
    yield coordinator
    hospitals.at_server("stop", "asked")


def test_the_same_question_gets_the_same_bytes_and_no_second_charge(coordinator: Coordinator) -> None:
    charged = coordinator.hospitals.charges("north", coordinator.study)
    first = coordinator.ask(coordinator.train(2), coordinator.model)
    assert coordinator.ask(coordinator.train(2), coordinator.model) == first
    assert len(charged) == len(coordinator.hospitals.charges("north", coordinator.study)) == 2


FOREIGN = "ab" * 32
WRONG: dict[str, tuple[str, bool, Callable[[Coordinator], tuple[bytes, bytes]]]] = {
    # what is wrong: (reason code, whether the coordinator signed it so that it is written down, the message)
    "a study that nobody proposed": ("unknown-study", True, lambda c: (c.train(3, study=FOREIGN), c.model)),
    "another roster": ("wrong-roster", True, lambda c: (c.train(3, roster=FOREIGN), c.model)),
    "another federation": ("wrong-federation", True, lambda c: (c.train(3, federation=FOREIGN), c.model)),
    "an old round": ("stale-round", True, lambda c: (c.train(1), c.model)),
    "another model for the round": ("stale-round", True, lambda c: (c.train(2, payload=Payload.of(b"x")), b"x")),
    "a round beyond the approved": ("policy", True, lambda c: (c.train(4), c.model)),
    "an evaluation beyond the approved": ("policy", True, lambda c: (c.evaluate(4), c.model)),
    "bytes that are no model": ("model", True, lambda c: (c.train(3, payload=Payload.of(b"x")), b"x")),
    "another payload than described": ("malformed", True, lambda c: (c.train(3), c.model + b"x")),
    "no payload": ("malformed", True, lambda c: (c.evaluate(3), b"")),
    "a contract under a foreign digest": ("malformed", True, lambda c: (c.propose(study=FOREIGN), b"")),
    "a contract with an unknown field": ("malformed", True, lambda c: (c.propose_with(run="rm -rf /"), b"")),
    "a roster without this site": ("wrong-roster", True, lambda c: (c.propose(c.without_north()), b"")),
    "a roster signed by another": ("bad-signature", True, lambda c: (c.propose(signer=Identity.generate()), b"")),
    "another key": ("bad-signature", False, lambda c: (c.signed_by(Identity.generate()), c.model)),
    "an altered request": ("bad-signature", False, lambda c: (altered(c.train(3)), c.model)),
    "a signature for another purpose": ("bad-signature", False, lambda c: (c.signed_by(c.key, "answer"), c.model)),
    "an unknown field": ("malformed", False, lambda c: (c.signed_by(c.key, extra=1), c.model)),
    "no JSON": ("malformed", False, lambda c: (b"\x80\x04run", b"")),
    "JSON that is not canonical": ("malformed", False, lambda c: (b" " + c.train(3), c.model)),
    "nesting without end": ("malformed", False, lambda c: (b"[" * 100_000, b"")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_request_is_refused_with_the_reason_and_nothing_is_charged(coordinator: Coordinator, wrong: str) -> None:
    reason, signed, message = WRONG[wrong]
    before = coordinator.hospitals.ledger("north")
    answer, header, payload = coordinator.ask(*message(coordinator))

    assert isinstance(answer, Refusal), wrong
    assert (answer.reason, payload) == (reason, b"")
    after = coordinator.hospitals.ledger("north").entries[len(before.entries) :]
    if signed:
        assert [entry.kind for entry in after] == ["refuse", "release"]
        refused, released = (entry.body for entry in after)
        assert isinstance(refused, Refuse) and isinstance(released, Release)
        assert (refused.reason, released.sha256) == (reason, digest(header))
    else:  # strangers must not be able to fill the disk
        assert after == ()


def altered(header: bytes) -> bytes:
    """The header with another round in it."""
    assert header.count(b'"round":3') == 1
    return header.replace(b'"round":3', b'"round":2')


def test_a_study_waits_for_whoever_has_not_approved_and_stops_when_the_hospital_says_no(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    study = hospitals.start(contract("undecided", private=True))
    hospitals.decide("undecided", "approve", "north", "south")
    hospitals.until(lambda: "2 of at least 3" in hospitals.waiting("undecided"), "two have approved")
    status = told(hospitals, "undecided")
    assert status["waiting"] == "2 of at least 3 sites; waiting for west (not decided)"
    assert (status["state"], status["rounds_done"]) == ("running", 0)
    assert hospitals.proposed("west")["undecided"] == "pending"
    assert [event for event in hospitals.events("undecided") if event["event"] == "round"] == []

    hospitals.decide("undecided", "reject", "west", reason="not with our patients")
    assert hospitals.ended("undecided") == "stopped"
    status = told(hospitals, "undecided")
    assert status["sites"]["west"] == "refused (rejected)"
    assert "3 sites are needed, 2 take part" in status["why"]
    assert "west" in status["why"]
    assert all(hospitals.charges(site, study) == [] for site in SITES)


def test_an_approval_that_is_withdrawn_stops_the_site_at_the_next_round(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    """Withdrawn between a round's update and its opening, which then needs the site, it stops the study itself."""
    for again in range(5):
        name = f"withdrawn-{again}"
        study = hospitals.run_study(contract(name, private=False, min_sites=2, rounds=4))
        hospitals.until(lambda name=name: "west" in hospitals.answered(name, 1, "opening"), "west opens", pause=0.01)  # type: ignore[misc]
        supernode = hospitals.pid("west", "consilium_client.transport.supernode")
        os.kill(supernode, signal.SIGSTOP)  # the next question does not come before the withdrawal
        try:
            hospitals.decide(name, "reject", "west", reason="a patient objected")
        finally:
            os.kill(supernode, signal.SIGCONT)
        charged = len(hospitals.charges("west", study))
        if hospitals.ended(name) == "finished":
            break
        assert told(hospitals, name)["why"].startswith("round ")
    assert hospitals.state(name) == "finished"
    assert told(hospitals, name)["sites"]["west"] == "stopped: rejected"
    assert len(hospitals.charges("west", study)) == charged < 4
    assert hospitals.records(name)[-1]["participants"] == ["north", "south"]


def test_a_study_that_a_budget_does_not_cover_waits_for_the_hospital_to_say_so_and_costs_it_nothing(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    names = ("costly-first", "costly-second")
    first, second = (hospitals.start(contract(name, private=True, asset="tight", min_sites=2)) for name in names)
    for name in names:  # each fits alone, and nothing is spent yet
        hospitals.until(partial(hospitals.knows, "south", name), f"south hears of {name}", "south")
        assert hospitals.proposed("south")[name] == "pending"
        assert hospitals.admin("south", "estimate", study=name)["affordable"]
    hospitals.decide("costly-first", "approve", "south")
    assert not hospitals.admin("south", "estimate", study="costly-second")["affordable"]
    with pytest.raises(AssertionError, match=r"more is reserved for approved studies.*over by"):
        hospitals.decide("costly-second", "approve", "south")
    assert hospitals.proposed("south")["costly-second"] == "pending"
    for name in names:
        hospitals.decide(name, "approve", "north", "west")
    hospitals.decide("costly-second", "reject", "south", reason="not this year")
    assert [hospitals.ended(name) for name in names] == ["finished", "finished"]

    assert [record["participants"] for record in hospitals.records(first.study)] == [SITES] * 3
    assert [record["participants"] for record in hospitals.records(second.study)] == [["north", "west"]] * 3
    ledger = hospitals.ledger("south")
    refusals = [entry.body for entry in ledger.entries if isinstance(entry.body, Refuse)]
    reasons = [body.reason for body in refusals if body.study == second.digest]
    assert set(reasons) == {"rejected"}
    charges = [each.body for each in ledger.books.charges.values() if each.body.asset == "tight"]
    assert {body.study for body in charges} == {first.digest}
    (spending,) = (each for each in hospitals.admin("south", "budget") if each["asset"] == "tight")
    assert spending["reserved"] == 0, "the study is over"


def told(hospitals: Hospitals, study: str) -> dict[str, Any]:
    """What ``consilium-server status`` says of a study."""
    found: dict[str, Any] = hospitals.status()["studies"][study]
    return found
