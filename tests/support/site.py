"""The agent without its sockets, and a coordinator that signs requests as the server does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tests.support import studies
from tests.support.neighbours import Neighbour, Neighbours, Sum

from consilium_client.agent.requests import RequestHandler
from consilium_client.agent.study_service import StudyService
from consilium_client.commands.enroll import enroll
from consilium_client.site import Home as SiteHome
from consilium_server.commands.admission import admit
from consilium_server.commands.provision import provision
from consilium_server.federation import Home as ServerHome
from consilium_shared.canonical import digest
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import Purpose as ChargedFor
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import (
    ApprovalStatus,
    Close,
    Evaluate,
    Payload,
    Propose,
    Recorded,
    Shares,
    Signed,
    Train,
)
from consilium_shared.protocol.summand import Opened
from consilium_shared.secagg.terms import Purpose, Slot
from consilium_shared.study import Study

PATIENTS = 80
CONTRACT: dict[str, Any] = studies.contract(
    "logistic",
    {
        "asset": "synthetic-table",
        "label": {"column": "label", "classes": ["a", "b"]},
        "features": [{"name": "x"}, {"name": "y"}],
    },
    name="synthetic-study",
    training={"rounds": 3, "steps_per_round": 2, "expected_batch": 16},
    privacy={"epsilon": 2.0, "delta": 1e-3, "clipping_norm": 1.0},
    aggregation={"min_sites": 2},
    evaluation={"epsilon": 0.5},
)
SITE_YAML = """\
site: hospital-a
assets:
  synthetic-table: {{kind: table, path: synthetic.csv}}
policy:
  budgets: {{synthetic-table: {{epsilon: {epsilon}, delta: 1.0e-3}}}}
  minimum_patients: 20
  {policy}
device: cpu
"""


class Coordinator:
    """The other end: signs requests as the server does, and reads the answers."""

    def __init__(self, folder: Path, epsilon: float = 5.0, policy: str = "") -> None:
        folder.mkdir(exist_ok=True)
        (folder / "federation.yaml").write_text(
            "federation: test\naddress: 127.0.0.1\nsites: [clinic-c, hospital-a, hospital-b]\n"
        )
        self.home = ServerHome(folder / "server")
        provision(self.home, folder / "federation.yaml")
        self.site = SiteHome(folder / "a")
        neighbours = {}
        for name in ("clinic-c", "hospital-a", "hospital-b"):
            home = SiteHome(folder / name[-1])
            enroll(home, self.home.invitations / f"{name}.json")
            admit(self.home, home.request_file.read_bytes())
            neighbours[name] = Neighbour(name, home.identity())
        draw = np.random.default_rng(1)
        rows = [f"P{i},{'ab'[i % 2]},{draw.normal():.3f},{draw.normal() + i % 2:.3f}" for i in range(PATIENTS)]
        (self.site.root / "synthetic.csv").write_text("patient,label,x,y\n" + "\n".join(rows) + "\n")
        self.site.config_file.write_text(SITE_YAML.format(epsilon=epsilon, policy=policy))
        self.study = Study.model_validate(CONTRACT)
        self.model = self.pack(self.study)
        self.key = self.home.coordinator()
        self.roster = json.loads(self.home.roster_file.read_bytes())
        self.agent: Callable[[bytes, bytes], tuple[bytes, bytes]] | None = None
        """Asks hospital-a."""
        self.neighbours = Neighbours(neighbours)
        self.others: tuple[str, ...] = ("hospital-b",)
        """Of the cohort."""
        self.abandoning = True
        """Whether they give up earlier attempts when they are asked for a key."""
        self.asked: dict[tuple[Any, ...], bytes] = {}

    def pack(self, study: Study) -> bytes:
        """The untrained model of a study."""
        return pack(to_vector(build(study)), study)

    def common(self, study: Study | None = None) -> dict[str, Any]:
        roster = self.home.roster()
        return {"federation": roster.federation, "study": (study or self.study).digest, "roster": roster.digest}

    def propose(self, study: Study | None = None) -> bytes:
        study = study or self.study
        proposal = Propose(**self.common(study), contract=study.contract, roster_document=self.roster)
        return messages.encode(proposal, self.key)

    def train(
        self,
        number: int = 1,
        model: bytes | None = None,
        study: Study | None = None,
        attempt: int = 1,
        recorded: Recorded | Literal["usual"] | None = "usual",
    ) -> bytes:
        """A round's request, with the keys of the cohort; where hospital-a gives none, with somebody else's for it."""
        if recorded == "usual":
            recorded = self.recorded(number - 1) if number > 1 else None
        return self._contribute(Train, "training", number, model, study or self.study, attempt, recorded=recorded)

    def _contribute(
        self,
        kind: type[Train] | type[Evaluate],
        purpose: Purpose,
        number: int,
        model: bytes | None,
        study: Study,
        attempt: int,
        **more: Any,
    ) -> bytes:
        model = self.model if model is None else model
        key = (study.digest, purpose, number, attempt, digest(model), self.others, str(more))
        if key not in self.asked:
            slot = Slot(**self.common(study), purpose=purpose, round=number, attempt=attempt)
            adverts, sent, given = self.neighbours.meet(self, slot, study, self.others, self.abandoning)
            about: dict[str, Any] = {"round": number, "attempt": attempt, "adverts": adverts, "encapsulated": sent}
            request = kind(**self.common(study), **about, **more, payload=Payload.of(model))
            header = messages.encode(request, self.key)
            if not given:
                return header
            self.neighbours.agree(self, request, study)
            self.asked[key] = header
        return self.asked[key]

    def recorded(self, number: int, **changes: Any) -> Recorded:
        """What is shown of a round in which the site took no part, by default."""
        heads = {"hospital-b": {"seq": 10 * number, "sha256": digest(f"entry of round {number}".encode())}}
        shown = {"round": number, "record": digest(f"record {number}".encode()), "heads": heads, **changes}
        return Recorded.model_validate(shown)

    def close(self, number: int, **changes: Any) -> bytes:
        return messages.encode(Close(**self.common(), recorded=self.recorded(number, **changes)), self.key)

    def evaluate(
        self, number: int = 3, model: bytes | None = None, study: Study | None = None, attempt: int = 1
    ) -> bytes:
        """A request for counts in a sum of their own; the rest as ``train``."""
        return self._contribute(Evaluate, "evaluation", number, model, study or self.study, attempt)

    def sum(self, header: bytes, answer: tuple[bytes, bytes], study: Study | None = None, **which: Any) -> Sum:
        """The closed sum of what the site answered and of its neighbours' nothing."""
        return Sum(self, header, answer, study or self.study, **which)

    def opened(self, header: bytes, answer: tuple[bytes, bytes], study: Study | None = None) -> Opened:
        """That sum, signed and opened."""
        assert self.agent is not None
        total = self.sum(header, answer, study)
        signed = self.read(self.agent(*total.survivors()))
        assert isinstance(signed, Signed), signed
        released = self.agent(*total.open(signed.signature))
        assert isinstance(self.read(released), Shares), self.read(released)
        return total.read(released[1])

    def read(self, answer: tuple[bytes, bytes]) -> messages.Answer:
        member = self.home.roster().member("hospital-a")
        assert member is not None
        read = messages.decode_answer(answer[0], PublicIdentity.from_hex(member.identity))
        read.payload.check(answer[1])
        return read


class Whole:
    """The agent's request handler, whose answers have their payload in one piece, to be compared."""

    def __init__(self, service: StudyService) -> None:
        self.handler = RequestHandler(service)

    def handle(self, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        answer, pieces = self.handler.handle(header, payload)
        return answer, b"".join(pieces)


class Site:
    """The agent without its sockets; ``restart`` is a kill and a new start."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.service = StudyService(coordinator.site)
        self.requests = Whole(self.service)
        coordinator.agent = self.requests.handle

    def restart(self) -> None:
        self.service.close()
        self.__init__(self.coordinator)  # type: ignore[misc]

    def ask(self, header: bytes, payload: bytes = b"") -> messages.Answer:
        return self.coordinator.read(self.requests.handle(header, payload))

    def approve(self, study: Study | None = None) -> None:
        study = study or self.coordinator.study
        assert isinstance(self.ask(self.coordinator.propose(study)), ApprovalStatus)
        self.service.approvals.approve(self.service.proposals.find(study.digest), "tester")

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.service.ledger.entries]

    def charges(self, purpose: ChargedFor = "training") -> int:
        with self.service.ledger.exclusive():
            return [charged.body.purpose for charged in self.service.ledger.books.charges.values()].count(purpose)
