"""Intervals of noised metrics hold the metric of the true counts as often as they say, or say that nothing is known."""

from __future__ import annotations

import numpy as np
import pytest

from consilium_shared.intervals import LEVEL, intervals, noised_metrics, variances
from consilium_shared.metrics import Counts, metrics
from consilium_tasks.classification.counts import METRICS, ClassLayout, count

SITES = 3


def layout(classes: int) -> ClassLayout:
    return ClassLayout(classes, frozenset(METRICS), noised=True)


def true_counts(classes: int, records: int, skill: float) -> Counts:
    draw = np.random.default_rng(records)
    labels = draw.integers(0, classes, records)
    logits = draw.standard_normal((records, classes)) + skill * np.eye(classes)[labels]
    return count(labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), layout(classes))


def noised(counts: Counts, classes: int, multiplier: float, draw: np.random.Generator) -> Counts:
    """With the noise that each of the sites adds, rounded at each."""
    rules = layout(classes)
    deviations = rules.deviations(multiplier)
    each = np.concatenate([np.full(size, deviations[part]) for part, size in rules.sizes.items()])
    added = sum(np.rint(draw.normal(0, each)).astype(np.int64) for _ in range(SITES))
    return counts + added


@pytest.mark.parametrize("records", [300, 1000, 3000])
@pytest.mark.parametrize("skill", [0.0, 1.2, 4.0])
@pytest.mark.parametrize("multiplier", [2.0, 6.0])
def test_an_interval_of_two_classes_holds_the_metric_of_the_true_counts_as_often_as_it_says(
    records: int, skill: float, multiplier: float
) -> None:
    """Never seldom, whatever is called unknown; and where nothing is unknown, hardly more often: it is not too wide."""
    runs, rules, draw = 600, layout(2), np.random.default_rng(1)
    counts = true_counts(2, records, skill)
    truth, variance = metrics(counts, rules), variances(layout(2), multiplier, SITES)
    found = [intervals(noised(counts, 2, multiplier, draw), rules, variance) for _ in range(runs)]
    for name in METRICS:
        ends, value = [each[name] for each in found], truth[name]
        assert value is not None
        share = np.mean([each is None or each[0] <= value <= each[1] for each in ends])
        slack = 5 * np.sqrt(LEVEL * (1 - LEVEL) / runs)
        assert share >= LEVEL - slack, name
        if None not in ends and name != "auroc":  # whose deviation is estimated on the large side
            assert share <= LEVEL + slack, name


def test_of_several_classes_an_interval_is_on_the_large_side() -> None:
    draw, rules, counts = np.random.default_rng(2), layout(4), true_counts(4, 5000, 1.0)
    truth, variance = metrics(counts, rules), variances(rules, 2.0, SITES)
    for name in METRICS:
        found = [intervals(noised(counts, 4, 2.0, draw), rules, variance)[name] for _ in range(200)]
        held = [ends is None or ends[0] <= (truth[name] or 0.0) <= ends[1] for ends in found]
        assert np.mean(held) >= 0.88, name


def test_a_metric_lies_in_its_interval_and_none_is_cut_off_at_the_better_end() -> None:
    """Of a model without a mistake the noise makes about as many figures above 1 as below it; all are shown so."""
    draw, rules = np.random.default_rng(3), layout(2)
    labels = draw.integers(0, 2, 1000)
    counts, variance = count(labels, np.eye(2)[labels], rules), variances(rules, 3.0, SITES)
    seen = []
    for _ in range(200):
        values, ends = noised_metrics(noised(counts, 2, 3.0, draw), rules, variance)
        for name, (low, high) in ends.items():
            value = values[name]
            assert value is not None
            assert low <= value <= high
        seen.append(values["accuracy"] or 0.0)
        assert ends["accuracy"][0] < 1 < ends["accuracy"][1] or abs(seen[-1] - 1) > 0.02
    assert 0.35 < np.mean(np.array(seen) > 1) < 0.65
    assert np.mean(seen) == pytest.approx(1.0, abs=0.01)


def test_where_noise_leaves_every_value_open_there_is_no_figure_at_all() -> None:
    rules, draw = layout(2), np.random.default_rng(4)
    counts = noised(true_counts(2, 20, 1.0), 2, 50.0, draw)
    values, ends = noised_metrics(counts, rules, variances(rules, 50.0, SITES))
    assert ends == {}
    assert all(value is None for name, value in values.items() if name != "n")


def test_the_more_noise_the_wider() -> None:
    rules, counts = layout(2), true_counts(2, 3000, 1.0)
    widths = []
    for multiplier in (0.5, 1.0, 2.0, 4.0):
        found = intervals(counts, rules, variances(rules, multiplier, SITES))
        widths.append([high - low for low, high in (found[name] or (0.0, np.inf) for name in METRICS)])
    assert (np.diff(widths, axis=0) > 0).all()
