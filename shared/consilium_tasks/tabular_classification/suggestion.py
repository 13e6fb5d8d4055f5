"""Settings of a linear model of a table, by how much noise there is for each patient."""

from __future__ import annotations

import math

from consilium_shared.suggestion import Asked, Suggestion, shared_rules, steps, without_privacy
from consilium_tasks.classification.suggestion import in_sums

_RULES = (
    (3e-4, 32, 4.0, "four units of intensive care, 3200 patients, ε 3: AUROC .814"),
    (
        3e-3,
        32,
        2.0,
        "the same at ε 1 .797; in 20 hospitals .736 at ε 1, .784 at ε 3, and .792 and .812 where they share the noise",
    ),
    (math.inf, 16, 1.0, "four heart hospitals, 486 patients, ε 1: AUROC .881, balanced accuracy .806"),
)
"""Rows: largest √sites / (ε · patients), sums, rate, and what was measured there."""
_NOISY = 1e-3


def suggest(asked: Asked) -> Suggestion:
    """Suggest settings of a table of one class a row."""
    found = Suggestion()
    shared_rules(found, asked)
    found.part["model"] = {"name": "logistic"}
    if asked.epsilon is None:
        steps(found, 15, 20, 16, 0.1)
        found.part["evaluation"] = {"every": 5, "metrics": ["auroc", "balanced-accuracy", "brier", "ece"]}
        found.because("model", "four heart hospitals: AUROC .868 together, .859 the best alone")
        without_privacy(found)
        return found
    noise = math.sqrt(asked.sites) / (asked.epsilon * asked.patients)
    sums, rate, measured = next((sums, rate, why) for most, sums, rate, why in _RULES if noise <= most)
    found.because("model", "noise grows with the number of weights; a linear model is what a small ε can train")
    in_sums(found, asked, sums=sums, sampling=1.0, rate=rate)
    found.because("training.rounds", f"{sums} sums at rate {rate:g}: {measured}")
    found.because("privacy.sums.sampling_rate", "everybody in every step: the models are small, so it costs no time")
    found.because(
        "data.label.prior",
        "give it: public rates of the classes, such as [0.88, 0.12], brought two points of AUROC where few are ill",
    )
    found.part["evaluation"] = {"every": sums}
    found.because(
        "evaluation", "one evaluation, of the last model, and none without an epsilon of its own: each is charged"
    )
    found.because(
        "data.features",
        "take the few columns that the literature names: 46 summaries of a stay did better than its series",
    )
    if noise > _NOISY:
        found.doubts.append(
            "each hospital's own noise outweighs what so few patients teach: with 20 hospitals and ε 1 a linear model "
            "of PhysioNet's patients had AUROC .74, in four .79, and in 20 that share their noise .79: share it "
            "(privacy.sums.honest_sites), or take fewer inputs, fewer sums or a larger ε"
        )
    return found
