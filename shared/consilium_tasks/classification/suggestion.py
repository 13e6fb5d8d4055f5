"""Suggestion of private sums for a classifier, with how noisy each step is."""

from __future__ import annotations

import math

from consilium_shared.errors import ConfigurationError
from consilium_shared.privacy.accountant import calibrate_noise
from consilium_shared.suggestion import Asked, Suggestion, delta, steps

CLIPPING_NORM = 1.0
"""Clipping norm with which the rates were measured."""


def in_sums(found: Suggestion, asked: Asked, *, sums: int, sampling: float, rate: float) -> None:
    """Give a suggestion so many sums, each one private step of all hospitals together, and say how noisy they are.

    Raises:
        ConfigurationError: an ε at which the noise leaves nothing of a gradient.
        BudgetRefused: no noise is enough.
    """
    assert asked.epsilon is not None  # noqa: S101  (sums are for studies with privacy)
    bound = delta(asked.patients)
    steps(found, sums, 1, max(1, math.ceil(sampling * asked.patients)), rate)
    found.part["privacy"] = {
        "mode": "dp",
        "epsilon": asked.epsilon,
        "delta": bound,
        "clipping_norm": CLIPPING_NORM,
        "sums": {"sampling_rate": sampling},
    }
    found.because("privacy.delta", "the largest power of ten below one over the number of patients")
    found.because(
        "privacy.clipping_norm",
        "rates are measured with this norm; a norm ten times off, at the same rate, cost 6 to 27 points of AUROC on "
        "series and images",
    )
    found.because(
        "training.expected_batch",
        "sampling_rate times the patients of all hospitals; only the step's length follows it",
    )
    sigma = calibrate_noise(sampling, sums, asked.epsilon, bound, [])
    noise = sigma * math.sqrt(asked.sites) / (sampling * asked.patients)
    if noise > 1.0:
        raise ConfigurationError(
            f"at ε {asked.epsilon:g} the noise of {asked.sites} hospitals on each number of a step is {noise:.2g} "
            f"times as long as the mean gradient of {asked.patients} patients can be: take a larger ε or more patients"
        )
    found.because(
        "privacy.sums",
        f"each hospital adds its whole noise, {sigma:.3g} clipping norms, so each number of a step's mean gradient is "
        f"off by {noise:.2g} (one deviation): in proportion to the root of the number of hospitals",
    )
