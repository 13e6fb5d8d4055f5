"""Tables of scores by outcome tell what the records' own scores do, and once noised, within which intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score, brier_score_loss

from consilium_shared import score_table
from consilium_shared.intervals import noised_metrics, noised_parts, variances
from consilium_shared.metrics import metrics
from consilium_tasks.classification.counts import LATER, METRICS, RICH, ClassLayout, count

EXACT = ClassLayout.local(2)
NOISED = ClassLayout(2, frozenset((*METRICS, *LATER)) - {"loss"}, noised=True)


def records(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes, one in five positive, and scores that are too sure and too high."""
    draw = np.random.default_rng(seed)
    labels = (draw.random(number) < 0.2).astype(np.int64)
    return labels, draw.normal(2.0 * labels - 0.5, 1.5)


def counted(labels: np.ndarray, logits: np.ndarray, layout: ClassLayout) -> np.ndarray:
    scores = 1 / (1 + np.exp(-logits))
    return count(labels, np.stack([1 - scores, scores], 1), layout)


def test_metrics_of_the_table_are_those_of_the_records() -> None:
    labels, logits = records(4000)
    found = metrics(counted(labels, logits, EXACT), EXACT)
    scores = 1 / (1 + np.exp(-logits))
    plain = LogisticRegression(C=1e6).fit(logits[:, None], labels)
    assert found["auprc"] == pytest.approx(average_precision_score(labels, scores), abs=0.005)
    assert found["brier"] == pytest.approx(brier_score_loss(labels, scores), abs=0.002)
    assert found["calibration-slope"] == pytest.approx(plain.coef_.item(), abs=0.01)
    tenth = np.minimum((scores * 10).astype(int), 9)
    error = sum(abs(float((scores - labels)[tenth == each].sum())) for each in range(10)) / len(labels)
    assert found["ece"] == pytest.approx(error, abs=0.01)


def test_recalibrated_scores_are_calibrated() -> None:
    labels, logits = records(4000)
    layout = EXACT
    table = counted(labels, logits, layout)[layout.places()["scores"]].reshape(2, layout.bins).astype(float)
    intercept, slope = score_table.calibration(table, layout.logits)
    again = metrics(counted(labels, intercept + slope * logits, layout), layout)
    assert again["calibration-intercept"] == pytest.approx(0.0, abs=0.02)
    assert again["calibration-slope"] == pytest.approx(1.0, abs=0.02)


def test_with_privacy_everything_but_the_loss_is_one_table_in_which_a_patient_is_in_one_cell() -> None:
    assert [(block.name, block.moved) for block in NOISED.blocks] == [("scores", 1.0)]
    labels, logits = records(3000)
    told, exact = (metrics(counted(labels, logits, each), each) for each in (NOISED, EXACT))
    for name in ("accuracy", "balanced-accuracy", "sensitivity", "specificity", "f1"):
        assert told[name] == pytest.approx(exact[name], abs=1e-12), name


@pytest.mark.parametrize("classes", [2, 3])
def test_balanced_accuracy_gives_every_class_the_same_weight(classes: int) -> None:
    draw = np.random.default_rng(classes)
    labels = draw.choice(classes, 500, p=[0.85, *[0.15 / (classes - 1)] * (classes - 1)])
    found = draw.dirichlet(np.ones(classes), 500)
    found[np.arange(500), labels] += draw.random(500)
    found /= found.sum(1, keepdims=True)
    for asked in ({"balanced-accuracy"}, {"balanced-accuracy", "auroc", "accuracy"}):
        layout = ClassLayout(classes, frozenset(asked), noised=False)
        value = metrics(count(labels, found, layout), layout)["balanced-accuracy"]
        assert value == pytest.approx(balanced_accuracy_score(labels, found.argmax(1)), abs=1e-12)
    layout = ClassLayout(classes, frozenset({"balanced-accuracy"}), noised=False)
    always = np.tile(np.eye(classes)[0], (500, 1))
    assert metrics(count(labels, always, layout), layout)["balanced-accuracy"] == pytest.approx(1 / classes)


def test_a_settled_table_has_no_negative_number_and_as_many_records() -> None:
    noised = np.random.default_rng(0).normal(2.0, 5.0, (20, 2, 16))
    found = score_table.settled(noised)
    known = noised.sum(-1) > 0
    assert (found[known] >= 0).all()
    assert np.allclose(found.sum(-1)[known], noised.sum(-1)[known])
    assert np.isnan(found[~known]).all()


@pytest.mark.parametrize("multiplier", [1.0, 4.0])
def test_intervals_of_derived_metrics_hold_that_of_the_true_counts(multiplier: float) -> None:
    draw, exact = np.random.default_rng(1), counted(*records(2500), NOISED)
    truth, variance = metrics(exact, NOISED), variances(NOISED, multiplier, sites=3)
    held: dict[str, list[bool]] = {}
    for _ in range(100):
        noised = exact + np.rint(draw.normal(0, np.sqrt(variance))).astype(np.int64)
        values, ends = noised_metrics(noised, NOISED, variance)
        for name in RICH:
            if name in ends:
                low, high = ends[name]
                assert low <= (values[name] or 0.0) <= high
                held.setdefault(name, []).append(low <= (truth[name] or 0.0) <= high)
    for name in RICH:
        assert len(held[name]) > 80, name
        assert np.mean(held[name]) >= (0.8 if name == "calibration-slope" else 0.9), name


def test_thresholds_have_sensitivity_and_predictive_value_of_the_same_counts() -> None:
    labels, logits = records(3000)
    found = noised_parts(counted(labels, logits, EXACT), EXACT, None)
    assert {part.kind for part, _, _ in found} == {"thresholds"}
    for part, values, _ in found:
        called = 1 / (1 + np.exp(-logits)) >= float(part.name)
        assert values["sensitivity"] == pytest.approx(called[labels == 1].mean(), abs=0.02)
        assert values["ppv"] == pytest.approx(labels[called].mean(), abs=0.02)


def test_of_an_outcome_that_nobody_has_nothing_is_told() -> None:
    labels, logits = records(50)
    found = metrics(counted(np.zeros_like(labels), logits, EXACT), EXACT)
    assert [found[name] for name in ("auprc", "ece", "calibration-slope")] == [None] * 3
