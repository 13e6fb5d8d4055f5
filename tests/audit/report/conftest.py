"""A busy federation: four sites, two studies on the same patients, absences, refusals, a raised budget, an audit."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support import studies
from tests.support.hospitals import Federation

from consilium_audit.page import render
from consilium_audit.report import Report, make_report
from consilium_shared.canonical import canonical_digest
from consilium_shared.identity import Identity
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.protocol.messages import CanaryAudit
from consilium_shared.study import Study

SITES = ("aarhus", "bergen", "lund", "turku")
ROUNDS = 24
DELTA = 1e-4
AWAY = {(number, "turku"): "offline" for number in range(9, 15)}
LATE = {20: ("bergen",)}
"""Gives a key and no update in time."""
SILENT = {22: ("lund",)}
"""Does not sign, though it is in the sum."""
ABANDONED = 3
"""The round that took a second attempt."""
IMPLAUSIBLE = {7: "the mean update has norm 312, and every site's own is at most 100"}
REFUSED = {(17, "lund"): ("data", "the site's data does not fit the study")}
HOSTILE = "<script>alert(1)</script> & <img src=https://example.org/x.png>"
PATIENTS = {"aarhus": 1280, "bergen": 1600, "lund": 1070, "turku": 1300}


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
    return studies.study(
        "mlp",
        {"asset": "icu", "label": {"column": "died", "classes": ["no", "yes"]}, "features": [{"name": "age"}]},
        name=name,
        training={
            "rounds": rounds,
            "steps_per_round": 10,
            "expected_batch": 64,
            "optimizer": {"name": "sgd", "lr": 0.1},
        },
        privacy={"mode": "dp", "epsilon": epsilon, "delta": DELTA, "clipping_norm": 1.0},
        aggregation={"min_sites": 2},
        evaluation=evaluation or {},
    )


def a_plan(study: Study, patients: int) -> PrivacyPlan:
    plan = plan_of(study, patients)
    assert isinstance(plan, PrivacyPlan)
    return plan


def a_busy_federation(root: Path, rounds: int) -> Busy:
    clock = Clock()
    made = Federation(root, "nordic", SITES, Budget(4.0, DELTA), clock)
    falls, sepsis = a_study("falls", 6, 2.0), a_study("sepsis", rounds, 4.0, {"epsilon": 1.0})
    sites, plans = made.hospitals, {site: a_plan(sepsis, PATIENTS[site]) for site in SITES}
    before = a_plan(falls, 1300)
    for name, site in sites.items():
        if name != "turku":
            site.approve(falls, before, made.roster.digest, "Dr Nyström")
            site.release(falls, None, "standing", 800)
            for number in range(1, 7):
                clock.pass_(hours=3)
                site.update(falls, before, number, None)
    clock.pass_(days=40)
    for name, site in sites.items():
        site.budget = Budget(8.0, DELTA)
        reason = "ethics board, decision 2026-117: sepsis is in the public interest"
        refusal = {"study": sepsis.digest, "round": None, "reason": "budget"}
        site.ledger.append("refuse", {**refusal, "detail": "asset 'icu' cannot afford the study: over by ε 1.31"})
        site.spending.open_asset("icu", site.budget, "2" * 64, reason)
        site.approve(sepsis, plans[name], made.roster.digest, "Dr Ono, data protection")
        site.release(sepsis, None, "standing", 800)
    strange = {"study": "c" * 64, "round": None, "reason": "unknown-study"}
    sites["bergen"].ledger.append("refuse", {**strange, "detail": "no proposal with this digest was received"})
    sites["aarhus"].spending.reject(study="d" * 64, name="billing", by="Prof. Berg", reason=f"no: {HOSTILE}")
    for attempt in range(3):
        beyond = {"study": sepsis.digest, "round": 25 + attempt, "reason": "policy"}
        sites["lund"].ledger.append("refuse", {**beyond, "detail": "round 25 of a study approved for 24 rounds"})
    audit = sites["aarhus"].audit = CanaryAudit(canaries=1000, guesses=100, correct=71)
    fields = {"study": sepsis.digest, "name": "sepsis", **audit.model_dump(), "by": "IT, night shift"}
    sites["aarhus"].ledger.append("audit", {**fields, "plan": canonical_digest(plans["aarhus"].to_dict())})
    made.begin(sepsis, plans)
    for number in range(1, rounds + 1):
        clock.pass_(hours=7)
        for name in (site for each, site in REFUSED if each == number):
            refused = {"study": sepsis.digest, "round": number, "reason": "data"}
            sites[name].ledger.append("refuse", {**refused, "detail": f"column {HOSTILE} is missing in 3 files"})
            sites[name].release(sepsis, number, "refusal")
        if number == 5:
            sites["bergen"].charge(sepsis, plans["bergen"], 5)  # a crash
        made.round(
            number,
            away={site: why for (each, site), why in AWAY.items() if each == number},
            refused={site: why for (each, site), why in REFUSED.items() if each == number},
            late=LATE.get(number, ()),
            silent=SILENT.get(number, ()),
            attempts=2 if number == ABANDONED else 1,
            implausible=IMPLAUSIBLE.get(number),
            metrics={"auroc": 0.5 + number / 80},
        )
    identities = {name: site.identity for name, site in sites.items()}
    return Busy(made.finish(), sepsis, plans, identities, made.coordinator, clock)


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Busy:
    return a_busy_federation(tmp_path_factory.mktemp("busy"), ROUNDS)


@pytest.fixture(scope="session")
def busy_report(busy: Busy) -> Report:
    return make_report(busy.root, busy.coordinator.public.fingerprint)


@pytest.fixture(scope="session")
def busy_page(busy_report: Report) -> bytes:
    return render(busy_report)
