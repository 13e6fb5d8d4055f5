"""Events that were done to the patients' data: a closed vocabulary that ledgers keep for ever.

The vocabulary only grows. A kind is never removed and never changes its meaning; what an event *costs* is the business
of ``accountant.py`` alone. An unknown kind, key or value is refused, so "we do not know" is never read as "free".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.limits import SITES
from consilium_shared.shared_noise import share

MOST_STEPS = 10**12
"""Steps in one event; more than a site could run in a century."""


@dataclass(frozen=True)
class DpSgdEvent:
    """``steps`` private gradient steps on one set of patients.

    Each step independently: every patient is drawn with probability ``sampling_rate`` (Poisson sampling); each drawn
    patient's gradient is scaled to an L2 norm of at most C; the gradients are added; to each coordinate of the sum
    Gaussian noise of standard deviation ``noise_multiplier`` × C is added; the noisy sum is what later steps and
    the outside may see. (Abadi et al. 2016, algorithm 1, with the patient in place of the example.) C may be another in
    each step, chosen by what earlier steps released.

    Attributes:
        sampling_rate: q, in (0, 1].
        noise_multiplier: σ, greater than 0, finite.
        steps: at least 1. Nothing done is no event.

    Raises:
        ConfigurationError: a number outside its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ConfigurationError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        if not 0 < self.noise_multiplier < math.inf:
            raise ConfigurationError(f"noise_multiplier must be positive and finite, got {self.noise_multiplier}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigurationError(f"steps must be in 1 … {MOST_STEPS}, got {self.steps}")


@dataclass(frozen=True)
class SharedDpSgdEvent(DpSgdEvent):
    """``steps`` private gradient steps whose noise several sites share, seen as sums over all of them alone.

    As ``DpSgdEvent``, with σ for the noise of ``honest_sites`` sites together: this site adds σ/√m, and what the
    outside sees is only ever the sum over sites of which at least m, this one among them, added as much and tell
    nobody. That assumes that at most ``colluding_sites`` sites work against the others, and that the encryption of the
    sum holds. ``alone`` is what is left without.

    Raises:
        ConfigurationError: a number outside its range.
    """

    honest_sites: int
    colluding_sites: int

    def __post_init__(self) -> None:
        super().__post_init__()
        honest, others = self.honest_sites, self.colluding_sites
        if honest < 2 or others < 1 or honest + others > SITES:
            raise ConfigurationError(
                f"shared noise is of 2 or more honest sites beside 1 or more that collude, {SITES} in all at most"
            )


@dataclass(frozen=True)
class GaussianEvent:
    """One release of a statistic with Gaussian noise.

    The statistic, as a vector, changes by at most Δ in L2 norm when one patient is added or removed; to it noise is
    added whose standard deviation is ``noise_multiplier`` × Δ on every coordinate (coordinates of different scale are
    measured in units of their noise). Rounding what comes out is post-processing. (Dwork & Roth 2014, appendix A; the
    cost is computed as that of a private step that draws every patient.)

    Raises:
        ConfigurationError: a noise multiplier that is not positive and finite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ConfigurationError(f"noise_multiplier must be positive and finite, got {self.noise_multiplier}")


@dataclass(frozen=True)
class NonPrivateEvent:
    """The data was used without any bound on what shows: infinite cost, whatever comes before or after."""


Event = DpSgdEvent | GaussianEvent | NonPrivateEvent
"""A ``SharedDpSgdEvent`` is a ``DpSgdEvent``: it costs what its whole noise costs."""


def alone(event: Event) -> Event:
    """Event as it was if nobody else's noise protected it, or the encryption failed: shared noise at its own share.

    >>> alone(SharedDpSgdEvent(1.0, 6.0, 1, honest_sites=4, colluding_sites=1)).noise_multiplier > 3.0
    True
    """
    if not isinstance(event, SharedDpSgdEvent):
        return event
    return DpSgdEvent(event.sampling_rate, share(event.noise_multiplier, event.honest_sites), event.steps)


def event_to_dict(event: Event) -> dict[str, Any]:
    """The event as a ledger writes it."""
    if isinstance(event, NonPrivateEvent):
        return {"kind": "non-private"}
    if isinstance(event, GaussianEvent):
        return {"kind": "gaussian", "noise_multiplier": event.noise_multiplier}
    if isinstance(event, SharedDpSgdEvent):
        return {
            "kind": "dp-sgd-shared",
            "sampling_rate": event.sampling_rate,
            "noise_multiplier": event.noise_multiplier,
            "honest_sites": event.honest_sites,
            "colluding_sites": event.colluding_sites,
            "steps": event.steps,
        }
    return {
        "kind": "dp-sgd",
        "sampling_rate": event.sampling_rate,
        "noise_multiplier": event.noise_multiplier,
        "steps": event.steps,
    }


def event_from_dict(record: Any) -> Event:
    """The event of a ledger's record; the inverse of ``event_to_dict``.

    Raises:
        LedgerError: not a record of a known kind, with exactly its keys, types and ranges.
    """
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind == "non-private":
        _expect_keys(record, {"kind"})
        return NonPrivateEvent()
    if kind == "gaussian":
        _expect_keys(record, {"kind", "noise_multiplier"})
        try:
            return GaussianEvent(_number(record, "noise_multiplier"))
        except ConfigurationError as error:
            raise LedgerError(f"event gaussian: {error}") from error
    if kind == "dp-sgd":
        _expect_keys(record, {"kind", "sampling_rate", "noise_multiplier", "steps"})
        return _steps(record, DpSgdEvent)
    if kind == "dp-sgd-shared":
        shared = {"honest_sites", "colluding_sites"}
        _expect_keys(record, {"kind", "sampling_rate", "noise_multiplier", "steps", *shared})
        return _steps(record, SharedDpSgdEvent, *shared)
    raise LedgerError(
        f"unknown kind of privacy event {kind!r}; this program is older than the ledger, or the ledger was altered"
    )


def really_run(charged: Event, steps: int) -> Event | None:
    """The part of a charged event that was run: ``steps`` of it, or None when nothing was.

    Raises:
        LedgerError: ``steps`` is negative or more than was charged.
    """
    if steps < 0:
        raise LedgerError(f"steps must not be negative, got {steps}")
    if isinstance(charged, DpSgdEvent) and steps > charged.steps:
        raise LedgerError(f"{steps} steps are more than the {charged.steps} that were charged")
    if isinstance(charged, GaussianEvent) and steps > 1:
        raise LedgerError(f"{steps} releases are more than the one that was charged")
    if steps == 0:
        return None
    if not isinstance(charged, DpSgdEvent):
        return charged
    return replace(charged, steps=steps)


def _steps(record: dict[str, Any], kind: type[DpSgdEvent], *whole: str) -> DpSgdEvent:
    for key in ("steps", *whole):
        if type(record[key]) is not int:
            raise LedgerError(f"event {record['kind']}: {key} must be an integer, got {record[key]!r}")
    rate, sigma = _number(record, "sampling_rate"), _number(record, "noise_multiplier")
    try:
        return kind(rate, sigma, record["steps"], **{key: record[key] for key in whole})
    except ConfigurationError as error:
        raise LedgerError(f"event {record['kind']}: {error}") from error


def _expect_keys(record: dict[str, Any], keys: set[str]) -> None:
    if set(record) != keys:
        wrong = sorted(set(record) ^ keys)
        raise LedgerError(f"event {record['kind']}: unknown or missing keys: {', '.join(wrong)}")


def _number(record: dict[str, Any], key: str) -> float:
    value = record[key]
    if type(value) not in (int, float):  # a bool is an int to isinstance
        raise LedgerError(f"event {record['kind']}: {key} must be a number, got {value!r}")
    return float(value)
