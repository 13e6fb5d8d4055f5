"""What an agent refuses when it is asked through its real socket, and what the hospital's people and budget refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from consilium_client.agent_socket import AgentChannel
from consilium_server.federation import Home
from consilium_shared import documents, messages
from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.identity import Identity
from consilium_shared.messages import Evaluate, Payload, Propose, Refusal, Train, Update
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import event_from_dict
from consilium_shared.roster import Roster
from consilium_shared.study import Study

if TYPE_CHECKING:
    from conftest import Hospitals

SITES = ["north", "south", "west"]
MINIMUM = 3


@dataclass
class Coordinator:
    """Whoever holds the coordinator's key and can reach the socket of the site "north"."""

    hospitals: Hospitals
    study: Study
    key: Identity
    roster: Roster

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
        fields = self.common(**{"payload": Payload.of(self.model), **changes})
        return messages.encode(Train(round=number, **fields), self.key)

    def propose(self, roster: Roster | None = None, signer: Identity | None = None, **changes: Any) -> bytes:
        """The header of a proposal of the study."""
        roster = roster or self.roster
        document = json.loads(roster.sign(signer or self.key))
        fields = self.common(**{"roster": roster.digest, "contract": self.study.contract, **changes})
        return messages.encode(Propose(roster_document=document, **fields), self.key)

    def ask(self, header: bytes, payload: bytes = b"") -> tuple[messages.Answer, bytes, bytes]:
        """The verified answer of "north", its header and its payload."""
        member = self.roster.member("north")
        assert member is not None
        socket = self.hospitals.site("north") / "run" / "agent.sock"
        answer, body = AgentChannel(socket).exchange(header, payload)
        decoded = messages.decode_answer(answer, documents_key(member.identity))
        assert decoded.request == digest(header)
        return decoded, answer, body


def documents_key(text: str) -> Any:
    from consilium_shared.identity import PublicIdentity

    return PublicIdentity.from_hex(text)


@pytest.fixture(scope="module")
def coordinator(hospitals: Hospitals, contract: Callable[..., dict[str, Any]]) -> Coordinator:
    """After the first two of three rounds: "north" has answered round 2 and was never asked for round 3."""
    study = hospitals.run_study(contract("asked", private=False))
    hospitals.until(lambda: len(hospitals.closed("asked")) == 2, "two rounds")
    hospitals.at_server("stop", "asked")
    return Coordinator(hospitals, study, Home(hospitals.server).coordinator(), hospitals.folder("asked").roster(Home(hospitals.server)))
