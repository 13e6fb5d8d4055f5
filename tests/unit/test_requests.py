"""The site's answers: idempotent, charged once, and the same after a crash between any two durable writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilium_client.desk import Desk
from consilium_client.enroll import enroll
from consilium_client.requests import Requests
from consilium_client.site import Home as SiteHome
from consilium_client.store import AnswerStore, LedgerFile
from consilium_server.admission import admit
from consilium_server.federation import Home as ServerHome
from consilium_server.provision import provision
from consilium_shared import messages
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.messages import Counts, Evaluate, Payload, Propose, Refusal, Standing, Train, Update
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import Study

PATIENTS = 80
CONTRACT: dict[str, Any] = {
    "study": "synthetic-study",
    "task": "tabular-classification",
    "model": {"name": "logistic"},
    "data": {
        "asset": "synthetic-table",
        "label": {"column": "label", "classes": ["a", "b"]},
        "features": [{"name": "x"}, {"name": "y"}],
    },
    "training": {"rounds": 3, "steps_per_round": 2, "expected_batch": 16, "optimizer": {"lr": 0.1}},
    "privacy": {"epsilon": 2.0, "delta": 1e-3, "clipping_norm": 1.0},
    "aggregation": {"min_sites": 2},
}
SITE_YAML = """\
site: hospital-a
assets:
  synthetic-table: {{kind: table, path: synthetic.csv}}
policy:
  budgets: {{synthetic-table: {{epsilon: {epsilon}, delta: 1.0e-3}}}}
  minimum_patients: 20
device: cpu
"""


class Crash(BaseException):
    """Stands for kill -9 at one place: nothing after it runs in this process."""


class Coordinator:
    """The other end: signs requests as the server does, and reads the answers."""

    def __init__(self, folder: Path, epsilon: float = 5.0) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "federation.yaml").write_text(
            "federation: test\naddress: 127.0.0.1\nsites: [hospital-a, hospital-b]\n"
        )
        self.home = ServerHome(folder / "server")
        provision(self.home, folder / "federation.yaml")
        self.site = SiteHome(folder / "a")
        for name in ("a", "b"):
            home = SiteHome(folder / name)
            enroll(home, self.home.invitations / f"hospital-{name}.json")
            admit(self.home, home.request_file.read_bytes())
        draw = np.random.default_rng(1)
        rows = [f"P{i},{'ab'[i % 2]},{draw.normal():.3f},{draw.normal() + i % 2:.3f}" for i in range(PATIENTS)]
        (self.site.root / "synthetic.csv").write_text("patient,label,x,y\n" + "\n".join(rows) + "\n")
        self.site.config_file.write_text(SITE_YAML.format(epsilon=epsilon))
        self.study = Study.model_validate(CONTRACT)
        self.model = pack(to_vector(build(self.study)), self.study)
        self.key = self.home.coordinator()
        self.roster = json.loads(self.home.roster_file.read_bytes())

    def common(self, study: Study | None = None) -> dict[str, str]:
        roster = self.home.roster()
        return {"federation": roster.federation, "study": (study or self.study).digest, "roster": roster.digest}

    def propose(self, study: Study | None = None) -> bytes:
        study = study or self.study
        proposal = Propose(**self.common(study), contract=study.contract, roster_document=self.roster)
        return messages.encode(proposal, self.key)

    def train(self, number: int = 1, model: bytes | None = None, study: Study | None = None) -> bytes:
        request = Train(**self.common(study), round=number, payload=Payload.of(self.model if model is None else model))
        return messages.encode(request, self.key)

    def evaluate(self, number: int = 1) -> bytes:
        request = Evaluate(**self.common(), round=number, payload=Payload.of(self.model))
        return messages.encode(request, self.key)

    def read(self, answer: tuple[bytes, bytes]) -> messages.Answer:
        member = self.home.roster().member("hospital-a")
        assert member is not None
        read = messages.decode_answer(answer[0], messages.PublicIdentity.from_hex(member.identity))
        read.payload.check(answer[1])
        return read


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path)


class Site:
    """The agent without its sockets; ``restart`` is a kill and a new start."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.desk = Desk(coordinator.site)
        self.requests = Requests(self.desk)

    def restart(self) -> None:
        self.desk.close()
        self.__init__(self.coordinator)  # type: ignore[misc]

    def ask(self, header: bytes, payload: bytes = b"") -> messages.Answer:
        return self.coordinator.read(self.requests.handle(header, payload))

    def approve(self) -> None:
        assert isinstance(self.ask(self.coordinator.propose()), Standing)
        self.desk.approve(self.desk.proposals.find("synthetic-study"), "tester")

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.desk.ledger.entries]

    def charges(self) -> int:
        return self.kinds().count("charge")


@pytest.fixture
def site(coordinator: Coordinator) -> Iterator[Site]:
    made = Site(coordinator)
    yield made
    made.desk.close()


def reason(answer: messages.Answer) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def test_a_study_is_pending_until_it_is_approved_and_costs_nothing_until_then(site: Site) -> None:
    c = site.coordinator
    standing = site.ask(c.propose())
    assert isinstance(standing, Standing)
    assert standing.state == "pending"
    assert reason(site.ask(c.train(), c.model)) == "pending"
    site.approve()
    assert isinstance(site.ask(c.train(), c.model), Update)
    assert site.charges() == 1


def test_asking_again_while_nothing_changes_adds_nothing_to_the_ledger(site: Site) -> None:
    c = site.coordinator
    first = site.requests.handle(c.propose(), b"")
    before = site.kinds()
    for _ in range(3):
        assert site.requests.handle(c.propose(), b"") == first
    assert site.kinds() == before


def test_a_round_is_charged_before_and_settled_and_released_after(site: Site) -> None:
    c = site.coordinator
    site.approve()
    before = len(site.kinds())
    answer = site.requests.handle(c.train(), c.model)
    assert site.kinds()[before:] == ["charge", "settle", "release"]
    released = site.desk.ledger.entries[-1].body
    assert released.sha256 == digest(answer[0])  # type: ignore[attr-defined]
    assert released.bytes == len(answer[0]) + len(answer[1])  # type: ignore[attr-defined]


def test_the_same_question_gets_the_same_bytes_without_a_second_charge(site: Site) -> None:
    c = site.coordinator
    site.approve()
    first = site.requests.handle(c.train(), c.model)
    assert site.requests.handle(c.train(), c.model) == first
    site.restart()
    assert site.requests.handle(c.train(), c.model) == first
    assert site.charges() == 1
    assert site.kinds().count("release") == 2  # the standing and the update


def test_another_model_or_an_older_round_is_refused_and_costs_nothing(site: Site) -> None:
    c = site.coordinator
    site.approve()
    site.ask(c.train(1), c.model)
    site.ask(c.train(2), c.model)
    other = pack(to_vector(build(c.study)) + 1, c.study)
    assert reason(site.ask(c.train(2, other), other)) == "stale-round"
    assert reason(site.ask(c.train(1), c.model)) == "stale-round"
    assert site.charges() == 2


def test_more_rounds_than_approved_are_refused(site: Site) -> None:
    c = site.coordinator
    site.approve()
    assert reason(site.ask(c.train(4), c.model)) == "policy"
    assert site.charges() == 0


def test_bytes_that_are_no_model_of_the_study_are_refused_before_a_charge(site: Site) -> None:
    c = site.coordinator
    site.approve()
    wrong = b"not a model"
    assert reason(site.ask(c.train(1, wrong), wrong)) == "model"
    assert reason(site.ask(c.train(), c.model + b"x")) == "malformed"
    assert site.charges() == 0


def test_nobody_else_can_ask(site: Site) -> None:
    c = site.coordinator
    site.approve()
    c.key = Identity.generate()
    before = site.kinds()
    assert reason(site.ask(c.train(), c.model)) == "bad-signature"
    assert reason(site.ask(b"{}", b"")) == "malformed"
    assert site.kinds() == before


def test_a_withdrawn_approval_stops_the_next_round(site: Site) -> None:
    c = site.coordinator
    site.approve()
    site.ask(c.train(1), c.model)
    site.desk.spending.reject(study=c.study.digest, name="synthetic-study", by="tester", reason="test")
    assert reason(site.ask(c.train(2), c.model)) == "rejected"
    assert reason(site.ask(c.propose())) == "rejected"
    assert site.charges() == 1


def test_an_unaffordable_study_is_refused_when_it_is_proposed(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path, epsilon=0.5)
    poor = Site(coordinator)
    refusal = poor.ask(coordinator.propose())
    assert reason(refusal) == "budget"
    assert isinstance(refusal, Refusal)
    assert "0.5" not in refusal.detail  # the arithmetic is in the ledger and stays at the site
    assert "0.5" in poor.desk.ledger.entries[-2].body.detail  # type: ignore[attr-defined]
    poor.desk.close()


def test_evaluation_gives_counts_of_the_held_back_patients(site: Site) -> None:
    c = site.coordinator
    site.approve()
    answer = site.requests.handle(c.evaluate(), c.model)
    assert isinstance(c.read(answer), Counts)
    counts = np.frombuffer(answer[1], dtype="<i8")
    assert counts[-1] == PATIENTS - site.desk.records(c.study).train.sum()
    assert site.requests.handle(c.evaluate(), c.model) == answer


@pytest.mark.parametrize("place", ["begin", "charge", "trained", "put", "settle", "release"])
def test_a_crash_between_any_two_writes_repeats_the_round_on_the_same_charge(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    site = Site(coordinator)
    site.approve()
    crash_at(monkeypatch, place)
    with pytest.raises(Crash):
        site.requests.handle(coordinator.train(), coordinator.model)
    monkeypatch.undo()
    site.restart()
    answer = site.requests.handle(coordinator.train(), coordinator.model)
    update = coordinator.read(answer)
    assert isinstance(update, Update)
    assert site.charges() == 1
    assert update.epsilon is not None
    assert update.epsilon <= 2.0
    assert not list((coordinator.site.store / "attempts").glob("*.json"))  # the seed is gone
    assert site.kinds().count("settle") == 1
    for number in (2, 3):  # the whole study still fits its ε
        assert isinstance(site.ask(coordinator.train(number), coordinator.model), Update)
    site.desk.close()


def test_a_repeated_round_is_the_very_same_draw(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash threw away and what leaves in the end are one release: the same patients, the same noise."""
    site = Site(coordinator)
    site.approve()
    seen: list[bytes] = []
    put = AnswerStore.put

    def note(store: AnswerStore, *arguments: Any) -> None:
        seen.append(arguments[-1])
        if len(seen) == 1:
            raise Crash
        put(store, *arguments)

    monkeypatch.setattr(AnswerStore, "put", note)
    with pytest.raises(Crash):
        site.requests.handle(coordinator.train(), coordinator.model)
    site.restart()
    site.requests.handle(coordinator.train(), coordinator.model)
    assert seen[0] == seen[1]
    site.desk.close()


def test_another_request_never_runs_on_a_kept_seed(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(coordinator)
    site.approve()
    crash_at(monkeypatch, "trained")
    with pytest.raises(Crash):
        site.requests.handle(coordinator.train(), coordinator.model)
    monkeypatch.undo()
    site.restart()
    other = pack(to_vector(build(coordinator.study)) + 1, coordinator.study)
    assert isinstance(site.ask(coordinator.train(1, other), other), Update)
    assert site.charges() == 2  # a charge of its own
    site.desk.close()


def crash_at(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Die just before the durable write that ``place`` names (``trained``: after the last step)."""
    from consilium_client.attempts import Attempts

    append = LedgerFile.append

    def die(*_: Any, **__: Any) -> None:
        raise Crash

    def guarded(ledger: LedgerFile, kind: str, fields: dict[str, Any]) -> Any:
        if kind == place:
            raise Crash
        return append(ledger, kind, fields)

    if place == "begin":
        monkeypatch.setattr(Attempts, "begin", die)
    elif place in ("trained", "put"):
        monkeypatch.setattr(AnswerStore, "put", die)
    else:
        monkeypatch.setattr(LedgerFile, "append", guarded)
