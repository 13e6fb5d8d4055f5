"""Metrics from counts are close to the exact ones, and the counts are as coarse as they promise to be."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as exact

from consilium_shared.metrics import Counts, Values, metrics
from consilium_tasks.classification.counts import METRICS, ClassLayout, count


def counted(labels: np.ndarray, probabilities: np.ndarray) -> Counts:
    return count(labels, probabilities, ClassLayout.local(probabilities.shape[1]))


def measured(labels: np.ndarray, probabilities: np.ndarray) -> Values:
    return metrics(counted(labels, probabilities), ClassLayout.local(probabilities.shape[1]))


def each_number(layout: ClassLayout, noise_multiplier: float) -> np.ndarray:
    deviations = layout.deviations(noise_multiplier)
    return np.concatenate([np.full(size, deviations[part]) for part, size in layout.sizes.items()])


def two_classes(center: float, spread: float, records: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities whose logits lie around ``center``; positives score half a spread higher."""
    draw = np.random.default_rng(seed)
    labels = (draw.random(records) < 0.3).astype(np.int64)
    positive = 1 / (1 + np.exp(-(center + spread * (draw.standard_normal(records) + 0.5 * labels))))
    return labels, np.stack([1 - positive, positive], axis=1)


@pytest.mark.parametrize("center", [0.0, -1.0, -2.0])
@pytest.mark.parametrize("spread", [2.0, 1.0, 0.5, 0.3])
def test_auroc_is_within_five_thousandths_of_the_exact_one(center: float, spread: float) -> None:
    labels, probabilities = two_classes(center, spread)
    found = measured(labels, probabilities)["auroc"]
    assert found == pytest.approx(exact.roc_auc_score(labels, probabilities[:, 1]), abs=0.005)


@pytest.mark.parametrize("center", [0.0, -2.0, 6.0, -9.0])
@pytest.mark.parametrize("spread", [0.1, 0.03, 0.01])
def test_auroc_of_squeezed_scores_falls_towards_one_half_and_never_beyond(center: float, spread: float) -> None:
    labels, probabilities = two_classes(center, spread)
    found = measured(labels, probabilities)["auroc"]
    assert isinstance(found, float)
    assert 0.5 - 0.01 <= found <= exact.roc_auc_score(labels, probabilities[:, 1]) + 0.015


def test_one_record_set_apart_shows_its_score_as_one_of_few_bins_and_its_loss_to_a_sixteenth() -> None:
    """A model can be crafted so that a score is a patient's raw value; this is all that then leaves."""
    draw = np.random.default_rng(3)
    seen = {
        bytes(counted(np.array([1]), np.array([[1 - p, p]]))) for p in 1 / (1 + np.exp(-draw.uniform(-16, 16, 5000)))
    }
    assert ClassLayout.local(2).width == 2 * 128 + 4 + 1
    assert len(seen) <= 128 + 16 * 16


def test_all_scores_equal_is_one_half_and_perfect_is_one() -> None:
    labels = np.array([0, 1, 0, 1])
    assert measured(labels, np.full((4, 2), 0.5))["auroc"] == 0.5
    assert measured(labels, np.eye(2)[labels])["auroc"] == 1.0
    assert measured(labels, np.eye(2)[1 - labels])["auroc"] == 0.0


def test_binary_metrics_equal_scikit_learn() -> None:
    labels, probabilities = two_classes(-0.5, 1.5)
    found, called = measured(labels, probabilities), probabilities.argmax(1)
    assert found["n"] == 2000
    assert found["accuracy"] == pytest.approx(exact.accuracy_score(labels, called))
    assert found["f1"] == pytest.approx(exact.f1_score(labels, called))
    assert found["sensitivity"] == pytest.approx(exact.recall_score(labels, called))
    assert found["specificity"] == pytest.approx(exact.recall_score(labels, called, pos_label=0))
    assert found["loss"] == pytest.approx(exact.log_loss(labels, probabilities), abs=1 / 32)


def test_metrics_of_four_classes_equal_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 4, 1500)
    logits = draw.standard_normal((1500, 4)) + np.eye(4)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found, called = measured(labels, probabilities), probabilities.argmax(1)
    assert found["auroc"] == pytest.approx(exact.roc_auc_score(labels, probabilities, multi_class="ovr"), abs=0.005)
    assert found["f1"] == pytest.approx(exact.f1_score(labels, called, average="macro"))
    assert found["sensitivity"] == pytest.approx(exact.recall_score(labels, called, average="macro"))
    assert found["loss"] == pytest.approx(exact.log_loss(labels, probabilities), abs=1 / 32)


def test_what_is_not_defined_is_none() -> None:
    only_negative = measured(np.zeros(3, np.int64), np.full((3, 2), 0.5))
    assert only_negative["auroc"] is None
    assert only_negative["sensitivity"] is None
    assert only_negative["accuracy"] == 1.0
    nothing = metrics(np.zeros(ClassLayout.local(3).width, np.int64), ClassLayout.local(3))
    assert nothing["n"] == 0
    assert all(value is None for name, value in nothing.items() if name != "n")


def test_a_certain_and_wrong_prediction_has_a_finite_loss() -> None:
    assert measured(np.array([0]), np.array([[0.0, 1.0]]))["loss"] == 16.0


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        (np.array([2]), np.array([[0.5, 0.5]])),
        (np.array([-1]), np.array([[0.5, 0.5]])),
        (np.array([0]), np.array([[np.nan, 0.5]])),
        (np.array([0]), np.array([[-0.1, 1.1]])),
        (np.array([0, 1]), np.array([[0.5, 0.5]])),
    ],
)
def test_what_is_no_prediction_is_refused(labels: np.ndarray, probabilities: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"label|probability"):
        counted(labels, probabilities)


def test_a_counts_vector_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers"):
        metrics(np.zeros(ClassLayout.local(2).width, np.int64), ClassLayout.local(3))


@pytest.mark.parametrize("asked", [{name} for name in METRICS] + [{"auroc", "loss"}, {"f1", "accuracy"}, set(METRICS)])
def test_only_what_the_metrics_asked_for_need_is_counted(asked: set[str]) -> None:
    labels, probabilities = two_classes(0.0, 1.0)
    layout = ClassLayout(2, frozenset(asked), noised=False)
    assert layout.width <= ClassLayout.local(2).width
    found = metrics(count(labels, probabilities, layout), layout)
    everything = measured(labels, probabilities)
    assert found == {name: everything[name] for name in (*asked, "n")}


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("asked", [{"auroc"}, {"accuracy"}, {"loss"}, {"auroc", "accuracy"}, set(METRICS)])
def test_one_patient_moves_the_counts_by_no_more_than_the_noise_is_made_for(classes: int, asked: set[str]) -> None:
    """In units of its noise at σ = 1 the vector moves by at most 1; for a certain, wrong prediction by just that."""
    layout = ClassLayout(classes, frozenset(asked), noised=True)
    units, draw = each_number(layout, 1.0), np.random.default_rng(2)
    moved = []
    for _ in range(200):
        labels, probabilities = draw.integers(0, classes, 1), draw.dirichlet(np.full(classes, 0.1), 1)
        moved.append(float(np.linalg.norm(count(labels, probabilities, layout) / units)))
    wrong = np.eye(classes)[[1]]
    moved.append(float(np.linalg.norm(count(np.array([0]), wrong, layout) / units)))
    assert max(moved) == pytest.approx(1.0)
    assert each_number(layout, 3.0) == pytest.approx(3.0 * units)


def test_counts_that_noise_made_negative_give_metrics_all_the_same() -> None:
    layout = ClassLayout(2, frozenset(METRICS), noised=True)
    found = metrics(np.full(layout.width, -5, np.int64), layout)
    assert found["n"] == 0
    assert all(value is None for name, value in found.items() if name != "n")
    draw = np.random.default_rng(5)
    labels, probabilities = two_classes(0.0, 1.5, records=4000)
    exactly = metrics(count(labels, probabilities, layout), layout)
    noised = count(labels, probabilities, layout) + np.rint(draw.normal(0, each_number(layout, 3.0))).astype(np.int64)
    for name, value in metrics(noised, layout).items():
        assert isinstance(value, int | float)
        assert value == pytest.approx(exactly[name], rel=0.1), name
