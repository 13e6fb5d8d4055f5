"""Study service of the agent: loads data, computes plan and cost, decides the approval status of a study.

The coordinator's requests (``requests.py``) and IT's commands (``administration.py``) share it.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from consilium_client import data
from consilium_client.agent.absence import check_not_rejected
from consilium_client.agent.leftovers import Leftovers
from consilium_client.agent.machine import Machine
from consilium_client.agent.spending import Approval, Reservation, Spending
from consilium_client.data.asset import AssetSpec
from consilium_client.data.dataset import Dataset
from consilium_client.policy import check_contract, check_decider, check_patients, objections
from consilium_client.site import Home, SiteConfig
from consilium_client.state.clipping_norms import ClippingNorms
from consilium_client.state.draw_seeds import Attempt, DrawSeeds
from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.paces import Paces
from consilium_client.state.patient_count import PatientCounts
from consilium_client.state.proposals import Proposal, Proposals
from consilium_client.state.responses import Responses
from consilium_client.state.results import Results
from consilium_client.state.sum_store import SumStore
from consilium_shared import limits
from consilium_shared.errors import ConfigurationError, PolicyRefusal
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.ledger.entry import Purpose
from consilium_shared.privacy.budget import Quote
from consilium_shared.privacy.plan import Plan, plan_of
from consilium_shared.study import Study

Key = TypeVar("Key")
Value = TypeVar("Value")

log = logging.getLogger("consilium.agent")


@dataclass(frozen=True)
class Estimate:
    """Estimate of what a study would do here: shown to IT before the decision, for this site's eyes only."""

    patients: int
    """Patients to train on."""
    held_back: int
    plan: Plan
    quote: Quote
    evaluated_rounds: tuple[int, ...]


@dataclass(frozen=True)
class Patients:
    """Numbers of the site's patients that a study uses. No message tells it."""

    train: int
    held_back: int

    @classmethod
    def of(cls, records: Dataset) -> Patients:
        """Counted."""
        train = int(records.train.sum())
        return cls(train, records.patient_count - train)


@dataclass
class ChargedAttempt:
    """A charge and the draw that it pays for, from the charge to the settlement. Use as a context.

    When it ends by an exception, what is said of the failure depends on the draw: this draw is over, and its charge
    stands in full. A crash leaves it, to be taken up again.
    """

    _attempts: DrawSeeds
    _attempt: Attempt
    reservation: Reservation

    @property
    def seed(self) -> bytes:
        """32 secret bytes, of this draw alone."""
        return self._attempt.seed

    @property
    def number(self) -> int:
        """Which charge for this round it is; 1 for the first."""
        return self._attempt.number

    def settle(self, steps: int) -> None:
        """So many steps ran, and what they gave is kept."""
        self.reservation.settle(steps)
        self._attempts.end(self._attempt.study, self._attempt.purpose)

    def __enter__(self) -> ChargedAttempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception):
            self._attempts.end(self._attempt.study, self._attempt.purpose)


REMEMBERED = 32
"""Studies whose numbers of patients and plans are kept."""


class StudyService:
    """The agent's state. Opening it takes the ledger's lock and enters budgets that the ledger does not have yet."""

    def __init__(self, home: Home) -> None:
        """Raises ConfigurationError, LedgerError or IntegrityError when the site's files do not allow a start."""
        self.home = home
        self.config: SiteConfig = home.config()
        invitation = home.invitation()
        self.site = invitation.site
        self.federation = invitation.federation
        self.coordinator = PublicIdentity.from_hex(invitation.coordinator)
        self.identity: Identity = home.identity()
        self.ledger = LedgerFile(home.ledger, self.site, self.identity)
        if self.ledger.recovered is not None:
            log.warning("the ledger's last line was torn by a crash; recovered, entry %d", self.ledger.recovered.seq)
        self.spending = Spending(self.ledger)
        self.responses = Responses(home.store / "answers")
        self.results = Results(home.store / "results")
        self.sums = SumStore(home.store / "sums")
        self.draw_seeds = DrawSeeds(home.store / "attempts")
        self.draw_seeds.end_kept(self.results, self.ledger)
        self.patient_counts = PatientCounts(home.store / "cohorts")
        self.clipping_norms = ClippingNorms(home.store / "clipping-norms")
        self.proposals = Proposals(home.store / "studies", home.store / "refused")
        self.machine = Machine(home.store / "machine")
        self.paces = Paces(home.store / "pace")
        stores = self.sums, self.results, self.responses, self.draw_seeds, self.clipping_norms, self.paces
        self.leftovers = Leftovers(self.ledger, *stores)
        self.leftovers.end_quiet(self.config.policy.quiet_days)
        self.leftovers.forget_rejected()
        self.activity: dict[str, Any] = {"doing": "waiting"}
        self._records: tuple[str, Dataset] | None = None
        self._patients: dict[str, Patients] = {}
        self._plans: dict[tuple[str, int], Plan] = {}
        self._loading = threading.Lock()
        policy = self.config.policy
        for asset, entry in policy.budgets.items():
            self.spending.open_asset(asset, entry.budget, policy.digest, entry.reason)
        self.spending.note_policy(policy.digest)
        self.spending.charge_counts()

    def close(self) -> None:
        """Free the ledger."""
        self.machine.trials.stopped()
        self.ledger.close()

    def records(self, study: Study) -> Dataset:
        """The study's data, read once and kept while it is the last one asked for.

        Raises:
            PolicyRefusal: this site has no such asset.
            DataError: the data cannot be used; the text stays at the site.
        """
        with self._loading:
            if self._records is not None and self._records[0] == study.digest:
                return self._records[1]
            spec = self._asset(study)
            self._records = None  # free the old before reading the new
            self._patients.pop(study.digest, None)  # as long as it cannot be read, nothing is known of it
            self.activity = {"doing": "reading data", "study": study.study}
            try:
                records = data.load(spec.at(self.home.root), study)
            finally:
                self.activity = {"doing": "waiting"}
            log.info("study %s: data of asset %s is read", study.study, study.data.asset)
            self._records = (study.digest, records)
            _remember(self._patients, study.digest, Patients.of(records))
            return records

    def patients(self, study: Study) -> Patients:
        """Numbers of patients that the study uses, as when its data was last read; reads it only where it never was.

        The coordinator asks for a pending study's standing again and again: that neither reads the data each time nor
        pushes out the data of the study that trains. Raises as ``records``.
        """
        self._asset(study)
        return self._patients.get(study.digest) or Patients.of(self.records(study))

    def _asset(self, study: Study) -> AssetSpec:
        spec = self.config.assets.get(study.data.asset)
        if spec is None:
            asset = study.data.asset
            raise PolicyRefusal("data", f"this site has no asset {asset!r}", f"assets.{asset}: where its files lie")
        return spec

    def estimate(self, study: Study) -> Estimate:
        """Estimate of what the study would do and cost here.

        Raises:
            PolicyRefusal: the policy forbids it.
            BudgetRefused: no noise keeps it within its own ε.
            DataError: the data cannot be used.
        """
        policy = self.config.policy
        check_contract(policy, study)
        patients = self.patients(study)
        check_patients(policy, study, patients.train, patients.held_back)
        size = self.patient_counts.size(study, patients.train, policy.minimum_patients)
        plan = self._plans.get((study.digest, size)) or make_plan(study, size)
        _remember(self._plans, (study.digest, size), plan)
        quote = self.spending.approve_cost(study.digest, study.data.asset, plan, policy.budget(study.data.asset))
        return Estimate(patients.train, patients.held_back, plan, quote, study.evaluated_rounds)

    def check_new(self, proposal: Proposal) -> bool:
        """Whether a proposal is not kept yet, and may be.

        Raises:
            PeerError: the same study came before with another roster.
            PolicyRefusal: too many that nobody has decided on are kept, or a site has another key than in a study that
                was approved here.
        """
        if self.proposals.has(proposal):
            return False
        self._check_keys(proposal)
        with self.ledger.exclusive():
            decided = set(self.ledger.books.decisions)
        undecided = [kept for kept in self.proposals.digests() if kept not in decided]
        if len(undecided) >= limits.UNDECIDED_PROPOSALS and proposal.study.digest not in decided:
            raise PolicyRefusal("policy", "this site has too many undecided proposals; ask it to decide on some first")
        return True

    def _check_keys(self, proposal: Proposal) -> None:
        for kept in self.proposals.all():
            changed = [s for s, key in kept.identities.items() if proposal.identities.get(s, key) != key]
            if changed and self.spending.approval(kept.study.digest) is not None:
                names = ", ".join(changed)
                raise PolicyRefusal("wrong-roster", f"{names}: another key than in study {kept.study.study}")

    def approval_status(self, proposal: Proposal) -> Literal["pending", "approved"]:
        """Approval status of a proposal. What the policy forbids is refused before anybody is asked.

        The answer depends on the contract, the policy and what was decided on this very study: on no patient's record,
        and on no budget. That there are too few patients, that the data cannot be used, that other studies have left
        too little, is for the site's people to see and to tell: they find it at the approval.

        Raises:
            PolicyRefusal: the hospital said no, its policy does, or it has no such asset.
        """
        study = proposal.study
        if self.spending.approval(study.digest) is not None:
            return "approved"
        self._check_not_rejected(study)
        for objection in self.objections(proposal):
            raise objection
        return "pending"

    def objections(self, proposal: Proposal) -> list[PolicyRefusal]:
        """Why nobody here may approve the study, whoever looks: every rule, with what would permit it."""
        approved = self.spending.approval(proposal.study.digest) is not None
        found = objections(self.config.policy, proposal.study, len(proposal.identities), approved=approved)
        try:
            self._asset(proposal.study)
        except PolicyRefusal as refusal:
            found.append(refusal)
        return found

    def approval(self, proposal: Proposal) -> Approval:
        """The approval in force; raises PolicyRefusal where nobody approved the study, or somebody withdrew that."""
        found = self.spending.approval(proposal.study.digest)
        if found is None:
            self._check_not_rejected(proposal.study)
            raise PolicyRefusal("pending", "nobody at the hospital has approved this study")
        if found.roster != proposal.roster:
            raise PolicyRefusal("wrong-roster", "the study was approved with another roster")
        return found

    def check_charges(self, study: Study, basis: str, plan: Plan, uses: Sequence[tuple[int, Purpose]]) -> None:
        """Whether every charge that uses of the data still need, each a round and its purpose, can be made: all of
        them, or none is begun.

        Raises:
            PolicyRefusal, BudgetRefused: as ``Spending.reserve``.
        """
        needed = [(number, what) for number, what in uses if not self._under_way(study, number, basis, plan, what)[1]]
        if needed:
            asset = study.data.asset
            budget = self.config.policy.budget(asset)
            self.spending.check(study.digest, study.study, asset, plan, budget, needed)

    def begin(self, study: Study, round_number: int, basis: str, plan: Plan, purpose: Purpose) -> ChargedAttempt:
        """Charge a round's training or evaluation; after a crash, take up the charge and the seed that were under way.

        Args:
            basis: what the outcome depends on besides the round: SHA-256 of the model.

        Raises:
            PolicyRefusal, BudgetRefused: as ``Spending.reserve``.
        """
        attempt, reservation = self._under_way(study, round_number, basis, plan, purpose)
        if attempt is None or reservation is None:
            number = self.spending.attempts(study.digest, round_number, purpose) + 1
            attempt = self.draw_seeds.begin(study.digest, purpose, round_number, basis, number)
            asset = study.data.asset
            budget = self.config.policy.budget(asset)
            reservation = self.spending.reserve(study.digest, study.study, asset, round_number, plan, budget, purpose)
        else:
            log.info("%s of round %d goes on with its charge, entry %d", purpose, round_number, reservation.charge_seq)
        return ChargedAttempt(self.draw_seeds, attempt, reservation)

    def settle_kept(self, study: Study, round_number: int, basis: str, plan: Plan, purpose: Purpose) -> None:
        """After a crash between keeping a result and settling its charge: all of it ran; the seed goes."""
        attempt, reservation = self._under_way(study, round_number, basis, plan, purpose)
        if reservation is not None:
            reservation.settle(plan.steps_per_round if purpose == "training" else 1)
        if attempt is not None:
            self.draw_seeds.end(study.digest, purpose)

    def _under_way(
        self, study: Study, round_number: int, basis: str, plan: Plan, purpose: Purpose
    ) -> tuple[Attempt | None, Reservation | None]:
        """Remainder of exactly this after a crash: the attempt with its seed, and its charge if it still stands."""
        attempt = self.draw_seeds.under_way(study.digest, purpose, round_number, basis)
        if attempt is None:
            return None, None
        return attempt, self.spending.unsettled(study.digest, round_number, attempt.number, plan, purpose)

    def _check_not_rejected(self, study: Study) -> None:
        with self.ledger.exclusive():
            check_not_rejected(self.ledger.books.decisions.get(study.digest))

    def approve(self, proposal: Proposal, by: str, shown: Mapping[str, Any] | None = None) -> Estimate:
        """Approve a study with the plan that it has today.

        Args:
            proposal: the study.
            by: who decides.
            shown: the plan that this person saw, as ``Plan.to_dict`` writes it; None where nobody was shown one.

        Raises:
            PolicyRefusal: as ``estimate``, or this person may not decide here.
            BudgetRefused, DataError: as ``estimate``.
            ConfigurationError: it is approved already, or its plan is not the one that was shown.
        """
        study = proposal.study
        check_decider(self.config.policy, by)
        if self.spending.approval(study.digest) is not None:
            raise ConfigurationError(f"study {study.study} is approved already")
        self._check_keys(proposal)
        for objection in self.objections(proposal):
            raise objection
        estimate = self.estimate(study)
        if shown is not None and dict(shown) != estimate.plan.to_dict():
            raise ConfigurationError(
                f"study {study.study} has another plan now than was shown; nothing was approved. Look at it again"
            )
        self.proposals.put(proposal)  # it may have been refused when it came
        limit = study.privacy.epsilon if study.privacy.epsilon is not None else math.inf
        self.spending.approve(
            study=study.digest,
            name=study.study,
            asset=study.data.asset,
            plan=estimate.plan,
            budget=self.config.policy.budget(study.data.asset),
            epsilon=limit,
            by=by,
            roster=proposal.roster,
        )
        return estimate

    def reject(self, proposal: Proposal, by: str, reason: str) -> None:
        """Say no to a study, or withdraw an approval; what it has left here is deleted.

        Raises:
            PolicyRefusal: this person may not decide here.
        """
        check_decider(self.config.policy, by)
        self.spending.reject(study=proposal.study.digest, name=proposal.study.study, by=by, reason=reason)
        self.leftovers.forget_rejected()


def _remember(known: dict[Key, Value], key: Key, value: Value) -> None:
    known[key] = value
    if len(known) > REMEMBERED:
        known.pop(next(iter(known)), None)


def make_plan(study: Study, patients: int) -> Plan:
    """The frozen plan of a study for so many patients: with privacy, the noised number (``state/patient_count.py``).

    Raises:
        BudgetRefused: no noise is enough.
        PolicyRefusal: δ is not below 1 / patients, or the study's own noise multiplier costs more than its ε.
    """
    try:
        return plan_of(study, patients)
    except ConfigurationError as error:
        raise PolicyRefusal("policy", "the study's privacy parameters do not hold for this site's patients") from error
