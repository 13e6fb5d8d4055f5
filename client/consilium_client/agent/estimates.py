"""Estimates of what a study would do and cost at this site, before anybody decides on it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from consilium_client.agent.accounts import Account
from consilium_client.agent.spending import Spending
from consilium_client.agent.study_data import StudyData
from consilium_client.policy import check_contract, check_patients
from consilium_client.site_config import SiteConfig
from consilium_client.state.patient_count import PatientCounts
from consilium_shared.errors import ConfigurationError, PolicyRefusal
from consilium_shared.privacy.budget import Quote
from consilium_shared.privacy.plan import Plan, plan_of
from consilium_shared.study import Study

REMEMBERED = 32
"""Plans that are kept, since their noise takes long to calibrate."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of what a study would do here: shown to IT before the decision, for this site's eyes only.

    Attributes:
        patients: patients to train on.
        held_back: patients to evaluate on.
        plan: the plan that would be approved.
        quote: its cost for the asset.
        alone: ε of the asset with it should own shares of noise be all that protects its patients; None where no study
            of the asset shares noise.
        evaluated_rounds: rounds after which evaluation counts leave.
    """

    patients: int
    held_back: int
    plan: Plan
    quote: Quote
    evaluated_rounds: tuple[int, ...]
    alone: float | None = None


class Estimates:
    """Plan and cost of studies, from their contract, the policy and the noised number of patients."""

    def __init__(self, config: SiteConfig, data: StudyData, patient_counts: PatientCounts, spending: Spending) -> None:
        self.config = config
        self._data, self._patient_counts, self._spending = data, patient_counts, spending
        self._plans: OrderedDict[tuple[str, int], Plan] = OrderedDict()

    def of(self, study: Study) -> Estimate:
        """Estimate of what the study would do and cost here.

        Raises:
            PolicyRefusal: the policy forbids it.
            BudgetRefused: no noise keeps it within its own ε.
            DataError: the data cannot be used.
        """
        policy = self.config.policy
        check_contract(policy, study)
        patients = self._data.patients(study)
        check_patients(policy, study, patients.train, patients.counted(study))
        size = patients.train  # with sums it is in no plan
        if study.privacy.sums is None:
            size = self._patient_counts.noised(study, patients.train, policy.minimum_patients)
        plan = self._plans.get((study.digest, size)) or make_plan(study, size)
        self._plans[study.digest, size] = plan
        if len(self._plans) > REMEMBERED:
            self._plans.popitem(last=False)
        account = self.account(study, plan)
        quote, alone = self._spending.approve_cost(account), self._spending.alone(account)
        return Estimate(patients.train, patients.held_back, plan, quote, study.evaluated_rounds, alone)

    def account(self, study: Study, plan: Plan) -> Account:
        """The study's account under that plan; raises PolicyRefusal where the asset has no budget."""
        asset, policy = study.data.asset, self.config.policy
        budget = policy.budget(asset)  # refuses an asset without one
        alone = policy.budgets[asset].shared_noise.max_epsilon_alone
        return Account(study.digest, study.study, asset, plan, budget, alone)


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
