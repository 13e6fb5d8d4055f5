"""What events cost: the ε of a history of private steps, by privacy loss distributions.

Guarantee computed: for any two sets of patients that differ by adding or removing one patient, everything that the
events released is (ε, δ)-indistinguishable. Every approximation here errs towards a larger ε:

* q is rounded up and σ down to a grid (``on_grid``), so that rounds of almost equal plans share one distribution;
* distributions are discretised by "connect the dots", which dominates the true one (Doroshenko et al. 2022,
  theorem 3.1; ``dp_accounting.pld``, pessimistic estimate, truncated mass counted as lost);
* where the Rényi bound (Mironov et al. 2019, section 3.3; Canonne et al. 2020, proposition 12) is beyond every sensible
  budget it is answered as it is: a distribution would fill the memory, and the Rényi bound is the larger of the two.
  Elsewhere it is not used: for almost no loss its sums cancel, and it may come out too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING

from consilium_shared.errors import BudgetRefused, ConfigurationError
from consilium_shared.privacy.event import DpSgdEvent, Event, GaussianEvent, NonPrivateEvent

if TYPE_CHECKING:  # dp_accounting takes a second to import: only who asks for an ε waits for it
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

NOISE_QUANTUM = Decimal("0.001")
"""Noise multipliers are calibrated to, and accounted on, multiples of this (finer below 1)."""

MOST_NOISE = 10_000.0
"""No calibration beyond this σ: the model would be noise alone."""

MANY_STEPS = 10_000
"""Up to here an interval of 1e-3 costs under 0.01 in ε; beyond, 1e-4 is needed (and per-step losses are small)."""

LARGE_EPSILON = 100.0
"""Beyond this the Rényi bound is answered as it is."""

SMALL_NOISE = 0.1
"""Below this σ a history counts as not private: one step that draws a patient may already cost ε = 50 and more."""

LEAST_DELTA = 1e-12
"""Below this δ the floating-point error of composing (about 1e-15) would no longer be negligible."""

_RENYI_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024, 2048, 4096)

Group = tuple[float, float, int]
"""(q, σ, steps), q and σ on the grid."""


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Upper bound of ε at ``delta`` for all events together, adaptively composed.

    Args:
        events: everything that ever touched the same patients, in any order.
        delta: in (0, 1).

    Returns:
        ε >= 0; 0 for no events; infinity when one was not private or had a noise multiplier below ``SMALL_NOISE``.

    Raises:
        ConfigurationError: ``delta`` outside [``LEAST_DELTA``, 1).
    """
    check_delta(delta)
    history = list(events)
    if any(isinstance(event, NonPrivateEvent) for event in history):
        return math.inf
    groups = _grouped(event for event in history if not isinstance(event, NonPrivateEvent))
    return _epsilon(groups, delta) if groups else 0.0


_cost = epsilon  # the same function, where an argument has its name


def calibrate_noise(
    sampling_rate: float, steps: int, epsilon: float, delta: float, spent: Sequence[Event] = ()
) -> float:
    """Smallest noise multiplier, in thousandths, with which ``steps`` more steps stay within ``epsilon``.

    Args:
        sampling_rate: q of every step, in (0, 1].
        steps: the steps that will really run, at least 1.
        epsilon: what ``spent`` and the new steps together may cost at ``delta``; positive and finite.
        delta: in (0, 1).
        spent: what the same patients' data was used for before.

    Returns:
        σ, a multiple of 0.001, such that ``epsilon([*spent, DpSgdEvent(q, σ, steps)], delta) <= epsilon``.

    Raises:
        ConfigurationError: a number outside its range, or a target so large that it asks for less than σ = 0.1.
        BudgetRefused: no noise up to ``MOST_NOISE`` is enough beside what is spent already.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon must be positive and finite, got {epsilon}")

    def fits(thousandths: int) -> bool:
        event = DpSgdEvent(sampling_rate, thousandths / 1000, steps)
        return _cost([*spent, event], delta) <= epsilon

    enough = 1000
    while not fits(enough):
        if enough >= MOST_NOISE * 1000 or _cost(spent, delta) > epsilon:
            raise BudgetRefused(
                f"no noise is enough: {steps} steps at sampling rate {sampling_rate:.4g}, beside what is spent "
                f"already, stay above ε = {epsilon:g} at δ = {delta:g}; run fewer steps or allow a larger ε"
            )
        enough *= 2
    too_little = enough // 2
    while fits(too_little):
        enough, too_little = too_little, too_little // 2
        if too_little < SMALL_NOISE * 1000:
            raise ConfigurationError(
                f"ε = {epsilon:g} asks for almost no noise (σ below {SMALL_NOISE}), which is no privacy; "
                f"choose a smaller ε"
            )
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        if fits(middle):
            enough = middle
        else:
            too_little = middle
    return enough / 1000


def check_delta(delta: float, patients: int | None = None) -> None:
    """Refuse a δ that is no probability, too small to compute with, or meaningless for so few patients.

    Raises:
        ConfigurationError: ``delta`` outside [``LEAST_DELTA``, 1), or at least 1 / ``patients``.
    """
    if not LEAST_DELTA <= delta < 1:
        raise ConfigurationError(f"delta must be at least {LEAST_DELTA:g} and below 1, got {delta}")
    if patients is not None and delta * patients >= 1:
        raise ConfigurationError(
            f"delta = {delta:g} is too large for {patients} patients: publishing one whole record at random would "
            f"satisfy it. Choose delta below 1/patients = {1 / patients:.2g}, better a tenth of that"
        )


def on_grid(sampling_rate: float, noise_multiplier: float) -> tuple[float, float]:
    """The (q, σ) that is accounted in place of the true one: q up, σ down, so never cheaper.

    q to 4 significant digits; σ to thousandths, and to 4 significant digits where that is finer.
    """
    q, sigma = Decimal(repr(sampling_rate)), Decimal(repr(noise_multiplier))
    q = q.quantize(_fourth_digit(q), rounding=ROUND_CEILING)
    sigma = sigma.quantize(min(NOISE_QUANTUM, _fourth_digit(sigma)), rounding=ROUND_FLOOR)
    return min(1.0, float(q)), float(sigma)


def _fourth_digit(number: Decimal) -> Decimal:
    return Decimal(1).scaleb(number.adjusted() - 3)


def _grouped(events: Iterable[DpSgdEvent | GaussianEvent]) -> tuple[Group, ...]:
    """Equal events added up, in the order of their first appearance (so that a growing history keeps its prefix)."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        rate, count = (1.0, 1) if isinstance(event, GaussianEvent) else (event.sampling_rate, event.steps)
        pair = on_grid(rate, event.noise_multiplier)
        steps[pair] = steps.get(pair, 0) + count
    return tuple((q, sigma, count) for (q, sigma), count in steps.items())


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[Group, ...], delta: float) -> float:
    if min(sigma for _, sigma, _ in groups) < SMALL_NOISE:
        return math.inf
    renyi = _renyi_epsilon(groups, delta)
    if renyi > LARGE_EPSILON:
        return renyi
    interval = 1e-3 if sum(steps for _, _, steps in groups) <= MANY_STEPS else 1e-4
    history = _repeated(*groups[-1], interval)
    if len(groups) > 1:
        history = _composed(groups[:-1], interval).compose(history)
    return max(0.0, float(history.get_epsilon_for_delta(delta)))


@lru_cache(maxsize=8)
def _composed(groups: tuple[Group, ...], interval: float) -> PrivacyLossDistribution:
    history = _repeated(*groups[0], interval)
    for group in groups[1:]:
        history = history.compose(_repeated(*group, interval))
    return history


@lru_cache(maxsize=64)
def _repeated(q: float, sigma: float, steps: int, interval: float) -> PrivacyLossDistribution:
    return _one_step(q, sigma, interval).self_compose(steps)


@lru_cache(maxsize=128)
def _one_step(q: float, sigma: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=q,
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        use_connect_dots=True,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _renyi_epsilon(groups: tuple[Group, ...], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_RENYI_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    for q, sigma, steps in groups:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    return float(accountant.get_epsilon(delta))
