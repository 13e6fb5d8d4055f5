"""A small federation's evidence as an auditor gets it, made by the programs' own parts, with every key for cheating."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from consilium_audit.evidence import VerificationFailed
from consilium_audit.verify import Verdict, Verification
from consilium_client.enroll import enroll
from consilium_client.site import Home as SiteHome
from consilium_client.spending import Spending
from consilium_client.store import LedgerFile
from consilium_server import registry
from consilium_server.admission import admit
from consilium_server.evidence import collect
from consilium_server.federation import Home as ServerHome
from consilium_server.provision import provision
from consilium_server.studies import StudyFolder, folder
from consilium_shared import documents
from consilium_shared import roster as rosters
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.ledger.entry import decode_entry, decode_json, line_digest, make_body, sign_entry
from consilium_shared.messages import Closing, Head, Recorded, countersign, decode_answer, encode
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.event import Event, event_to_dict
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_of
from consilium_shared.records import RECORD_DOMAIN
from consilium_shared.study import Study

SITES = ("north", "south", "west")
ROUNDS = 3
BUDGET = Budget(6.0, 1e-4)
LAST_MODEL = b"the last model"
PATIENTS = 1000
PRIVATE = {"mode": "dp", "epsilon": 3.0, "delta": 1e-4, "clipping_norm": 1.0, "noise_multiplier": 1.5}
AWAY = {(2, "west")}
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
Change = Callable[[str, dict[str, Any]], None]
"""Changes the fields of an entry of that kind."""


def a_study(privacy: dict[str, Any], rounds: int = ROUNDS, *, every: int = 1) -> Study:
    return Study.model_validate(
        {
            "study": "sepsis",
            "task": "tabular-classification",
            "model": {"name": "logistic"},
            "data": {
                "asset": "icu",
                "label": {"column": "died", "classes": ["no", "yes"]},
                "features": [{"name": "age"}],
            },
            "training": {
                "rounds": rounds,
                "steps_per_round": 5,
                "expected_batch": 50,
                "optimizer": {"name": "sgd", "lr": 0.1},
            },
            "privacy": privacy,
            "aggregation": {"min_sites": 2},
            "evaluation": {"every": every, "epsilon": 1.0 if privacy["mode"] == "dp" else None},
        }
    )


@dataclass(frozen=True)
class Evidence:
    """A folder as an auditor gets it; and, for cheating, every key."""

    root: Path
    coordinator: Identity
    sites: dict[str, Identity]
    rounds: int

    def copy(self, target: Path) -> Evidence:
        shutil.copytree(self.root, target)
        return replace(self, root=target)

    def ledger(self, site: str) -> Path:
        return self.root / f"{site}.jsonl"

    def record(self, number: int) -> Path:
        return self.root / "rounds" / f"{number:04d}.json"

    def body(self, file: Path) -> dict[str, Any]:
        return documents.parse(file.read_bytes())[0]

    def reseal(self, file: Path, domain: str, **changes: Any) -> None:
        """The coordinator cheats: other words, properly signed."""
        file.write_bytes(documents.seal({**self.body(file), **changes}, domain, self.coordinator))

    def closing(self, site: str) -> Path:
        return self.root / "closing" / f"{site}.json"

    def lines(self, site: str) -> list[Line]:
        entries = [decode_entry(decode_json(line)) for line in self.ledger(site).read_bytes().splitlines()]
        bodies = [entry.body.model_dump(mode="json", exclude_unset=True) for entry in entries]
        return [[entry.seq, entry.time, entry.kind, body] for entry, body in zip(entries, bodies, strict=True)]

    def rewrite(self, site: str, edit: Callable[[list[Line]], list[Line]], *, heads: bool = True) -> None:
        """The site cheats: another history, properly chained and signed.

        With ``heads`` it lied from the start: everybody was shown, signed and entered what follows from that.
        """
        lines = edit(self.lines(site))
        if heads:
            Rebuilt(self, {site: lines}, {})
        else:
            pen = Pen(self, site, lines)
            pen.write()
            self.ledger(site).write_bytes(pen.data)

    def resign(self, **changes: dict[str, Any]) -> None:
        """Everybody cheats: records with other words (``r2={…}``), shown to all, signed and entered by all."""
        Rebuilt(self, {}, {int(name[1:]): words for name, words in changes.items()})

    def verified(self, fingerprint: str | None = None) -> Verdict:
        return Verification(self.root, fingerprint).run()

    def fails(self, step: int, file: Path | None = None, line: int | None = None) -> str:
        with pytest.raises(VerificationFailed) as caught:
            self.verified()
        failure = caught.value
        assert failure.step == step, str(failure)
        assert file is None or failure.file == file, str(failure)
        assert line is None or failure.line == line, str(failure)
        return str(failure)

    @staticmethod
    def moved(kept: list[Line]) -> list[Line]:
        """Settlements name their charges by number: where those lines stand now, each with its faithful number."""
        numbers = [line[0] for line in kept]
        for line in kept:
            if line[2] == "settle":
                line[3]["charge_seq"] = numbers.index(line[3]["charge_seq"]) + 1
        return kept

    def charge_of(self, site: str, number: int, purpose: str = "training", which: int = 0) -> int:
        """The line of a charge."""
        bodies = [(line[0], line[3]) for line in self.lines(site) if line[2] == "charge"]
        wanted = (self.study, purpose, number)
        return int([seq for seq, b in bodies if (b["study"], b["purpose"], b["round"]) == wanted][which])

    @property
    def study(self) -> str:
        """Its digest."""
        return str(self.body(self.record(1))["study"])

    def seq_of(self, site: str, kind: str, which: int = 0) -> int:
        lines = [json.loads(line) for line in self.ledger(site).read_bytes().splitlines()]
        return int([line["seq"] for line in lines if line["kind"] == kind][which])


class Pen:
    """Writes a ledger anew, properly chained and signed, up to any line of the faithful one."""

    def __init__(self, evidence: Evidence, site: str, lines: list[Line]) -> None:
        self.site, self.lines, self.key = site, lines, evidence.sites[site]
        self.data, self.seq = b"", 0
        self.prev = decode_entry(decode_json(evidence.ledger(site).read_bytes().splitlines()[0])).prev

    def write(self, until: float = math.inf, change: Change = lambda kind, fields: None) -> dict[str, Any]:
        """The head, after all lines that stand up to the faithful line ``until``."""
        while self.lines and self.lines[0][0] <= until:
            _, time, kind, fields = self.lines.pop(0)
            change(kind, fields)
            self.seq += 1
            line = sign_entry(self.seq, time, make_body(kind, fields), self.prev, self.key).line()
            self.prev = line_digest(line)
            self.data += line + b"\n"
        return {"seq": self.seq, "sha256": self.prev}


class Rebuilt:
    """The whole evidence as if ledgers and records had been others from the start: witnesses, signatures, closings."""

    def __init__(
        self, evidence: Evidence, edited: dict[str, list[Line]], records: dict[int, dict[str, Any]]
    ) -> None:
        self.evidence, self.records = evidence, records
        self.pens = {site: Pen(evidence, site, edited.get(site) or evidence.lines(site)) for site in evidence.sites}
        self.study = documents.parse(evidence.record(1).read_bytes())[0]["study"]
        self.digests: dict[str, str] = {}  # of records and closings: faithful to rebuilt
        self.heads: dict[str, dict[str, Any]] = {}  # by the faithful record
        previous = None
        for number in range(1, evidence.rounds + 1):
            previous = self._record(evidence.record(number), previous)
        for site, pen in self.pens.items():
            if evidence.closing(site).exists():
                self._closing(evidence.closing(site), pen, previous)
            pen.write(change=self._change)
            evidence.ledger(site).write_bytes(pen.data)

    def _change(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "witness" and fields["record"] in self.heads:
            fields["heads"] = self.heads[fields["record"]]
            fields["record"] = self.digests[fields["record"]]
        elif kind == "release":
            fields["sha256"] = self.digests.get(fields["sha256"], fields["sha256"])

    def _record(self, file: Path, previous: str | None) -> str:
        faithful, body = digest(file.read_bytes()), self.evidence.body(file)
        heads = {site: self.pens[site].write(head["seq"], self._change) for site, head in body["heads"].items()}
        signed = {site: countersign(str(previous), self.evidence.sites[site]) for site in body["countersigned"]}
        words = {**self.records.get(body["round"], {}), "heads": heads}
        self.evidence.reseal(file, RECORD_DOMAIN, previous=previous, countersigned=signed, **words)
        self.heads[faithful] = heads
        self.digests[faithful] = digest(file.read_bytes())
        return self.digests[faithful]

    def _closing(self, file: Path, pen: Pen, record: str | None) -> None:
        header, key = file.read_bytes(), self.evidence.sites[pen.site]
        closing = decode_answer(header, key.public)
        head = Head.model_validate(pen.write(closing.head.seq, self._change))
        changes = {"head": head, "countersignature": countersign(str(record), key)}
        file.write_bytes(encode(closing.model_copy(update=changes), key))
        self.digests[digest(header)] = digest(file.read_bytes())


@dataclass(frozen=True)
class Answer:
    """What a hospital's update says, and the digests of its two answers."""

    epsilon: float | None
    head: dict[str, Any]
    update: str
    counts: str | None
    countersignature: str | None


class Hospital:
    """What a site's agent writes, without the training."""

    def __init__(self, home: SiteHome, site: str, study: Study, plan: Plan) -> None:
        self.identity = Identity.load(home.root / "keys" / "identity.key")
        self.ledger = LedgerFile(home.root / "ledger.jsonl", site, self.identity)
        self.spending = Spending(self.ledger)
        self.study, self.plan, self.site = study, plan, site
        self.private = isinstance(plan, PrivacyPlan)
        self.budget = BUDGET if self.private else Budget(math.inf, 1e-4)
        self.spending.open_asset("icu", self.budget, "1" * 64)
        limit = plan.epsilon if isinstance(plan, PrivacyPlan) else math.inf
        self.spending.approve(
            study=study.digest, name="sepsis", asset="icu", plan=plan, budget=self.budget, epsilon=limit, by="Dr Ono"
        )

    def release_charge(self, purpose: str, number: int, event: Event) -> None:
        """Of one noised release, settled at once."""
        fields = {"study": self.study.digest, "name": "sepsis", "asset": "icu", "round": number, "attempt": 1}
        more = {"event": event_to_dict(event), "delta": self.budget.delta, "epsilon_after": None, "purpose": purpose}
        charge = self.ledger.append("charge", {**fields, **more})
        self.ledger.append("settle", {"charge_seq": charge.seq, "steps": 1})

    def other_study(self) -> None:
        """A small one that touched the same patients before."""
        plan = PrivacyPlan(0.05, 1.0, 2.0, 2, 1, 1e-4, 3.0)
        study = "b" * 64
        self.spending.approve(
            study=study, name="falls", asset="icu", plan=plan, budget=self.budget, epsilon=3.0, by="Dr Ono"
        )
        self.spending.reserve(study, "falls", "icu", 1, plan, self.budget).settle(2)
        self.ledger.append("refuse", {"study": study, "round": 2, "reason": "policy", "detail": "no such round"})

    @property
    def head(self) -> dict[str, Any]:
        return {"seq": self.ledger.head.seq, "sha256": self.ledger.head.sha256}

    def charge(self, number: int) -> Any:
        return self.spending.reserve(self.study.digest, "sepsis", "icu", number, self.plan, self.budget)

    def witness(self, recorded: Recorded) -> str:
        if recorded.round not in self.ledger.books.witnessed.get(self.study.digest, {}):
            self.ledger.append("witness", {"study": self.study.digest, **recorded.model_dump(mode="json")})
        return countersign(recorded.record, self.identity)

    def answer(self, number: int, recorded: Recorded | None) -> Answer:
        signature = None if recorded is None else self.witness(recorded)
        reservation = self.charge(number)
        head = self.head
        reservation.settle(5)
        update = self._release(number, "update")
        counts = self.count(number) if number in self.study.evaluated_rounds else None
        spent = reservation.study_epsilon_after
        return Answer(math.ceil(spent * 1000) / 1000 if self.private else None, head, update, counts, signature)

    def count(self, number: int) -> str:
        evaluation = self.plan.evaluation_event()
        if self.private and evaluation is not None:
            self.release_charge("evaluation", number, evaluation)
        return self._release(number, "counts")

    def close(self, recorded: Recorded, federation: str) -> bytes:
        signature = self.witness(recorded)
        spent = self.spending.study_epsilon(self.study.digest)
        closing = Closing(
            federation=federation,
            study=self.study.digest,
            site=self.site,
            request=digest(b"the request to close"),
            head=Head.model_validate(self.head),
            round=recorded.round,
            epsilon=math.ceil(spent * 1000) / 1000 if self.private else None,
            countersignature=signature,
        )
        header = encode(closing, self.identity)
        self._release(None, "closing", header)
        return header

    def _release(self, number: int | None, message: str, header: bytes = b"") -> str:
        sha256 = digest(header or f"{self.site} {number} {message}".encode())
        fields = {"study": self.study.digest, "round": number, "message": message, "sha256": sha256, "bytes": 9}
        self.ledger.append("release", fields)
        return sha256


def a_federation(root: Path, study: Study, sites: tuple[str, ...] = SITES, *, eventful: bool = True) -> Evidence:
    """The evidence of a finished study; ``eventful``: with an absence, another study, a crash, and a refusal."""
    root.mkdir()
    plan = plan_of(study, PATIENTS)
    (root / "federation.yaml").write_text(f"federation: trial\naddress: 127.0.0.1\nsites: [{', '.join(sites)}]\n")
    server = ServerHome(root / "server")
    provision(server, root / "federation.yaml")
    hospitals: dict[str, Hospital] = {}
    for site in sites:
        home = SiteHome(root / site)
        enroll(home, server.invitations / f"{site}.json")
        admit(server, (home.root / "join-request.json").read_bytes())
        hospitals[site] = Hospital(home, site, study, plan)
    if eventful and isinstance(plan, PrivacyPlan):
        hospitals["north"].other_study()
    place, roster, coordinator = folder(server, "sepsis"), server.roster(), server.coordinator()
    place.create(study, server.roster_file.read_bytes())
    for number in range(1, plan.rounds + 1):
        if eventful and number == 3:
            hospitals["south"].witness(place.recorded(2, coordinator))
            hospitals["south"].charge(3)  # a crash: charged, never settled, and run again
        _round(place, number, hospitals, roster, coordinator, AWAY if eventful else set())
    last = place.recorded(plan.rounds, coordinator)
    for site, hospital in hospitals.items():
        place.keep_closing(site, hospital.close(last, roster.federation))
    closings = {site: closing for site, (_, closing) in place.closings(roster).items()}
    registry.publish(server, study, roster, LAST_MODEL, place.records(coordinator), closings)
    target = root / "evidence"
    collect(server, "sepsis", target)
    for site, hospital in hospitals.items():
        hospital.ledger.close()
        shutil.copy(root / site / "ledger.jsonl", target / f"{site}.jsonl")
    keys = {site: hospital.identity for site, hospital in hospitals.items()}
    return Evidence(target, coordinator, keys, plan.rounds)


def _round(
    place: StudyFolder,
    number: int,
    hospitals: dict[str, Hospital],
    roster: rosters.Roster,
    coordinator: Identity,
    away: set[tuple[int, str]],
) -> None:
    study, here = place.study(), sorted(site for site in hospitals if (number, site) not in away)
    recorded = place.recorded(number - 1, coordinator) if number > 1 else None
    answers = {site: hospitals[site].answer(number, recorded) for site in here}
    last = number == study.training.rounds
    record = {
        "study": study.digest,
        "federation": roster.federation,
        "roster": roster.digest,
        "round": number,
        "model_before": digest(f"model {number - 1}".encode()),
        "model_after": digest(LAST_MODEL if last else f"model {number}".encode()),
        "participants": here,
        "away": {site: "offline" for site in hospitals if site not in here},
        "refused": {},
        "epsilon": {site: answer.epsilon for site, answer in answers.items()},
        "heads": {site: answer.head for site, answer in answers.items()},
        "seconds": 1.5,
        "metrics": {"auroc": 0.8, "sites": len(here)} if number in study.evaluated_rounds else None,
        "previous": recorded.record if recorded is not None else None,
        "answers": {site: answer.update for site, answer in answers.items()},
        "counts": {site: answer.counts for site, answer in answers.items() if answer.counts},
        "countersigned": {site: each.countersignature for site, each in answers.items() if each.countersignature},
    }
    place.write_record(record, coordinator)


@pytest.fixture(scope="module")
def faithful(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return a_federation(tmp_path_factory.mktemp("audit") / "private", a_study(PRIVATE))


@pytest.fixture
def evidence(faithful: Evidence, tmp_path: Path) -> Evidence:
    return faithful.copy(tmp_path / "evidence")


@pytest.fixture
def without_privacy(tmp_path: Path) -> Evidence:
    """A federation that said openly that it does without."""
    study = a_study({"mode": "none"})
    return a_federation(tmp_path / "open", study)


@pytest.fixture
def every_other(tmp_path: Path) -> Evidence:
    """A federation that evaluates after its second and its third round."""
    return a_federation(tmp_path / "every-other", a_study(PRIVATE, every=2))


@pytest.fixture
def calibrated(tmp_path: Path) -> Evidence:
    """A federation whose contract leaves the noise to calibration."""
    return a_federation(tmp_path / "calibrated", a_study({**PRIVATE, "noise_multiplier": "auto"}), eventful=False)


FOUR = ("east", "north", "south", "west")


@pytest.fixture(scope="session")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Evidence]:
    """``of_four(rounds)``: the evidence of a federation of four in which nothing went wrong."""

    def made(rounds: int) -> Evidence:
        return a_federation(tmp_path_factory.mktemp("four") / "f", a_study(PRIVATE, rounds), FOUR, eventful=False)

    return made
