"""Privacy plan: one frozen object that couples sampling, clipping, noise and the event that is accounted.

The trainer runs a plan and nothing else, and the ledger charges the event that the same plan gives; so what was
promised, what runs and what is charged cannot drift apart.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.limits import RECORDS_PER_PATIENT, ROUNDS, STEPS_PER_ROUND
from consilium_shared.privacy.accountant import calibrate_noise, check_delta, epsilon
from consilium_shared.privacy.event import DpSgdEvent, Event, GaussianEvent, NonPrivateEvent, SharedDpSgdEvent, alone
from consilium_shared.shared_noise import share
from consilium_shared.study import Study


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything that one study takes from one site's patients, with privacy.

    **Guarantee.** Let D and D' be two sets of patients of this site that differ in one patient, with all of that
    patient's records, present in one and absent from the other (add-or-remove-one). If each of ``events()`` runs at
    most once, then for every set S of possible outputs P[M(D) ∈ S] <= e^epsilon · P[M(D') ∈ S] + delta, where the
    output is the noised number of patients, every noisy sum of every step, thus also every model and update computed
    from them, and the noised evaluation counts. All are composed adaptively, as if each saw all patients, though a
    study trains on some and counts on the others. What else touched the same patients is composed by the ledger.

    **Mechanisms.** Training (Abadi et al. 2016, algorithm 1, the patient in place of the example): in each step every
    patient is drawn with probability ``sampling_rate``, independently; the mean gradient of at most
    ``records_per_patient`` of its records, each perhaps in several augmented copies, is scaled to L2 norm at most
    ``clipping_norm``; the sum gets noise. A step that draws nobody is noise alone. With ``training.adaptive_clipping``
    the bound of each step follows from what earlier steps released, and the vector that is bounded is the gradient with
    one number more (``dpsgd/adaptive.py`` at the site). The number of patients and the counts: one Gaussian release
    each.

    **Public.** Every field of this plan. ``sampling_rate`` follows from the study and ``patients``, the noised number.
    Hidden is whether any one patient is among them, and everything in that patient's records.

    **Not covered.** Which patients exist outside the asset; that and when the site answers.

    Attributes:
        sampling_rate: q in (0, 1], the probability with which a patient takes part in a step, independently.
        clipping_norm: C > 0, the largest L2 norm of one patient's contribution to a step's sum; with adaptive clipping,
            to the first step's.
        noise_multiplier: σ > 0; σ·C is the standard deviation of the noise on each coordinate of a step's sum.
        steps_per_round: private steps in a round, at least 1.
        rounds: rounds of the study, at least 1.
        delta: δ in (0, 1).
        epsilon: ε > 0 that the whole study may cost at δ.
        unit: what a neighbouring data set differs in.
        records_per_patient: most records of a drawn patient in a step.
        patients: the number of patients to train on with noise, or None when no form of it is released.
        count_noise: standard deviation of that noise, whose sensitivity is 1.
        evaluations: how often evaluation counts are released.
        evaluation_noise: noise multiplier of each of them.
        honest_sites: m, number of honest sites whose noise together is the whole of σ; 1, this site's own is the whole.
            Of more, the guarantee is that of every opened sum, seen by the coordinator with ``colluding_sites`` sites.
        colluding_sites: k, of the study's roster; 0 where this site's noise is the whole.

    Raises:
        ConfigurationError: a number outside its range.
    """

    sampling_rate: float
    clipping_norm: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int
    delta: float
    epsilon: float
    unit: Literal["patient"] = "patient"
    records_per_patient: int = 1
    patients: int | None = None
    count_noise: float | None = None
    evaluations: int = 0
    evaluation_noise: float | None = None
    honest_sites: int = 1
    colluding_sites: int = 0

    def __post_init__(self) -> None:
        _check_length(self.steps_per_round, self.rounds)
        check_delta(self.delta)
        for name in ("clipping_norm", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.unit != "patient":
            raise ConfigurationError(f"the unit of privacy is the patient, got {self.unit!r}")
        if not 1 <= self.records_per_patient <= RECORDS_PER_PATIENT:
            raise ConfigurationError(f"records_per_patient must be in 1 … {RECORDS_PER_PATIENT}")
        if (self.patients is None) != (self.count_noise is None) or (self.patients is not None and self.patients < 1):
            raise ConfigurationError("a released number of patients is at least 1 and has its noise")
        if not 0 <= self.evaluations <= self.rounds or (self.evaluations > 0) != (self.evaluation_noise is not None):
            raise ConfigurationError("evaluations are at most one a round and have their noise")
        if self.honest_sites == 1 and self.colluding_sites != 0:
            raise ConfigurationError("colluding sites are reckoned with where noise is shared")
        if self.shared and (self.steps_per_round != 1 or self.patients is not None):
            raise ConfigurationError("shared noise is for one private step a sum, with no number of patients released")
        self.events()  # checks sampling rate, noise multipliers and what is shared

    @classmethod
    def for_study(
        cls,
        *,
        patients: int,
        expected_batch: int,
        steps_per_round: int,
        rounds: int,
        epsilon: float,
        delta: float,
        clipping_norm: float,
        noise_multiplier: float | None = None,
        records_per_patient: int = 1,
        count_noise: float | None = None,
        evaluations: int = 0,
        evaluation_epsilon: float | None = None,
    ) -> PrivacyPlan:
        """The plan of a study for a site with ``patients`` patients to train on.

        Args:
            patients: number of patients, at least 1; with the noise of ``count_noise`` in it where that is given.
            expected_batch: expected number of patients in a step; all of them when there are fewer.
            noise_multiplier: as the study fixes it, or None for the smallest that keeps the study within ``epsilon``.
            evaluation_epsilon: what ``evaluations`` releases of counts may cost together; needed when there are any.

        Raises:
            ConfigurationError: a number outside its range, δ >= 1 / patients, or a fixed noise multiplier with which
                the study costs more than ``epsilon``.
            BudgetRefused: no noise is enough for so many steps.
        """
        if patients < 1 or expected_batch < 1:
            raise ConfigurationError(f"a plan needs patients and a batch, got {patients} and {expected_batch}")
        check_delta(delta, patients)
        _check_length(steps_per_round, rounds)
        rate, steps = min(1.0, expected_batch / patients), steps_per_round * rounds
        beside: list[Event] = [] if count_noise is None else [GaussianEvent(count_noise)]
        evaluation_noise = None
        if evaluations:
            if evaluation_epsilon is None:
                raise ConfigurationError("evaluations need an epsilon of their own")
            evaluation_noise = noise_of_evaluations(evaluations, evaluation_epsilon, delta)
            beside += [GaussianEvent(evaluation_noise)] * evaluations
        sigma = calibrate_noise(rate, steps, epsilon, delta, beside) if noise_multiplier is None else noise_multiplier
        plan = cls(
            sampling_rate=rate,
            clipping_norm=clipping_norm,
            noise_multiplier=sigma,
            steps_per_round=steps_per_round,
            rounds=rounds,
            delta=delta,
            epsilon=epsilon,
            records_per_patient=records_per_patient,
            patients=None if count_noise is None else patients,
            count_noise=count_noise,
            evaluations=evaluations,
            evaluation_noise=evaluation_noise,
        )
        if noise_multiplier is not None and plan.cost() > epsilon:
            raise ConfigurationError(
                f"with noise multiplier {noise_multiplier:g} the study would cost ε = {plan.cost():.3f} at {patients} "
                f"patients, more than its ε = {epsilon:g}; use noise_multiplier: auto"
            )
        return plan

    def event(self, rounds: int = 1) -> DpSgdEvent:
        """Event of training ``rounds`` whole rounds: what that does to the data."""
        steps = self.steps_per_round * rounds
        if not self.shared:
            return DpSgdEvent(self.sampling_rate, self.noise_multiplier, steps)
        return SharedDpSgdEvent(
            self.sampling_rate, self.noise_multiplier, steps, self.honest_sites, self.colluding_sites
        )

    @property
    def shared(self) -> bool:
        """True where this site's own noise is a share of the whole."""
        return self.honest_sites != 1

    @property
    def own_noise_multiplier(self) -> float:
        """Noise multiplier of what this site adds itself: σ, or σ/√m."""
        return share(self.noise_multiplier, self.honest_sites)

    def whole(self) -> PrivacyPlan:
        """The plan with the noise of all its honest sites in one place: what an opened sum holds at the least."""
        return replace(self, honest_sites=1, colluding_sites=0)

    def count_event(self) -> GaussianEvent | None:
        """The release of the noised number of patients, once a study; None when no form of it is released."""
        return None if self.count_noise is None else GaussianEvent(self.count_noise)

    def evaluation_event(self) -> GaussianEvent | None:
        """The release of one evaluation's counts; None when none are."""
        return None if self.evaluation_noise is None else GaussianEvent(self.evaluation_noise)

    def events(self) -> tuple[Event, ...]:
        """Everything that the whole study does to the data."""
        count, evaluation = self.count_event(), self.evaluation_event()
        return (
            *(() if count is None else (count,)),
            *(() if evaluation is None else (evaluation,) * self.evaluations),
            self.event(self.rounds),
        )

    def expected(self, batch: int) -> float:
        """Patients that a step draws in expectation, at most, of a study whose batch is ``batch``: of the noised number
        and ten deviations more. A site has more than that with a probability below 10^-23, or patients who came later.
        """
        if self.patients is None or self.count_noise is None:
            return float(batch)
        return max(float(batch), self.sampling_rate * (self.patients + 10.0 * self.count_noise))

    def cost(self) -> float:
        """ε of ``events()`` at ``delta``; at most ``epsilon`` for a plan made by ``for_study``."""
        return epsilon(self.events(), self.delta)

    def cost_alone(self) -> float:
        """ε of this site's own noise alone, at ``delta``: should more sites collude, or the encryption fail."""
        return epsilon(map(alone, self.events()), self.delta)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a ledger writes it; what is shared is left out where nothing is, as in older ledgers."""
        written = {"kind": "dp-sgd", **asdict(self)}
        if not self.shared:
            del written["honest_sites"], written["colluding_sites"]
        return written


@dataclass(frozen=True)
class NonPrivatePlan:
    """Training without differential privacy (``privacy: {mode: none}``): no guarantee of any kind.

    Once it has run, no finite ε holds for the asset ever after.
    """

    steps_per_round: int
    rounds: int

    def __post_init__(self) -> None:
        _check_length(self.steps_per_round, self.rounds)

    def event(self, rounds: int = 1) -> NonPrivateEvent:
        """Event of any number of rounds: what they do to the data."""
        return NonPrivateEvent()

    def count_event(self) -> None:
        """The number of patients is no release of its own beside training without any bound."""

    def evaluation_event(self) -> NonPrivateEvent:
        """Event of one evaluation's counts, which carry no noise."""
        return NonPrivateEvent()

    def events(self) -> tuple[Event, ...]:
        """Everything that the whole study does to the data."""
        return (NonPrivateEvent(),)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a ledger writes it."""
        return {"kind": "non-private", **asdict(self)}


Plan = PrivacyPlan | NonPrivatePlan

_KINDS: dict[str, type[PrivacyPlan] | type[NonPrivatePlan]] = {
    "dp-sgd": PrivacyPlan,
    "non-private": NonPrivatePlan,
}


def plan_of(study: Study, patients: int) -> Plan:
    """Plan that a contract asks of a site: with privacy, at ``patients`` patients, the noised number.

    A site approves this plan, and an auditor makes it again. The noise follows from the steps that will really run.
    With ``privacy.sums`` it follows from the contract alone, and ``patients`` is only held against δ and the step.

    >>> study = Study.model_validate(
    ...     {
    ...         "study": "example",
    ...         "task": "tabular-classification",
    ...         "model": {"name": "logistic"},
    ...         "data": {
    ...             "asset": "stays",
    ...             "label": {"column": "ill", "classes": ["no", "yes"]},
    ...             "features": [{"name": "age"}],
    ...         },
    ...         "training": {"rounds": 4, "steps_per_round": 5, "expected_batch": 50, "optimizer": {"lr": 0.1}},
    ...         "privacy": {"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0},
    ...     }
    ... )
    >>> plan = plan_of(study, patients=500)
    >>> plan.sampling_rate, plan.steps_per_round * plan.rounds, plan.epsilon <= 2.0
    (0.1, 20, True)

    Raises:
        ConfigurationError, BudgetRefused: as ``PrivacyPlan.for_study``.
    """
    training, privacy = study.training, study.privacy
    if privacy.epsilon is None or privacy.delta is None or privacy.clipping_norm is None:
        return NonPrivatePlan(steps_per_round=training.steps_per_round, rounds=training.rounds)
    if privacy.sums is not None:
        return _of_sums(
            study, privacy.sums.sampling_rate, privacy.epsilon, privacy.delta, privacy.clipping_norm, patients
        )
    return PrivacyPlan.for_study(
        patients=patients,
        expected_batch=training.expected_batch,
        steps_per_round=training.steps_per_round,
        rounds=training.rounds,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        clipping_norm=privacy.clipping_norm,
        noise_multiplier=None if privacy.noise_multiplier == "auto" else privacy.noise_multiplier,
        records_per_patient=training.records_per_patient,
        count_noise=privacy.count_noise,
        evaluations=len(study.evaluated_rounds),
        evaluation_epsilon=study.evaluation.epsilon,
    )


def _of_sums(
    study: Study, rate: float, epsilon: float, delta: float, clipping_norm: float, patients: int
) -> PrivacyPlan:
    """Plan in which each opened sum is one private step: the same at every site, so no number of patients is released.

    ``patients``: of this site, known to itself; 0 where it is not known, as to an auditor.
    """
    check_delta(delta, patients or None)
    if patients * rate > study.training.expected_batch:
        raise ConfigurationError(
            f"{patients} patients at a sampling rate of {rate:g} are more in a step than the "
            f"{study.training.expected_batch} that the study expects of all sites together"
        )
    rounds, evaluations = study.training.rounds, len(study.evaluated_rounds)
    counting: float | None = None
    if evaluations:
        assert study.evaluation.epsilon is not None  # noqa: S101  (else none are evaluated)
        counting = noise_of_evaluations(evaluations, study.evaluation.epsilon, delta)
    sums, liars = study.privacy.sums, study.aggregation.corrupt_sites
    honest = 1 if sums is None else sums.honest_sites
    sigma = study.privacy.noise_multiplier
    if sigma == "auto":
        beside = [] if counting is None else [GaussianEvent(counting)] * evaluations
        sigma = calibrate_noise(rate, rounds, epsilon, delta, beside)
    plan = PrivacyPlan(
        sampling_rate=rate,
        clipping_norm=clipping_norm,
        noise_multiplier=sigma,
        steps_per_round=1,
        rounds=rounds,
        delta=delta,
        epsilon=epsilon,
        records_per_patient=study.training.records_per_patient,
        evaluations=evaluations,
        evaluation_noise=counting,
        honest_sites=honest,
        colluding_sites=liars if honest > 1 and isinstance(liars, int) else 0,
    )
    if plan.cost() > epsilon:
        raise ConfigurationError(
            f"with noise multiplier {sigma:g} the study would cost ε = {plan.cost():.3f}, more than its ε = {epsilon:g}"
        )
    return plan


def noise_of_evaluations(evaluations: int, epsilon: float, delta: float) -> float:
    """Noise multiplier of so many releases of evaluation counts that cost ``epsilon`` together, at every site.

    Raises:
        BudgetRefused: no noise is enough.
    """
    return calibrate_noise(1.0, evaluations, epsilon, delta)


def plan_from_dict(record: dict[str, Any]) -> Plan:
    """The plan of a ledger's record, whose types its schema has checked; the inverse of ``to_dict``.

    Raises:
        LedgerError: an unknown kind or key, or a number outside its range.
    """
    fields = dict(record)
    try:
        return _KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError, ConfigurationError) as error:
        raise LedgerError(f"not a plan that this program knows: {error}") from error


def _check_length(steps_per_round: int, rounds: int) -> None:
    if not 1 <= steps_per_round <= STEPS_PER_ROUND:
        raise ConfigurationError(f"steps_per_round must be in 1 … {STEPS_PER_ROUND}, got {steps_per_round}")
    if not 1 <= rounds <= ROUNDS:
        raise ConfigurationError(f"rounds must be in 1 … {ROUNDS}, got {rounds}")
