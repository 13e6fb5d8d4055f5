"""A small federation's evidence as an auditor gets it, made by the programs' own parts, with every key for cheating."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.plan import NonPrivatePlan, Plan, PrivacyPlan
from consilium_shared.records import RECORD_DOMAIN
from consilium_shared.study import Study

SITES = ("north", "south", "west")
ROUNDS = 3
BUDGET = Budget(6.0, 1e-4)
MODELS = [digest(f"model {number}".encode()) for number in range(ROUNDS)]
LAST_MODEL = b"the last model"
PRIVATE = {"mode": "dp", "epsilon": 3.0, "delta": 1e-4, "clipping_norm": 1.0}
AWAY = {(2, "west")}
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""


def a_study(privacy: dict[str, Any]) -> Study:
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
                "rounds": ROUNDS,
                "steps_per_round": 5,
                "expected_batch": 50,
                "optimizer": {"name": "sgd", "lr": 0.1},
            },
            "privacy": privacy,
            "aggregation": {"min_sites": 2},
        }
    )


@dataclass(frozen=True)
class Evidence:
    """A folder as an auditor gets it; and, for cheating, every key."""

    root: Path
    coordinator: Identity
    sites: dict[str, Identity]

    def copy(self, target: Path) -> Evidence:
        shutil.copytree(self.root, target)
        return Evidence(target, self.coordinator, self.sites)

    def ledger(self, site: str) -> Path:
        return self.root / f"{site}.jsonl"

    def record(self, number: int) -> Path:
        return self.root / "rounds" / f"{number:04d}.json"

    def body(self, file: Path) -> dict[str, Any]:
        return documents.parse(file.read_bytes())[0]

    def reseal(self, file: Path, domain: str, **changes: Any) -> None:
        """The coordinator cheats: other words, properly signed."""
        file.write_bytes(documents.seal({**self.body(file), **changes}, domain, self.coordinator))

    def rewrite(self, site: str, edit: Callable[[list[Line]], list[Line]], *, heads: bool = True) -> None:
        """The site cheats: another history, properly chained and signed; with ``heads``, it lied from the start."""
        entries = [decode_entry(decode_json(line)) for line in self.ledger(site).read_bytes().splitlines()]
        first = entries[0].prev
        lines = edit([[entry.seq, entry.time, entry.kind, entry.body.model_dump(mode="json")] for entry in entries])
        data, prev, digests = b"", first, []
        for seq, (_, time, kind, fields) in enumerate(lines, start=1):
            line = sign_entry(seq, time, make_body(kind, fields), prev, self.sites[site]).line()
            prev = line_digest(line)
            digests.append(prev)
            data += line + b"\n"
        self.ledger(site).write_bytes(data)
        for number in range(1, ROUNDS + 1) if heads else ():
            said = self.body(self.record(number))["heads"]
            if site in said:
                seq = sum(line[0] <= said[site]["seq"] for line in lines)
                said[site] = {"seq": seq, "sha256": digests[seq - 1]}
                self.reseal(self.record(number), RECORD_DOMAIN, heads=said)

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

    def seq_of(self, site: str, kind: str, which: int = 0) -> int:
        lines = [json.loads(line) for line in self.ledger(site).read_bytes().splitlines()]
        return int([line["seq"] for line in lines if line["kind"] == kind][which])


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

    def other_study(self) -> None:
        """A small one that touched the same patients before."""
        plan = PrivacyPlan(0.05, 1.0, 2.0, 2, 1, 1e-4, 3.0)
        study = "b" * 64
        self.spending.approve(
            study=study, name="falls", asset="icu", plan=plan, budget=self.budget, epsilon=3.0, by="Dr Ono"
        )
        self.spending.reserve(study, "falls", "icu", 1, plan, self.budget).settle(2)
        self.ledger.append("refuse", {"study": study, "round": 2, "reason": "policy", "detail": "no such round"})

    def charge(self, number: int) -> Any:
        return self.spending.reserve(self.study.digest, "sepsis", "icu", number, self.plan, self.budget)

    def answer(self, number: int) -> tuple[float | None, dict[str, Any]]:
        reservation = self.charge(number)
        head = {"seq": self.ledger.head.seq, "sha256": self.ledger.head.sha256}
        reservation.settle(5)
        for message in ("update", "counts"):
            sha256 = digest(f"{self.site} {number} {message}".encode())
            fields = {"study": self.study.digest, "round": number, "message": message, "sha256": sha256, "bytes": 9}
            self.ledger.append("release", fields)
        spent = reservation.study_epsilon_after
        return (math.ceil(spent * 1000) / 1000 if self.private else None), head


def a_federation(root: Path, study: Study, plan: Plan) -> Evidence:
    root.mkdir()
    (root / "federation.yaml").write_text(f"federation: trial\naddress: 127.0.0.1\nsites: [{', '.join(SITES)}]\n")
    server = ServerHome(root / "server")
    provision(server, root / "federation.yaml")
    hospitals: dict[str, Hospital] = {}
    for site in SITES:
        home = SiteHome(root / site)
        enroll(home, server.invitations / f"{site}.json")
        admit(server, (home.root / "join-request.json").read_bytes())
        hospitals[site] = Hospital(home, site, study, plan)
    if isinstance(plan, PrivacyPlan):
        hospitals["north"].other_study()
    place, roster, coordinator = folder(server, "sepsis"), server.roster(), server.coordinator()
    place.create(study, server.roster_file.read_bytes())
    for number in range(1, ROUNDS + 1):
        _round(place, number, hospitals, roster, coordinator)
    registry.publish(server, study, roster, LAST_MODEL, place.records(coordinator))
    target = root / "evidence"
    collect(server, "sepsis", target)
    for site, hospital in hospitals.items():
        hospital.ledger.close()
        shutil.copy(root / site / "ledger.jsonl", target / f"{site}.jsonl")
    return Evidence(target, coordinator, {site: hospital.identity for site, hospital in hospitals.items()})


def _round(
    place: StudyFolder, number: int, hospitals: dict[str, Hospital], roster: rosters.Roster, coordinator: Identity
) -> None:
    here = [site for site in SITES if (number, site) not in AWAY]
    if number == 3:
        hospitals["south"].charge(3)  # a crash: charged, never settled, and run again
    answers = {site: hospitals[site].answer(number) for site in here}
    record = {
        "study": place.study().digest,
        "federation": roster.federation,
        "roster": roster.digest,
        "round": number,
        "model_before": MODELS[number - 1],
        "model_after": MODELS[number] if number < ROUNDS else digest(LAST_MODEL),
        "participants": here,
        "away": {site: "offline" for site in SITES if site not in here},
        "refused": {},
        "epsilon": {site: said for site, (said, _) in answers.items()},
        "heads": {site: head for site, (_, head) in answers.items()},
        "seconds": 1.5,
        "metrics": {"auroc": 0.8, "sites": len(here)},
    }
    place.write_record(record, coordinator)


PLAN = PrivacyPlan(0.05, 1.0, 1.5, 5, ROUNDS, 1e-4, 3.0)


@pytest.fixture(scope="module")
def faithful(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return a_federation(tmp_path_factory.mktemp("audit") / "private", a_study(PRIVATE), PLAN)


@pytest.fixture
def evidence(faithful: Evidence, tmp_path: Path) -> Evidence:
    return faithful.copy(tmp_path / "evidence")


@pytest.fixture
def without_privacy(tmp_path: Path) -> Evidence:
    """A federation that said openly that it does without."""
    study = a_study({"mode": "none"})
    return a_federation(tmp_path / "open", study, NonPrivatePlan(steps_per_round=5, rounds=ROUNDS))
