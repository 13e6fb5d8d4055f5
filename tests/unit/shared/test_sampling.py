"""Intervals for that other patients could have been held back hold what all patients of such a kind would show."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from consilium_shared.grouped import GroupedLayout
from consilium_shared.groups import Grouping
from consilium_shared.intervals import variances
from consilium_shared.metrics import Counts, metrics
from consilium_shared.sampling import sampling
from consilium_tasks.classification.counts import RICH, ClassLayout, count

ASKED = frozenset(("auroc", "accuracy", "sensitivity", "specificity", "loss", *RICH))
EXACT, NOISED = ClassLayout(2, ASKED, noised=False), ClassLayout(2, ASKED, noised=True)
RUNS = 120


def drawn(patients: int, seed: int, layout: ClassLayout) -> Counts:
    """Patients of one kind: a third is ill, and the score tells them apart in part, and is far too sure."""
    draw = np.random.default_rng(seed)
    labels = (draw.random(patients) < 1 / 3).astype(np.int64)
    scores = 1 / (1 + np.exp(-1.6 * draw.normal(1.5 * labels - 1.0, 1.0)))
    return count(labels, np.stack([1 - scores, scores], 1), layout)


@pytest.mark.parametrize(("layout", "patients"), [(EXACT, 150), (EXACT, 900), (NOISED, 900)])
def test_the_interval_holds_the_metric_of_all_such_patients(layout: ClassLayout, patients: int) -> None:
    """In about 95 of 100 draws of patients, and of noise where there is some."""
    true = metrics(drawn(400_000, 10**6, layout), layout)
    held, told = Counter[str](), Counter[str]()
    noise = variances(layout, 1.0, 3) if layout is NOISED else None
    for run in range(RUNS):
        found = drawn(patients, run, layout)
        if noise is not None:
            found = found + np.rint(np.random.default_rng(run).normal(0, np.sqrt(noise))).astype(np.int64)
        for name, (low, high) in sampling(found, layout, noise)[0].items():
            value = true[name]
            assert value is not None and layout.least(name) <= low <= high <= layout.most(name)
            held[name] += low <= value <= high
            told[name] += 1
    assert {"auroc", "accuracy", "sensitivity", "specificity", "brier"} <= set(told)
    assert "loss" not in told, "a sum of losses does not tell how far they are spread"
    often = {name: held[name] / told[name] for name in told if told[name] > RUNS / 2}
    assert min(often.values()) > 0.87, often


def test_a_share_that_no_patient_contradicts_is_not_certain() -> None:
    counts = count(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2), EXACT)
    found, _ = sampling(counts, EXACT, None)
    assert found["accuracy"][1] == 1.0 and 0.4 < found["accuracy"][0] < 0.6


def test_groups_do_not_make_patients_more_than_they_are() -> None:
    """With two groupings each patient stands in the counts twice, and is one patient all the same."""
    by = GroupedLayout(EXACT, (Grouping(column="sex", groups=("f", "m")), Grouping(column="age", borders=(50.0,))))
    some = [drawn(100, seed, EXACT) for seed in range(3)]
    counts = by.stacked([*some, some[1], some[0], some[2]])
    plain, _ = sampling(some[0] + some[1] + some[2], EXACT, None)
    whole, parts = sampling(counts, by, None)
    assert whole.keys() == plain.keys()
    assert all(whole[name] == pytest.approx(plain[name], abs=0.02) for name in plain)
    women = parts["by sex", "f"]
    assert women["auroc"] == pytest.approx(sampling(some[0], EXACT, None)[0]["auroc"])
    assert women["auroc"][1] - women["auroc"][0] > 1.3 * (whole["auroc"][1] - whole["auroc"][0])
    assert 0.28 < women["share"][0] < 1 / 3 < women["share"][1] < 0.39
