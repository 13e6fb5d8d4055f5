"""Counts that honest sites cannot have given are refused, those that they can have given never."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.site import CONTRACT

from consilium_shared.intervals import intervals, variances
from consilium_shared.metrics import Counts, Vector
from consilium_shared.plausibility import contradiction, most_held_back
from consilium_shared.study import Study
from consilium_tasks.classification.counts import METRICS, ClassLayout, count

SITES, MULTIPLIER = 5, 4.0


def true_counts(rules: ClassLayout, records: int = 400, seed: int = 0, even: bool = False) -> Counts:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, rules.classes, records)
    probabilities = draw.dirichlet(np.full(rules.classes, 0.5), records)
    if even:  # scores of exactly one half, which are called class 0
        probabilities[::2] = 1 / rules.classes
    return count(labels, probabilities, rules)


def noised(rules: Any, counts: Counts, seed: int) -> tuple[Counts, Vector | None]:
    if not rules.noised:
        return counts, None
    variance = variances(rules, MULTIPLIER, SITES)
    return counts + np.rint(np.random.default_rng(seed).normal(0, np.sqrt(variance))).astype(np.int64), variance


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("asked", [set(METRICS), {"auroc"}, {"accuracy", "loss"}, {"loss"}])
def test_what_honest_sites_give_is_never_refused(private: bool, classes: int, asked: set[str]) -> None:
    rules = ClassLayout(classes, frozenset(asked), private)
    for seed in range(100):
        exact = true_counts(rules, 20 * seed, seed, even=seed % 2 == 0)
        counts, variance = noised(rules, exact, seed)
        assert contradiction(counts, rules, variance) is None


def lie(rules: ClassLayout, part: str, changes: dict[int, int]) -> Counts:
    found = np.zeros(rules.width, np.int64)
    for place, change in changes.items():
        rules.parts(found)[part][place] += change
    return found


TWO = 16
"""Bins of a histogram with privacy; without there are 128."""
LIES: dict[str, tuple[str, dict[int, int], str]] = {
    "errors taken out": ("confusion", {0: 900, 1: -900, 2: -900, 3: 900}, ""),
    "records in the matrix alone": ("confusion", {0: 5000}, "scores of class 1 are not of as many records"),
    "a class that the scores do not have": ("confusion", {0: -50, 1: -50, 2: 500, 3: 500}, ""),
    "a loss of less than nothing": ("loss", {0: -(10**7)}, "below 0"),
    "a loss beyond every limit": ("loss", {0: 10**7}, "losses are larger"),
}


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("name", LIES)
def test_parts_that_contradict_each_other_beyond_the_noise_are_refused(private: bool, name: str) -> None:
    part, changes, why = LIES[name]
    rules = ClassLayout(2, frozenset(METRICS), private)
    counts, variance = noised(rules, true_counts(rules), 1)
    said = contradiction(counts + lie(rules, part, changes), rules, variance)
    assert said is not None
    assert why in said


def test_many_small_lies_are_seen_together() -> None:
    """Each count is only three and a half deviations below 0, as one of many may be."""
    rules = ClassLayout(2, frozenset({"auroc"}), noised=True)
    variance = variances(rules, MULTIPLIER, SITES)
    counts = np.rint(-3.5 * np.sqrt(variance)).astype(np.int64)
    assert "together" in (contradiction(counts, rules, variance) or "")


@pytest.mark.parametrize("multiplier", [1.0, 4.0])
def test_a_figure_better_than_any_model_reaches_is_shown_as_far_as_the_noise_explains_it_and_refused_beyond(
    multiplier: float,
) -> None:
    """One liar takes records with wrong scores out of the sum and puts as many with right scores in."""
    rules = ClassLayout(2, frozenset({"auroc"}), noised=True)
    variance, exact, half = variances(rules, multiplier, 10), true_counts(rules, 600), rules.bins // 2
    shown, refused = list[Any](), list[Any]()
    for strength in range(0, 40, 2):
        counts = exact.copy()
        negatives, positives = rules.parts(counts)["scores"].reshape(2, rules.bins)
        negatives[half:] -= strength
        positives[:half] -= strength
        negatives[0] += strength * half
        positives[-1] += strength * half
        why = contradiction(counts, rules, variance)
        (shown if why is None else refused).append(intervals(counts, rules, variance)["auroc"])
    assert len(shown) > 1
    assert refused or multiplier > 1
    for ends in shown:
        assert ends is not None
        low, high = ends
        assert low - 3 * (high - low) < 1, "far beyond 1, and shown"


def study(**changes: Any) -> Study:
    return Study.model_validate({**CONTRACT, **changes})


def test_more_patients_than_the_weights_allow_are_refused() -> None:
    asked = study(evaluation={"epsilon": 0.5, "split": 0.2})
    rules: Any = ClassLayout.of(asked)
    draw = np.random.default_rng(3)
    for run in range(200):
        everybody, sites = 300 + 10 * run, 4
        held_back = int(draw.binomial(everybody, 0.2))
        weight = everybody - held_back + round(float(draw.normal(0, asked.privacy.count_noise * np.sqrt(sites))))
        most = most_held_back(asked, sites, weight)
        counts, variance = noised(rules, true_counts(rules, held_back, run), run)
        assert contradiction(counts, rules, variance, most) is None
    more = counts.copy()
    rules.parts(more)["scores"][[0, -1]] += 50_000
    rules.parts(more)["confusion"][[0, -1]] += 50_000
    assert contradiction(more, rules, variance) is None  # in itself
    assert "the weights allow" in (contradiction(more, rules, variance, most) or "")


def test_hospitals_that_have_more_patients_than_when_they_approved_are_believed() -> None:
    asked = study(evaluation={"epsilon": 0.5, "split": 0.2}, aggregation={"min_sites": 2, "max_weight": 10**6})
    rules: Any = ClassLayout.of(asked)
    for approved, now in ((400, 560), (80_000, 115_000)):
        most = most_held_back(asked, 4, round(0.8 * approved))
        assert most is not None
        counts, variance = noised(rules, true_counts(rules, now // 5), 1)
        assert contradiction(counts, rules, variance, most) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": {"mode": "none"}, "evaluation": {}},
        {"aggregation": {"min_sites": 2, "weighting": "equal"}},
        {"aggregation": {"min_sites": 2, "max_weight": 500}},
        {"evaluation": {"epsilon": 0.5, "split": None, "split_column": "part"}},
    ],
)
def test_where_the_weight_does_not_tell_how_many_are_held_back_nothing_is_concluded_from_it(
    changes: dict[str, Any],
) -> None:
    assert most_held_back(study(**changes), 3, 500) is None
