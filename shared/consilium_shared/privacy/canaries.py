"""Proof by a one-run audit with canaries: a lower bound of ε with a confidence, from a count of right guesses.

Canaries are invented patients. Each is put among the patients of one run by a fair coin, or left out; the auditor then
guesses the coins from what the run released, and may abstain. Who guesses more of them rightly than (ε, δ) allows has
shown that the run was not (ε, δ)-differentially private. All canaries share one run, since their coins are independent:
Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023, algorithm 1 and theorem 5.2; the
neighbouring relation is that of the plan, one patient added or removed.

What such a bound is not: proof of privacy. A low one says that this attack failed. Even complete leaks show no more
than about ln(guesses / 4) at the number of guesses, and ln(1 / (120 δ)) at δ, which is why ``compare`` looks at smaller
δ too: the plan's bound holds at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from consilium_shared import limits
from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import LEAST_DELTA
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import Event


@dataclass(frozen=True)
class Way:
    """Guessing rule of an audit: the canaries with the highest scores are in, those with the lowest are out.

    Attributes:
        score: by which score of a run.
        inside: fraction of all canaries that are guessed to be in.
        outside: fraction that are guessed to be out.
    """

    score: Literal["likelihood", "sum"]
    inside: float
    outside: float


WAYS = (Way("likelihood", 0.1, 0.1), Way("likelihood", 0.03, 0.0), Way("sum", 0.5, 0.5))
"""Ways an audit tries on the same run, reporting one: guess the clear cases, guess only those that are surely in (what
shows when few patients are drawn), guess all (what proves most when everything leaks). Fixed by the method, so that an
outcome alone is enough to recompute the bound: each way has its share of the error probability (Bonferroni)."""

CONFIDENCE = 0.95
"""Confidence of every reported bound: a private run exceeds it in at most 1 audit of 20."""

_PRECISION = 1e-4
_COARSE = 5e-3
_LARGEST = 50.0


@dataclass(frozen=True)
class Outcome:
    """Outcome of an audit; the fields of ``messages.CanaryAudit`` and of the ledger's ``audit``.

    Attributes:
        canaries: m, each put in or left out by its own fair coin.
        guesses: r <= m, a number fixed before the run; for the other canaries the auditor abstained.
        correct: v <= r, guesses that were right.

    Raises:
        ConfigurationError: not 1 <= m <= ``limits.CANARIES``, or not 0 <= v <= r <= m.
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        if not 1 <= self.canaries <= limits.CANARIES:
            raise ConfigurationError(f"an audit has 1 … {limits.CANARIES} canaries, got {self.canaries}")
        if not 0 <= self.correct <= self.guesses <= self.canaries:
            raise ConfigurationError(
                f"{self.correct} right of {self.guesses} guesses about {self.canaries} canaries cannot be"
            )


@dataclass(frozen=True)
class Bounds:
    """Bounds at one δ: ``measured`` is a lower bound of ε, ``proven`` an upper one."""

    delta: float
    measured: float
    proven: float


def guess(scores: Mapping[str, npt.NDArray[np.float64]], coins: npt.NDArray[np.bool_]) -> list[Outcome]:
    """The outcome of each of ``WAYS``.

    Args:
        scores: for every ``Way.score`` a number for each canary, float64 ``[m]``: the higher, the more likely it is in.
        coins: bool ``[m]``, whether it was.
    """
    outcomes = []
    for way in WAYS:
        order = np.argsort(scores[way.score], kind="stable")
        inside, outside = int(way.inside * len(coins)), int(way.outside * len(coins))
        correct = coins[order[len(coins) - inside :]].sum() + (~coins[order[:outside]]).sum()
        outcomes.append(Outcome(len(coins), inside + outside, int(correct)))
    return outcomes


def p_value(outcome: Outcome, epsilon: float, delta: float) -> float:
    """Largest probability with which an (ε, δ)-private run lets anybody guess so well or better, by one way.

    Theorem 5.2 of the paper for r guesses without weights: with W ~ Binomial(r, e^ε / (1 + e^ε)),
    P[W >= v] + 2 m δ · max over i in 1 … m of P[v > W >= v - i] / i.
    """
    m, r, v = outcome.canaries, outcome.guesses, outcome.correct
    if v == 0:
        return 1.0
    right = 1.0 / (1.0 + math.exp(-epsilon))
    log_probability = _log_binomial(r, right)
    reached = float(np.exp(log_probability[v:]).sum())
    below = np.exp(log_probability[v - 1 :: -1])  # W = v - 1, v - 2, …, 0: beyond, the sum grows no more and i does
    worst = float((np.cumsum(below) / np.arange(1, v + 1)).max())
    return min(1.0, reached + 2.0 * m * delta * worst)


def lower_bound(outcome: Outcome, delta: float, confidence: float = CONFIDENCE, precision: float = _PRECISION) -> float:
    """ε that the audited run had at least, at ``delta``, unless what has probability 1 - ``confidence`` happened.

    The bounds of one outcome at several δ hold together with that one confidence: each exceeds the truth exactly when
    ``correct`` reaches some number, and the lowest of these numbers decides for all.

    Args:
        outcome: of the way of guessing that was reported, of all ``WAYS`` tried.
        delta: δ in [0, 1).
        confidence: in (0, 1).
        precision: by how much the returned ε may be too small.

    Returns:
        The largest ε whose ``p_value`` is below one way's share of 1 - confidence, rounded down; 0 when there is none.

    >>> round(lower_bound(Outcome(canaries=100, guesses=50, correct=50), 0.0), 1)
    2.5
    """
    error = _error(confidence)
    if p_value(outcome, 0.0, delta) >= error:
        return 0.0
    refuted, open_ = 0.0, _LARGEST
    while open_ - refuted > precision:
        middle = (refuted + open_) / 2
        if p_value(outcome, middle, delta) < error:
            refuted = middle
        else:
            open_ = middle
    return refuted


def compare(
    outcome: Outcome, events: Iterable[Event], delta: float, confidence: float = CONFIDENCE
) -> tuple[Bounds, ...]:
    """Measured beside proven at δ, δ / 10, δ / 100 … down to ``limits.LEAST_DELTA``.

    Args:
        outcome: of the audit.
        events: what the audited run did: the training of a whole plan.
        delta: the plan's δ.

    Raises:
        ConfigurationError: as ``accountant.epsilon``.
    """
    return _beside(outcome, _proven(events, delta), confidence)


@dataclass(frozen=True)
class Power:
    """Power of audits of one plan: what they show at best, of a run that gives every coin away.

    Attributes:
        most: of so many canaries as were asked for, measured beside proven, at δ and at smaller ones.
        best: of ``NUMBERS``, and that which was asked for, the number of canaries whose audit comes farthest above what
            is proven, at whichever δ.
        most_of_best: the same as ``most``, of so many.
    """

    most: tuple[Bounds, ...]
    best: int
    most_of_best: tuple[Bounds, ...]

    @property
    def able(self) -> bool:
        """True where this audit could contradict the proven bound at all."""
        return contradiction(self.most) is not None


NUMBERS = (30, 100, 300, 1_000, 2_000, 5_000, 10_000, 30_000, 100_000)
"""Numbers of canaries among which the best is looked for. More are not always better: δ allows a share of the canaries
to be given away, and of many canaries that is many."""


def power(canaries: int, events: Iterable[Event], delta: float) -> Power:
    """Power of an audit of a plan: what so many canaries can show, and which number of them could show the most.

    Args:
        canaries: how many are planted.
        events: what the audited run does: the training of a whole plan.
        delta: the plan's δ.

    Raises:
        ConfigurationError: as ``Outcome`` and ``accountant.epsilon``.
    """
    proven = _proven(events, delta)
    of = {number: _most(number, proven) for number in {canaries, *NUMBERS}}
    best = max(sorted(of), key=lambda number: _margin(of[number]))
    return Power(of[canaries], best, of[best])


def needed(outcome: Outcome, proven: float, delta: float) -> int | None:
    """Right guesses, of as many as were made, from which on an audit shows more than ε ``proven`` at ``delta``.

    None where all of them do not.
    """
    guesses, low = outcome.guesses, 0
    if p_value(Outcome(outcome.canaries, guesses, guesses), proven, delta) >= _error(CONFIDENCE):
        return None
    high = guesses
    while high - low > 1:
        middle = (low + high) // 2
        if p_value(Outcome(outcome.canaries, guesses, middle), proven, delta) < _error(CONFIDENCE):
            high = middle
        else:
            low = middle
    return high


def strongest(
    outcomes: Sequence[Outcome], events: Iterable[Event], delta: float, confidence: float = CONFIDENCE
) -> Outcome:
    """Outcome to report: the nearest to contradicting the proven bound, or the strongest contradiction of it."""
    proven = _proven(events, delta)
    return max(outcomes, key=lambda outcome: _margin(_beside(outcome, proven, confidence)))


def contradiction(bounds: Sequence[Bounds]) -> Bounds | None:
    """Bounds whose measured one exceeds the proven one the most: a defect, with the confidence of the bounds. Or None.

    The proven curve holds at every δ and the measured bounds hold together, so one δ is enough.
    """
    worst = nearest(bounds)
    return worst if worst.measured > worst.proven else None


def nearest(bounds: Sequence[Bounds]) -> Bounds:
    """Bounds whose measured one comes nearest to the proven one, or exceeds it the most."""
    return max(bounds, key=lambda b: b.measured - b.proven)


def _error(confidence: float) -> float:
    return (1.0 - confidence) / len(WAYS)


def _proven(events: Iterable[Event], delta: float) -> dict[float, float]:
    """ε of the events at δ and at smaller ones."""
    done = list(events)
    return {d: epsilon(done, d) for d in (delta * 10.0**-k for k in range(13)) if d >= LEAST_DELTA}


def _beside(outcome: Outcome, proven: Mapping[float, float], confidence: float = CONFIDENCE) -> tuple[Bounds, ...]:
    return tuple(Bounds(d, lower_bound(outcome, d, confidence), bound) for d, bound in proven.items())


def _most(canaries: int, proven: Mapping[float, float]) -> tuple[Bounds, ...]:
    """Had every guess been right, by the way of guessing that comes farthest."""
    everything = [int(way.inside * canaries) + int(way.outside * canaries) for way in WAYS]
    outcomes = [Outcome(canaries, guesses, guesses) for guesses in everything]
    found = [
        tuple(Bounds(d, lower_bound(outcome, d, precision=_COARSE), bound) for d, bound in proven.items())
        for outcome in outcomes
    ]
    return max(found, key=_margin)


def _margin(bounds: Sequence[Bounds]) -> float:
    bound = nearest(bounds)
    return bound.measured - bound.proven


def _log_binomial(trials: int, probability: float) -> npt.NDArray[np.float64]:
    """Logarithm of P[Binomial(trials, probability) = w] for w = 0 … trials: float64 ``[trials + 1]``."""
    from scipy.special import xlog1py, xlogy  # a large import

    w = np.arange(trials + 1, dtype=np.float64)
    found: npt.NDArray[np.float64] = _log_ways(trials) + xlogy(w, probability) + xlog1py(trials - w, -probability)
    return found


@lru_cache(maxsize=4)
def _log_ways(trials: int) -> npt.NDArray[np.float64]:
    """Logarithm of the binomial coefficients: float64 ``[trials + 1]``, asked for again at every ε of a search."""
    from scipy.special import gammaln

    w = np.arange(trials + 1, dtype=np.float64)
    found: npt.NDArray[np.float64] = gammaln(trials + 1) - gammaln(w + 1) - gammaln(trials - w + 1)
    found.flags.writeable = False
    return found
