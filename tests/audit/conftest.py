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
from tests.support.hospitals import Federation, Hospital

from consilium_audit.evidence import VerificationFailed
from consilium_audit.verdict import Verdict
from consilium_audit.verify import Verification
from consilium_client.agent.accounts import Account
from consilium_client.state.draw_seeds import Use
from consilium_shared import documents
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.ledger.entry import decode_entry, decode_json, line_digest, make_body, sign_entry
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.protocol.messages import Head, countersign, decode_answer, encode
from consilium_shared.protocol.records import RECORD_DOMAIN
from consilium_shared.study import Study

SITES = ("north", "south", "west")
ROUNDS = 3
BUDGET = Budget(6.0, 1e-4)
PATIENTS = 1000
PRIVATE = {"mode": "dp", "epsilon": 3.0, "delta": 1e-4, "clipping_norm": 1.0, "noise_multiplier": 1.5}
AWAY = {(2, "west")}
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
Change = Callable[[str, dict[str, Any]], None]
"""Changes the fields of an entry of that kind."""


def a_study(privacy: dict[str, Any], rounds: int = ROUNDS, *, every: int = 1, **more: Any) -> Study:
    """A small study; ``more``: other keys of its contract."""
    return Study.model_validate(
        {
            **more,
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

    def __init__(self, evidence: Evidence, edited: dict[str, list[Line]], records: dict[int, dict[str, Any]]) -> None:
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


def a_federation(
    root: Path,
    study: Study,
    sites: tuple[str, ...] = SITES,
    *,
    eventful: bool = True,
    attempts: int = 1,
    late: tuple[str, ...] = (),
    counting: tuple[str, ...] | None = None,
) -> Evidence:
    """The evidence of a finished study.

    Args:
        eventful: with an absence, another study, a crash, and a refusal.
        attempts: at every round, of which all but the last are abandoned.
        late: sites that give a key for the last round and no update.
        counting: sites that offer evaluation counts; None for all.
    """
    root.mkdir()
    plan = plan_of(study, PATIENTS)
    private = isinstance(plan, PrivacyPlan)
    made = Federation(root, "trial", sites, BUDGET if private else Budget(math.inf, 1e-4))
    for hospital in made.hospitals.values():
        hospital.approve(study, plan, made.roster.digest)
    if eventful and private:
        another_study(made.hospitals["north"])
    made.begin(study, dict.fromkeys(sites, plan))
    made.counting = set(sites if counting is None else counting)
    for number in range(1, plan.rounds + 1):
        if eventful and number == 3:
            made.hospitals["south"].witness(study, made.recorded(2))
            made.hospitals["south"].charge(study, plan, 3)  # a crash: charged, never settled, and run again
        away = {site: "offline" for each, site in AWAY if each == number and eventful}
        made.round(number, away=away, attempts=attempts, late=late if number == plan.rounds else ())
    target = made.finish()
    keys = {site: hospital.identity for site, hospital in made.hospitals.items()}
    return Evidence(target, made.coordinator, keys, plan.rounds)


def another_study(hospital: Hospital) -> None:
    """A small one that touched the same patients before."""
    plan, study = PrivacyPlan(0.05, 1.0, 2.0, 2, 1, 1e-4, 3.0), "b" * 64
    account, spending = Account(study, "falls", "icu", plan, hospital.budget), hospital.spending
    spending.approve(account, epsilon=3.0, by="Dr Ono")
    spending.settle(spending.reserve(account, Use("training", 1, "0" * 64), b""), 2)
    hospital.ledger.append("refuse", {"study": study, "round": 2, "reason": "policy", "detail": "no such round"})


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
def repeated(tmp_path: Path) -> Evidence:
    """A federation in which every round took two attempts: the same updates left twice, under different masks."""
    return a_federation(tmp_path / "repeated", a_study(PRIVATE), eventful=False, attempts=2)


@pytest.fixture
def calibrated(tmp_path: Path) -> Evidence:
    """A federation whose contract leaves the noise to calibration."""
    return a_federation(tmp_path / "calibrated", a_study({**PRIVATE, "noise_multiplier": "auto"}), eventful=False)


FOUR = ("east", "north", "south", "west")


@pytest.fixture
def latecomer(tmp_path: Path) -> Evidence:
    """A federation of four, of which one gave a key for the last round and no update in time."""
    return a_federation(tmp_path / "late", a_study(PRIVATE), FOUR, eventful=False, late=("east",))


@pytest.fixture(scope="session")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Evidence]:
    """``of_four(rounds)``: the evidence of a federation of four in which nothing went wrong."""

    def made(rounds: int) -> Evidence:
        return a_federation(tmp_path_factory.mktemp("four") / "f", a_study(PRIVATE, rounds), FOUR, eventful=False)

    return made
