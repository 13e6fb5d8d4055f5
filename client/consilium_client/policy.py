"""Policy of this hospital. A study can only ask; what exceeds the policy is refused before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from consilium_shared import limits, task
from consilium_shared.canonical import canonical_digest
from consilium_shared.config import Strict
from consilium_shared.errors import BudgetRefused, ConfigurationError, PolicyRefusal
from consilium_shared.graphs.model import GraphModel
from consilium_shared.ledger.entry import Person
from consilium_shared.limits import LEAST_DELTA
from consilium_shared.privacy.accountant import check_delta
from consilium_shared.privacy.budget import Budget, in_words
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.schema import SCHEMA
from consilium_shared.secagg.terms import corrupt, holds_against, least_sites
from consilium_shared.study import Name, Positive, Study, ThreatModel
from consilium_shared.task import TaskName

TASKS: tuple[TaskName, ...] = tuple(name for name in task.names() if task.get(name).since == 1)
"""Permitted where site.yaml names none. It never grows, nor does any default of a policy become wider: an upgrade
permits nothing that nobody at the hospital has decided on."""


class SharedNoise(Strict):
    """Noise that several hospitals share (``privacy.sums.honest_sites`` of a contract): may it protect an asset?"""

    permit: bool = False
    """Permission for studies in which this site's own noise is a share of the whole."""
    max_epsilon_alone: Positive = 5.0
    """Most that all studies of the asset may cost together should its own shares be all that protects its patients:
    the encryption of a sum broken, or more hospitals working against this one than a study reckons with."""
    min_colluding: Annotated[int, Field(ge=1, le=limits.SITES - 2)] = 1
    """Fewest hospitals that a study must reckon with as working against this one (``aggregation.corrupt_sites``)."""


class AssetBudget(Strict):
    """Budget that all studies together may cost the patients of one asset, for ever."""

    epsilon: Positive | Literal["unlimited"]
    """``unlimited`` promises these patients nothing; studies without privacy need it."""
    delta: Annotated[float, Field(ge=LEAST_DELTA, lt=1)]
    reason: Annotated[str, Field(max_length=limits.DETAIL_CHARACTERS)] = ""
    """Reason of a change since the ledger opened the asset; needed for a change, and written into the ledger."""

    shared_noise: SharedNoise = SharedNoise()
    """Decision on studies whose noise is shared; by default none is permitted."""

    @property
    def budget(self) -> Budget:
        """The numbers as the accounting takes them."""
        return Budget(math.inf if self.epsilon == "unlimited" else self.epsilon, self.delta)


class SitePolicy(Strict):
    """The ``policy`` part of site.yaml."""

    budgets: dict[Name, AssetBudget]
    """For each asset; an asset without a budget is used by no study."""
    tasks: tuple[TaskName, ...] = TASKS
    """Tasks that a study may do; by default those that release 0.1 could."""
    studies: tuple[Name, ...] | None = None
    """Names of the studies that may be proposed; null for any (each still waits for an approval)."""
    minimum_schema: Annotated[int, Field(ge=1, le=SCHEMA)] = 1
    """Oldest contract schema that a study may be written in: one of an older schema lacks what later ones protect."""
    minimum_patients: Annotated[int, Field(ge=1)] = 50
    """Fewest patients to train on."""
    minimum_held_back: Annotated[int, Field(ge=1)] = 10
    """Fewest held-back patients whose evaluation counts are added up before they leave."""
    minimum_group: Annotated[int, Field(ge=1)] = 10
    """Fewest held-back patients of a group (``evaluation.by``) that are counted apart in studies without privacy; who
    is in a smaller one counts as "not given". With privacy each group's counts have noise, and nobody is moved."""
    minimum_sites: Annotated[int, Field(ge=2, le=limits.SITES)] = 2
    """Fewest sites whose updates are added up before anybody sees the sum."""
    corrupt_sites: Literal["third"] | Annotated[int, Field(ge=0, le=limits.SITES - 2)] = "third"
    """Number of sites of its roster that a study must hold against, should they help a coordinator that cheats; or
    ``third`` for fewer than a third of them. Looked at when a study is proposed and approved."""
    threat_models: Annotated[tuple[ThreatModel, ...], Field(min_length=1)] = ("malicious-server",)
    """Threat models that a study may take the coordinator for. ``honest-but-curious`` lets fewer sites open a sum."""
    maximum_epsilon: Positive = 10.0
    """Most that one study may cost."""
    maximum_count_noise: Positive = 100.0
    """Largest standard deviation, in patients, of the noise on the number of patients (``privacy.count_noise``): the
    sampling rate follows from the noised number, and one that is far off asks for far larger steps than were meant."""
    allow_without_privacy: bool = False
    """Permission to approve studies without differential privacy."""
    same_sites_without_privacy: bool = False
    """Demand that a study without privacy sums up the same sites in every round (``aggregation.same_sites``)."""
    allow_evaluation_counts: bool = True
    """Permission for evaluation counts of held-back patients to leave: with noise and charged in studies with privacy;
    exact in those without."""
    allow_graphs: bool = False
    """Permission for a study to bring its model as a graph, a bounded list of known layers, in place of one by name."""
    quiet_days: Annotated[int, Field(ge=8, le=3650)] | None = None
    """Days without a word of the coordinator's after which a study that was approved and never closed is ended here:
    its approval is withdrawn, and its updates, answers, keys and seeds are deleted. null: by ``reject`` alone."""
    approvers: Annotated[tuple[Person, ...], Field(min_length=1)] | None = None
    """Names of those who may approve and reject; null for anybody who can run the command."""

    @property
    def digest(self) -> str:
        """SHA-256 of the policy with every default written out; the ledger names the policy by it."""
        return canonical_digest(self.model_dump(mode="json"))

    def budget(self, asset: str) -> Budget:
        """The budget of an asset; raises PolicyRefusal when it has none."""
        if asset not in self.budgets:
            raise PolicyRefusal(
                "policy",
                f"this site has no budget for an asset {asset!r}",
                f"policy.budgets.{asset}: {{epsilon: …, delta: …}}",
            )
        return self.budgets[asset].budget


def check_decider(policy: SitePolicy, by: str) -> None:
    """Raises PolicyRefusal unless ``by`` may decide on studies here."""
    if policy.approvers is not None and by not in policy.approvers:
        raise PolicyRefusal("policy", f"{by!r} is not among the approvers in site.yaml: {', '.join(policy.approvers)}")


def check_contract(policy: SitePolicy, study: Study) -> None:
    """Check a contract against the policy. Looks at no patient: the coordinator may learn the outcome.

    Raises:
        PolicyRefusal: with the first rule that forbids the study.
    """
    for rule in RULES:
        rule(policy, study)


def objections(policy: SitePolicy, study: Study, roster: int, *, approved: bool = False) -> list[PolicyRefusal]:
    """Every rule that forbids a study, with what would permit it; empty when none does.

    Args:
        roster: how many sites the study's roster has.
        approved: whether it runs here, which is when nobody looks any more at how many may be corrupt.
    """
    found = []
    of_rosters = (check_sites,) if approved else (check_sites, check_corrupt)
    rules: list[Callable[[], None]] = [partial(rule, policy, study, roster) for rule in of_rosters]
    for rule in rules + [partial(rule, policy, study) for rule in RULES]:
        try:
            rule()
        except PolicyRefusal as refusal:
            found.append(refusal)
    return found


def check_sites(policy: SitePolicy, study: Study, roster: int) -> None:
    """Check that every sum of a study with so many sites in its roster is of as many as the policy asks for.

    Raises:
        PolicyRefusal: fewer would do.
    """
    least = least_sites(study.aggregation, roster)
    if least < policy.minimum_sites:
        raise PolicyRefusal(
            "policy",
            f"the study adds up {least} sites, this site asks for {policy.minimum_sites}",
            f"policy.minimum_sites: {least}",
        )


def check_corrupt(policy: SitePolicy, study: Study, roster: int) -> None:
    """Check that a study with so many sites in its roster holds against as many corrupt ones as the policy asks for.

    Raises:
        PolicyRefusal: it does not.
    """
    rules = study.aggregation
    if rules.threat_model != "malicious-server":
        return  # the policy takes a coordinator that does not cheat, and then nobody helps it to
    third = policy.corrupt_sites == "third"
    liars = corrupt(roster, rules.threat_model) if policy.corrupt_sites == "third" else policy.corrupt_sites
    if not holds_against(rules, roster, liars):
        most = next((fewer for fewer in reversed(range(liars)) if holds_against(rules, roster, fewer)), 0)
        raise PolicyRefusal(
            "policy",
            f"the study does not hold against {liars} of its {roster} sites helping the coordinator"
            + " (fewer than a third)" * third
            + ", as this site asks; its contract decides that (aggregation.corrupt_sites)",
            f"policy.corrupt_sites: {most}",
        )


def _check_budgeted(policy: SitePolicy, study: Study) -> None:
    policy.budget(study.data.asset)


def _check_schema(policy: SitePolicy, study: Study) -> None:
    if study.schema_version < policy.minimum_schema:
        raise PolicyRefusal(
            "policy",
            f"the contract is of schema {study.schema_version}, this site asks for {policy.minimum_schema} or later",
            f"policy.minimum_schema: {study.schema_version}",
        )


def _check_task(policy: SitePolicy, study: Study) -> None:
    if study.task not in policy.tasks:
        raise PolicyRefusal(
            "policy", f"this site permits no studies of the kind {study.task}", f"policy.tasks: add {study.task}"
        )


def _check_graph(policy: SitePolicy, study: Study) -> None:
    if isinstance(study.model, GraphModel) and not policy.allow_graphs:
        raise PolicyRefusal(
            "policy", "this site permits no study that brings its model as a graph", "policy.allow_graphs: true"
        )


def _check_listed(policy: SitePolicy, study: Study) -> None:
    if policy.studies is not None and study.study not in policy.studies:
        raise PolicyRefusal(
            "policy",
            f"this site's list of permitted studies lacks {study.study!r}",
            f"policy.studies: add {study.study}",
        )


def _check_threat_model(policy: SitePolicy, study: Study) -> None:
    model = study.aggregation.threat_model
    if model not in policy.threat_models:
        raise PolicyRefusal(
            "policy", f"this site takes no coordinator for {model}", f"policy.threat_models: add {model}"
        )


def _check_without_privacy(policy: SitePolicy, study: Study) -> None:
    if study.privacy.mode == "none" and not policy.allow_without_privacy:
        raise PolicyRefusal(
            "policy",
            "this site permits no studies without differential privacy",
            "policy.allow_without_privacy: true",
        )


def _check_same_sites(policy: SitePolicy, study: Study) -> None:
    asked = policy.same_sites_without_privacy and study.privacy.mode == "none"
    if asked and not study.aggregation.same_sites:
        raise PolicyRefusal(
            "policy",
            "this site takes part without differential privacy only where every round is of the same sites "
            "(aggregation.same_sites in the contract)",
            "policy.same_sites_without_privacy: false",
        )


def _check_unlimited(policy: SitePolicy, study: Study) -> None:
    asset = study.data.asset
    if study.privacy.mode == "none" and asset in policy.budgets and not math.isinf(policy.budget(asset).epsilon):
        raise PolicyRefusal(
            "policy",
            f"one round without privacy costs more than any budget; the site would have to set that of asset {asset!r} "
            "to unlimited",
            f"policy.budgets.{asset}.epsilon: unlimited, with a reason; these patients are then promised nothing",
        )


def _check_epsilon(policy: SitePolicy, study: Study) -> None:
    asked = study.privacy.epsilon
    if asked is not None and asked > policy.maximum_epsilon:
        raise PolicyRefusal(
            "policy",
            f"the study asks for ε {asked:g}, this site permits {policy.maximum_epsilon:g}",
            f"policy.maximum_epsilon: {asked:g}",
        )


def _check_count_noise(policy: SitePolicy, study: Study) -> None:
    noise, most = study.privacy.count_noise, policy.maximum_count_noise
    if study.privacy.epsilon is not None and noise > most:
        raise PolicyRefusal(
            "policy",
            f"the study's count_noise is {noise:g} patients, this site permits {most:g} (maximum_count_noise)",
            f"policy.maximum_count_noise: {noise:g}",
        )


def _check_shared_noise(policy: SitePolicy, study: Study) -> None:
    sums, liars = study.privacy.sums, study.aggregation.corrupt_sites
    if sums is None or sums.honest_sites == 1 or study.data.asset not in policy.budgets:
        return
    rules, where = policy.budgets[study.data.asset].shared_noise, f"policy.budgets.{study.data.asset}.shared_noise"
    if not rules.permit:
        raise PolicyRefusal(
            "policy",
            f"in this study a site's own noise is a share of the whole, of {sums.honest_sites} hospitals together; "
            "this site permits none such",
            f"{where}: {{permit: true}}",
        )
    if not isinstance(liars, int) or liars < rules.min_colluding:
        raise PolicyRefusal(
            "policy",
            f"the study shares noise reckoning with {liars} hospitals that work against the others, this site asks for "
            f"{rules.min_colluding}",
            f"{where}.min_colluding: {liars}",
        )
    if study.privacy.noise_multiplier == "auto":
        raise PolicyRefusal("policy", "a study that shares its noise says how much that is (privacy.noise_multiplier)")
    try:
        plan = plan_of(study, 0)
    except (ConfigurationError, BudgetRefused) as error:
        raise PolicyRefusal("policy", f"the study's privacy parameters allow no plan: {error}") from error
    alone = plan.cost_alone() if isinstance(plan, PrivacyPlan) else math.inf
    if alone > rules.max_epsilon_alone:
        raise PolicyRefusal(
            "policy",
            f"this site's own share of the noise alone would limit the study to ε {in_words(alone)}, this site permits "
            f"{rules.max_epsilon_alone:g}",
            f"{where}.max_epsilon_alone: {math.ceil(alone * 10) / 10 if math.isfinite(alone) else '…'}",
        )


RULES: tuple[Callable[[SitePolicy, Study], None], ...] = (
    _check_budgeted,
    _check_task,
    _check_graph,
    _check_schema,
    _check_listed,
    _check_threat_model,
    _check_without_privacy,
    _check_same_sites,
    _check_unlimited,
    _check_epsilon,
    _check_count_noise,
    _check_shared_noise,
)
"""Each raises PolicyRefusal, with what in site.yaml would permit the study."""


def check_patients(policy: SitePolicy, study: Study, patients: int, held_back: int) -> None:
    """Check that there are enough patients for the study. For the site's own people.

    Args:
        policy: the site's.
        study: as proposed.
        patients: number of the site's patients that the study would train on.
        held_back: number of its patients that the study would evaluate on.

    Raises:
        PolicyRefusal: with the first rule that forbids the study.
    """
    if patients < policy.minimum_patients:
        raise PolicyRefusal("policy", f"fewer patients than the {policy.minimum_patients} that this site asks for")
    if policy.allow_evaluation_counts and study.evaluated_rounds and held_back < policy.minimum_held_back:
        raise PolicyRefusal(
            "policy", f"fewer held-back patients than the {policy.minimum_held_back} that this site asks for"
        )
    delta = study.privacy.delta
    if delta is None:
        return
    for owner, value in (("the study", delta), ("the asset's budget", policy.budget(study.data.asset).delta)):
        try:
            check_delta(value, patients)
        except ConfigurationError as error:  # its text has the number of patients, which stays here
            raise PolicyRefusal("policy", f"the delta of {owner} is not below 1 / number of patients here") from error
