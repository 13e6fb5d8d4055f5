"""A federation without data and training: every file that coordinator and hospitals write of a study, by their own
parts where these need no network. What a test wants to have happened it says round by round."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from consilium_client.agent.accounts import Account, ChargedUse
from consilium_client.agent.spending import Spending
from consilium_client.commands.enroll import enroll
from consilium_client.site import Home as SiteHome
from consilium_client.state.draw_seeds import Use
from consilium_client.state.ledger_file import LedgerFile
from consilium_server import registry
from consilium_server.commands.admission import admit
from consilium_server.commands.evidence import collect
from consilium_server.commands.provision import provision
from consilium_server.federation import Home as ServerHome
from consilium_server.state.study_folder import StudyFolder, folder
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.ledger.entry import Purpose
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.measured_noise import empty_coordinates, expected_noise
from consilium_shared.privacy.plan import Plan, PrivacyPlan
from consilium_shared.protocol.messages import CanaryAudit, Closing, Head, Recorded, countersign, encode
from consilium_shared.protocol.summand import counts_with, segments
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, Advert, Slot, Terms, least_sites, tolerated
from consilium_shared.secagg.terms import Purpose as Summed
from consilium_shared.study import Study

LAST_MODEL = b"the last model"
PARAMETERS = 2
Clock = Callable[[], datetime]


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Answer:
    """What a hospital's update, or counts, say, and the digest of that."""

    epsilon: float | None
    head: dict[str, Any]
    sha256: str
    countersignature: str | None = None


class Hospital:
    """What a site's agent writes."""

    def __init__(self, home: SiteHome, site: str, budget: Budget, clock: Clock) -> None:
        self.site, self.budget = site, budget
        self.identity = Identity.load(home.root / "keys" / "identity.key")
        self.ledger = LedgerFile(home.root / "ledger.jsonl", site, self.identity, clock)
        self.spending = Spending(self.ledger)
        self.audit: CanaryAudit | None = None
        self.spending.open_asset("icu", budget, "1" * 64)

    @property
    def head(self) -> dict[str, Any]:
        return {"seq": self.ledger.head.seq, "sha256": self.ledger.head.sha256}

    def approve(self, study: Study, plan: Plan, roster: str, by: str = "Dr Ono") -> None:
        limit = plan.epsilon if isinstance(plan, PrivacyPlan) else math.inf
        self.spending.approve(self.account(study, plan), epsilon=limit, by=by, roster=roster)

    def account(self, study: Study, plan: Plan) -> Account:
        return Account(study.digest, study.study, "icu", plan, self.budget)

    def release(
        self, study: Study, number: int | None, message: str, size: int = 900, header: bytes = b"", **said: bool
    ) -> str:
        sha256 = digest(header or f"{self.site} {self.ledger.head.sha256} {message}".encode())
        fields = {"study": study.digest, "round": number, "message": message, "sha256": sha256, "bytes": size}
        self.ledger.append("release", {**fields, **said})
        return sha256

    def witness(self, study: Study, recorded: Recorded) -> str:
        if recorded.round not in self.ledger.books.witnessed.get(study.digest, {}):
            self.ledger.append("witness", {"study": study.digest, **recorded.model_dump(mode="json")})
        return countersign(recorded.record, self.identity)

    def charge(self, study: Study, plan: Plan, number: int, purpose: Purpose = "training") -> ChargedUse:
        """As sites of every release did: earlier ones charged again beside the plan where ε allowed it."""
        with mock.patch("consilium_client.agent.spending.uses_left", return_value=1):
            return self._reserve(study, plan, number, purpose)

    def _reserve(self, study: Study, plan: Plan, number: int, purpose: Purpose) -> ChargedUse:
        return self.spending.reserve(self.account(study, plan), Use(purpose, number, "0" * 64), b"")

    def told(self, study: Study) -> float | None:
        """ε of the study so far, as an answer says it."""
        spent = self.spending.study_epsilon(study.digest)
        return math.ceil(spent * 1000) / 1000 if math.isfinite(spent) else None

    def update(self, study: Study, plan: Plan, number: int, recorded: Recorded | None) -> Answer:
        """Charge, train, count on the model that the round began with, settle, release."""
        signature = None if recorded is None else self.witness(study, recorded)
        counts = counts_with(study, number)
        training = self.charge(study, plan, number)
        counting = self.charge(study, plan, number - 1, "evaluation") if counts else None
        self.spending.settle(training, plan.steps_per_round)
        if counting is not None:
            self.spending.settle(counting, 1)
        head = self.head
        said: dict[str, Any] = {"counts": True} if counts else {}
        return Answer(self.told(study), head, self.release(study, number, "update", 48_213, **said), signature)

    def again(self, study: Study, number: int, answer: Answer) -> Answer:
        """The same update for another attempt."""
        said: dict[str, Any] = {"counts": True} if counts_with(study, number) else {}
        head = self.head
        sha256 = self.release(study, number, "update", 48_213, **said, again=True)
        return Answer(answer.epsilon, head, sha256, answer.countersignature)

    def counts(self, study: Study, plan: Plan, number: int) -> Answer:
        """On the last model, in a sum of their own."""
        self.spending.settle(self.charge(study, plan, number, "evaluation"), 1)
        head = self.head
        return Answer(self.told(study), head, self.release(study, number, "counts", 4_400))

    def close(self, study: Study, recorded: Recorded, federation: str) -> bytes:
        signature = self.witness(study, recorded)
        closing = Closing(
            federation=federation,
            study=study.digest,
            site=self.site,
            request=digest(b"the request to close"),
            head=Head.model_validate(self.head),
            round=recorded.round,
            epsilon=self.told(study),
            countersignature=signature,
            audit=self.audit,
        )
        header = encode(closing, self.identity)
        self.release(study, recorded.round, "closing", len(header), header)
        return header


class Federation:
    """A coordinator and its hospitals; after ``begin`` one study, round by round."""

    def __init__(self, root: Path, name: str, sites: Sequence[str], budget: Budget, clock: Clock = now) -> None:
        self.root, self.server = root, ServerHome(root / "server")
        (root / "federation.yaml").write_text(f"federation: {name}\naddress: 127.0.0.1\nsites: [{', '.join(sites)}]\n")
        provision(self.server, root / "federation.yaml")
        self.hospitals: dict[str, Hospital] = {}
        for site in sites:
            home = SiteHome(root / site)
            enroll(home, self.server.invitations / f"{site}.json")
            admit(self.server, (home.root / "join-request.json").read_bytes())
            self.hospitals[site] = Hospital(home, site, budget, clock)
        self.roster, self.coordinator = self.server.roster(), self.server.coordinator()

    def begin(self, study: Study, plans: Mapping[str, Plan]) -> None:
        """The study that the evidence is of; approved already."""
        self.study, self.plans = study, plans
        self.place: StudyFolder = folder(self.server, study.study)
        self.place.create(study, self.server.roster_file.read_bytes())
        self.counting = set(self.hospitals)
        """Sites that offer evaluation counts."""
        self._met: set[str] = set()
        """Sites that share secrets with the others."""
        self._keyed: set[str] = set()
        """Sites whose key for the next sum is there already."""
        self._stood: set[int] = set()
        """Rounds without a step."""

    def recorded(self, number: int) -> Recorded:
        return self.place.recorded(number, self.coordinator)

    def round(
        self,
        number: int,
        *,
        away: Mapping[str, str] | None = None,
        refused: Mapping[str, tuple[str, str]] | None = None,
        late: Sequence[str] = (),
        silent: Sequence[str] = (),
        attempts: int = 1,
        implausible: str | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        """One round.

        Args:
            away, refused: sites that give no key, and why.
            late: sites that give a key and no update.
            silent: sites that give an update and do not sign.
            attempts: of which all but the last are abandoned.
            implausible: why no step is taken.
            metrics: of the model before, but for the number of sites.
        """
        away, refused = away or {}, refused or {}
        study, before = self.study, self.recorded(number - 1) if number > 1 else None
        keyed = sorted(set(self.hospitals) - set(away) - set(refused))
        here = [site for site in keyed if site not in late]
        answers: dict[str, Answer] = {}
        for attempt in range(1, attempts + 1):
            terms = self._terms("training", number, attempt, keyed)
            for site in here:
                mine = self.hospitals[site]
                if site in answers:
                    answers[site] = mine.again(study, number, answers[site])
                else:
                    answers[site] = mine.update(study, self.plans[site], number, before)
        opened = self._open(terms, here, silent)
        counted = self._metrics(metrics or {"auroc": 0.8}, here) if counts_with(study, number) else None
        if implausible is not None:
            self._stood.add(number)
        record: dict[str, Any] = {
            "study": study.digest,
            "federation": self.roster.federation,
            "roster": self.roster.digest,
            "round": number,
            "model_before": self._model(number - 1),
            "model_after": self._model(number),
            "participants": here,
            "away": {**away, **dict.fromkeys(late, "no answer in time")},
            "refused": {site: list(why) for site, why in refused.items()},
            "epsilon": {site: answer.epsilon for site, answer in answers.items()},
            "heads": {site: answer.head for site, answer in answers.items()},
            "previous": before.record if before is not None else None,
            "answers": {site: answer.sha256 for site, answer in answers.items()},
            "countersigned": {site: a.countersignature for site, a in answers.items() if a.countersignature},
            "opened": opened,
            "implausible": implausible,
            "metrics_before": counted,
            "seconds": 1.5,
            "metrics": None,
        }
        if empty := empty_coordinates(study):
            expected = expected_noise(study, len(here), opened["parameters"])
            record["noise"] = {"found": expected, "expected": expected, "coordinates": empty}
        if number == study.training.rounds and number in study.evaluated_rounds:
            record |= self._evaluate(number, here, record["epsilon"], metrics or {"auroc": 0.8})
        self.place.write_record(record, self.coordinator)

    def finish(self) -> Path:
        """Close, publish, and hand everything over; returns the folder of evidence."""
        last = self.recorded(self.study.training.rounds)
        for site, hospital in self.hospitals.items():
            self.place.keep_closing(site, hospital.close(self.study, last, self.roster.federation))
        closings = {site: closing for site, (_, closing) in self.place.closings(self.roster).items()}
        records = self.place.records(self.coordinator)
        registry.publish(self.server, self.study, self.roster, LAST_MODEL, records, closings)
        target = self.root / "evidence"
        collect(self.server, self.study.study, target)
        for site, hospital in self.hospitals.items():
            hospital.ledger.close()
            shutil.copy(self.root / site / "ledger.jsonl", target / f"{site}.jsonl")
        return target

    def _evaluate(
        self, number: int, here: Sequence[str], epsilon: dict[str, float | None], metrics: dict[str, Any]
    ) -> dict[str, Any]:
        terms = self._terms("evaluation", number, 1, here)
        found = {site: self.hospitals[site].counts(self.study, self.plans[site], number) for site in here}
        return {
            "metrics": self._metrics(metrics, here),
            "epsilon": {**epsilon, **{site: answer.epsilon for site, answer in found.items()}},
            "counts": {site: answer.sha256 for site, answer in found.items()},
            "opened_counts": self._open(terms, here, ()),
        }

    def _metrics(self, metrics: dict[str, Any], here: Sequence[str]) -> dict[str, Any] | None:
        """What an honest coordinator tells of the counts of these sites."""
        counted = len(self.counting & set(here))
        told = counted >= least_sites(self.study.aggregation, len(self.roster.members))
        return {**metrics, "sites": counted} if told else None

    def _model(self, number: int) -> str:
        while number in self._stood:
            number -= 1
        return digest(LAST_MODEL if number == self.study.training.rounds else f"model {number}".encode())

    def _terms(self, purpose: Summed, number: int, attempt: int, cohort: Sequence[str]) -> Terms:
        about = {"federation": self.roster.federation, "study": self.study.digest, "roster": self.roster.digest}
        slot = Slot(**about, purpose=purpose, round=number, attempt=attempt)
        adverts = {}
        for site in cohort:
            hospital = self.hospitals[site]
            key = bytes.fromhex(digest(f"{site} {purpose} {number} {attempt}".encode()))
            adverts[site] = Advert.sign(slot, site, key, hospital.identity, counts=site in self.counting)
            if site not in self._keyed:
                hospital.release(self.study, number, "advertised", 3_100)
            if site not in self._met:
                hospital.release(self.study, None, "handshaken", 4_700)
        self._met |= set(cohort)
        self._keyed = set()
        return Terms(
            slot=slot,
            model=self._model(number - 1 if purpose == "training" else number),
            segments=segments(self.study, purpose, number, PARAMETERS),
            threat_model=self.study.aggregation.threat_model,
            adverts=adverts,
            corrupt=tolerated(self.study.aggregation, len(self.roster.members)),
        )

    def _open(self, terms: Terms, here: Sequence[str], silent: Sequence[str]) -> dict[str, Any]:
        signers = [site for site in here if site not in silent]
        words = terms.survivors_signed(tuple(here))
        signatures = {site: self.hospitals[site].identity.sign(SURVIVORS_DOMAIN, words).hex() for site in signers}
        for message in ("signed", "shares"):
            for site in signers:
                self.hospitals[site].release(self.study, terms.slot.round, message)
        self._keyed = set(signers)
        return {
            "attempt": terms.slot.attempt,
            "adverts": {site: advert.model_dump(mode="json") for site, advert in terms.adverts.items()},
            "parameters": PARAMETERS,
            "signatures": signatures,
        }
