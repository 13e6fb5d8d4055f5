"""Odds that ε and δ mean: how far anybody's guess about one patient can move. Pure.

For an (ε, δ) guarantee and two equally likely cases (a patient is among the data, or is not), whoever sees everything
that was released guesses right with probability at most (e^ε + δ) / (1 + e^ε): the trade-off between the two kinds of
error of any test (Wasserman & Zhou 2010, theorem 2.4; Kairouz, Oh & Viswanath 2015, theorem 2.1). For another prior p
the posterior is at most e^ε p / (1 - p + e^ε p), outside the part that δ leaves open (Bayes' rule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PRIORS = (0.01, 0.1, 0.5)
"""Prior probabilities: what somebody may have believed before."""

EXAMPLES = (0.1, 1.0, 3.0, 8.0)
"""ε to compare with."""


@dataclass(frozen=True)
class Odds:
    """Bounds of one ε at one δ, against any adversary, whatever else they know.

    Attributes:
        epsilon: at least 0; infinity where there is no guarantee.
        delta: in [0, 1).
        factor: e^ε: how many times as likely an observation can be with a patient's data as without; infinity when it
            is beyond what a float holds.
        guess: probability of a right guess between two equally likely cases; 0.5 is a coin.
        posteriors: for each of ``PRIORS``, the largest probability that a belief can become.
    """

    epsilon: float
    delta: float
    factor: float
    guess: float
    posteriors: tuple[float, ...]


def odds(epsilon: float, delta: float) -> Odds:
    """The odds of a guarantee; without one (infinity) everything is possible.

    >>> round(odds(1.0, 1e-5).guess, 3)
    0.731
    """
    try:
        factor = math.exp(epsilon)
    except OverflowError:
        factor = math.inf
    return Odds(
        epsilon,
        delta,
        factor,
        min(1.0, posterior(0.5, epsilon) + delta * posterior(0.5, -epsilon)),
        tuple(posterior(prior, epsilon) for prior in PRIORS),
    )


def posterior(prior: float, epsilon: float) -> float:
    """The largest probability that a belief of ``prior``, in (0, 1), can become."""
    return 1.0 / (1.0 + math.exp(-epsilon) * (1.0 - prior) / prior) if epsilon > -700 else 0.0
