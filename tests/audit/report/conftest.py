"""A busy federation: four sites, two studies on the same patients, absences, refusals, a raised budget, an audit."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from consilium_audit.page import render
from consilium_audit.report import Report, make_report
from consilium_client.enroll import enroll
from consilium_client.site import Home as SiteHome
from consilium_client.spending import Spending
from consilium_client.store import LedgerFile
from consilium_server import registry
from consilium_server.admission import admit
from consilium_server.evidence import collect
from consilium_server.federation import Home as ServerHome
from consilium_server.provision import provision
from consilium_server.studies import folder
from consilium_shared.canonical import canonical_digest, digest
from consilium_shared.identity import Identity
from consilium_shared.ledger.entry import Purpose
from consilium_shared.messages import CanaryAudit, Closing, Head, Recorded, countersign, encode
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.study import Study

SITES = ("aarhus", "bergen", "lund", "turku")
ROUNDS = 24
DELTA = 1e-4
AWAY = {(number, "turku"): "offline" for number in range(9, 15)} | {(20, "bergen"): "no answer in time"}
REFUSED = {(17, "lund"): ("data", "the site's data does not fit the study")}
HOSTILE = "<script>alert(1)</script> & <img src=https://example.org/x.png>"
PATIENTS = {"aarhus": 1280, "bergen": 1600, "lund": 1070, "turku": 1300}
LAST_MODEL = b"the last model"


class Clock:
    """A calendar that tests turn."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 12, 9, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **time: float) -> None:
        self.now += timedelta(**time)


@dataclass
class Busy:
    root: Path
    study: Study
    plans: dict[str, PrivacyPlan]
    identities: dict[str, Identity]
    coordinator: Identity
    clock: Clock = field(default_factory=Clock)

    def ledger(self, site: str) -> Path:
        return self.root / f"{site}.jsonl"


def a_study(name: str, rounds: int, epsilon: float, evaluation: dict[str, Any] | None = None) -> Study:
    return Study.model_validate(
        {
            "study": name,
            "task": "tabular-classification",
            "model": {"name": "mlp"},
            "data": {
                "asset": "icu",
                "label": {"column": "died", "classes": ["no", "yes"]},
                "features": [{"name": "age"}],
            },
            "training": {
                "rounds": rounds,
                "steps_per_round": 10,
                "expected_batch": 64,
                "optimizer": {"name": "sgd", "lr": 0.1},
            },
            "privacy": {"mode": "dp", "epsilon": epsilon, "delta": DELTA, "clipping_norm": 1.0},
            "aggregation": {"min_sites": 2},
            "evaluation": evaluation or {},
        }
    )


@dataclass(frozen=True)
class Answer:
    """What a site's update says, and the digests of its two answers."""

    epsilon: float
    head: dict[str, Any]
    update: str
    counts: str | None
    countersignature: str | None


class Site:
    """What one site's agent writes."""

    def __init__(self, home: SiteHome, site: str, clock: Clock) -> None:
        self.site, self.clock = site, clock
        self.identity = Identity.load(home.root / "keys" / "identity.key")
        self.ledger = LedgerFile(home.root / "ledger.jsonl", site, self.identity, clock)
        self.spending = Spending(self.ledger)
        self.budget = Budget(4.0, DELTA)
        self.audit: CanaryAudit | None = None
        self.spending.open_asset("icu", self.budget, "1" * 64)

    def approve(self, study: Study, plan: PrivacyPlan, by: str) -> None:
        self.spending.approve(
            study=study.digest,
            name=study.study,
            asset="icu",
            plan=plan,
            budget=self.budget,
            epsilon=plan.epsilon,
            by=by,
        )
        self.release(study, None, "standing", 800)

    def release(self, study: Study, number: int | None, message: str, size: int, header: bytes = b"") -> str:
        sha256 = digest(header or f"{self.site} {study.study} {number} {message}".encode())
        fields = {"study": study.digest, "round": number, "message": message, "sha256": sha256, "bytes": size}
        self.ledger.append("release", fields)
        return sha256

    def witness(self, study: Study, recorded: Recorded) -> str:
        self.ledger.append("witness", {"study": study.digest, **recorded.model_dump(mode="json")})
        return countersign(recorded.record, self.identity)

    def refuse(self, study: str | None, number: int | None, reason: str, detail: str) -> None:
        self.ledger.append("refuse", {"study": study, "round": number, "reason": reason, "detail": detail})

    def charge(self, study: Study, plan: PrivacyPlan, number: int, purpose: Purpose = "training") -> Any:
        return self.spending.reserve(study.digest, study.study, "icu", number, plan, self.budget, purpose)

    def answer(self, study: Study, plan: PrivacyPlan, number: int, recorded: Recorded | None = None) -> Answer:
        signature = None if recorded is None else self.witness(study, recorded)
        reservation = self.charge(study, plan, number)
        head = {"seq": self.ledger.head.seq, "sha256": self.ledger.head.sha256}
        self.clock.pass_(seconds=40)
        reservation.settle(10)
        update = self.release(study, number, "update", 48_213)
        counts = None
        if number in study.evaluated_rounds:
            reservation = self.charge(study, plan, number, "evaluation")
            reservation.settle(1)
            counts = self.release(study, number, "counts", 4_400)
        return Answer(math.ceil(reservation.study_epsilon_after * 1000) / 1000, head, update, counts, signature)

    def close(self, study: Study, recorded: Recorded, federation: str) -> bytes:
        signature = self.witness(study, recorded)
        head = Head(seq=self.ledger.head.seq, sha256=self.ledger.head.sha256)
        closing = Closing(
            federation=federation,
            study=study.digest,
            site=self.site,
            request=digest(b"the request to close"),
            head=head,
            round=recorded.round,
            epsilon=math.ceil(self.spending.study_epsilon(study.digest) * 1000) / 1000,
            countersignature=signature,
            audit=self.audit,
        )
        header = encode(closing, self.identity)
        self.release(study, None, "closing", len(header), header)
        return header


def a_plan(study: Study, patients: int) -> PrivacyPlan:
    plan = plan_of(study, patients)
    assert isinstance(plan, PrivacyPlan)
    return plan


def a_busy_federation(root: Path, rounds: int) -> Busy:
    (root / "federation.yaml").write_text(f"federation: nordic\naddress: 127.0.0.1\nsites: [{', '.join(SITES)}]\n")
    server, clock = ServerHome(root / "server"), Clock()
    provision(server, root / "federation.yaml")
    sites: dict[str, Site] = {}
    falls, sepsis = a_study("falls", 6, 2.0), a_study("sepsis", rounds, 4.0, {"epsilon": 1.0})
    plans: dict[str, PrivacyPlan] = {}
    for site in SITES:
        home = SiteHome(root / site)
        enroll(home, server.invitations / f"{site}.json")
        admit(server, (home.root / "join-request.json").read_bytes())
        sites[site] = Site(home, site, clock)
        plans[site] = a_plan(sepsis, PATIENTS[site])
    before = a_plan(falls, 1300)
    for name, site in sites.items():
        if name != "turku":
            site.approve(falls, before, "Dr Nyström")
            for number in range(1, 7):
                clock.pass_(hours=3)
                site.answer(falls, before, number)
    clock.pass_(days=40)
    for name, site in sites.items():
        site.budget = Budget(8.0, DELTA)
        reason = "ethics board, decision 2026-117: sepsis is in the public interest"
        site.refuse(sepsis.digest, None, "budget", "asset 'icu' cannot afford the study: over by ε 1.31")
        site.spending.open_asset("icu", site.budget, "2" * 64, reason)
        site.approve(sepsis, plans[name], "Dr Ono, data protection")
    sites["bergen"].refuse("c" * 64, None, "unknown-study", "no proposal with this digest was received")
    sites["aarhus"].spending.reject(study="d" * 64, name="billing", by="Prof. Berg", reason=f"no: {HOSTILE}")
    for attempt in range(3):
        sites["lund"].refuse(sepsis.digest, 25 + attempt, "policy", "round 25 of a study approved for 24 rounds")
    audit = sites["aarhus"].audit = CanaryAudit(canaries=1000, guesses=100, correct=71)
    fields = {"study": sepsis.digest, "name": "sepsis", **audit.model_dump(), "by": "IT, night shift"}
    sites["aarhus"].ledger.append("audit", {**fields, "plan": canonical_digest(plans["aarhus"].to_dict())})
    place, roster, coordinator = folder(server, "sepsis"), server.roster(), server.coordinator()
    place.create(sepsis, server.roster_file.read_bytes())
    for number in range(1, rounds + 1):
        clock.pass_(hours=7)
        here = [site for site in SITES if (number, site) not in AWAY and (number, site) not in REFUSED]
        recorded = place.recorded(number - 1, coordinator) if number > 1 else None
        answers = {}
        for site in SITES:
            if (number, site) in REFUSED:
                sites[site].refuse(sepsis.digest, number, "data", f"column {HOSTILE} is missing in 3 files")
                sites[site].release(sepsis, number, "refusal", 900)
        if number == 5:
            sites["bergen"].charge(sepsis, plans["bergen"], 5)  # a crash
        for site in here:
            answers[site] = sites[site].answer(sepsis, plans[site], number, recorded)
        place.write_record(
            {
                "study": sepsis.digest,
                "federation": roster.federation,
                "roster": roster.digest,
                "round": number,
                "model_before": digest(f"model {number - 1}".encode()),
                "model_after": digest(LAST_MODEL if number == rounds else f"model {number}".encode()),
                "participants": here,
                "away": {site: AWAY[number, site] for site in SITES if (number, site) in AWAY},
                "refused": {site: list(REFUSED[number, site]) for site in SITES if (number, site) in REFUSED},
                "epsilon": {site: answer.epsilon for site, answer in answers.items()},
                "heads": {site: answer.head for site, answer in answers.items()},
                "seconds": 41.5,
                "metrics": {"auroc": 0.5 + number / 80, "sites": len(here)},
                "previous": recorded.record if recorded is not None else None,
                "answers": {site: answer.update for site, answer in answers.items()},
                "counts": {site: answer.counts for site, answer in answers.items()},
                "countersigned": {site: a.countersignature for site, a in answers.items() if a.countersignature},
            },
            coordinator,
        )
    for name, site in sites.items():
        place.keep_closing(name, site.close(sepsis, place.recorded(rounds, coordinator), roster.federation))
    closings = {name: closing for name, (_, closing) in place.closings(roster).items()}
    registry.publish(server, sepsis, roster, LAST_MODEL, place.records(coordinator), closings)
    target = root / "evidence"
    collect(server, "sepsis", target)
    for name, site in sites.items():
        site.ledger.close()
        shutil.copy(root / name / "ledger.jsonl", target / f"{name}.jsonl")
    return Busy(target, sepsis, plans, {name: site.identity for name, site in sites.items()}, coordinator, clock)


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Busy:
    return a_busy_federation(tmp_path_factory.mktemp("busy"), ROUNDS)


@pytest.fixture(scope="session")
def busy_report(busy: Busy) -> Report:
    return make_report(busy.root, busy.coordinator.public.fingerprint)


@pytest.fixture(scope="session")
def busy_page(busy_report: Report) -> bytes:
    return render(busy_report)
