"""Suggestion of a study's settings: a part of its contract, and for each setting the reason and where it was measured.

Each task has its own rules (``Task.suggestion``); what they have in common is here. A rule is a figure that was
measured on public data, which ``docs/results/`` has. Nobody's patients are looked at: the numbers of patients and
hospitals are those that the coordinator expects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import SITES

ACCURACY = "docs/results/accuracy.md"
"""Page that has the figures of private studies."""


class Asked(NamedTuple):
    """Numbers that a suggestion is made for.

    Attributes:
        patients: patients to train on, of all hospitals together, at least 1.
        sites: number of hospitals, at least 2.
        epsilon: ε of the whole study for each hospital's patients, more than 0; None: without privacy.
    """

    patients: int
    sites: int
    epsilon: float | None

    def check(self) -> None:
        """Raises ConfigurationError for numbers for which there is no study."""
        if self.patients < 10 * self.sites:
            raise ConfigurationError(
                f"{self.patients} patients at {self.sites} hospitals are fewer than ten at each: give the number of "
                "all hospitals together (--patients)"
            )
        if not 2 <= self.sites <= SITES:
            raise ConfigurationError(f"a federation has 2 to {SITES} hospitals, not {self.sites} (--sites)")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ConfigurationError(f"ε is a positive number, not {self.epsilon:g} (--epsilon)")


class Reason(NamedTuple):
    """Reason of one setting: the key, what was measured, and the page that has the figures."""

    key: str
    why: str
    source: str


@dataclass
class Suggestion:
    """Settings of a study, as its file has them, with their reasons.

    Attributes:
        part: keys of the contract: ``model``, ``training``, ``privacy``, ``aggregation``, ``evaluation``.
        reasons: in the order in which they are shown.
        doubts: what speaks against the study as it was asked for.
    """

    part: dict[str, Any] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def because(self, key: str, why: str, source: str = ACCURACY) -> None:
        """Add the reason of a setting."""
        self.reasons.append(Reason(key, why, source))


def delta(patients: int) -> float:
    """Largest power of ten below one over the number of patients.

    >>> delta(740), delta(4708), delta(1000)
    (0.001, 0.0001, 0.0001)
    """
    return float(f"1e-{math.floor(math.log10(patients)) + 1}")


def steps(found: Suggestion, rounds: int, per_round: int, batch: int, rate: float, name: str = "sgd") -> None:
    """Give a suggestion the training of so many steps at each hospital in a round."""
    found.part["training"] = {
        "rounds": rounds,
        "steps_per_round": per_round,
        "expected_batch": batch,
        "optimizer": {"name": name, "lr": rate},
    }


def without_privacy(found: Suggestion) -> None:
    """Give a suggestion ``privacy: {mode: none}`` and what speaks against it."""
    found.part["privacy"] = {"mode": "none"}
    found.doubts.append(
        "without privacy the model may reveal whom it was trained on; every hospital must permit it, and it ends the "
        "guarantee of that asset for ever"
    )


def shared_rules(found: Suggestion, asked: Asked) -> None:
    """Give a suggestion what is the same for every task."""
    found.part["aggregation"] = {"optimizer": {"name": "fedavg"}, "min_sites": max(2, math.ceil(2 * asked.sites / 3))}
    found.because(
        "aggregation.min_sites",
        "two thirds of the hospitals: a round goes on while a third is away; run says the number below which no sum "
        "may be opened",
        "docs/coordinator.md",
    )
