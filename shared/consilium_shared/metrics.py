"""Evaluation as counts that add up across hospitals, and the metrics that follow from their sum.

A counts vector for C classes is int64 with four parts: histograms of the scores, ``[C, 2, BINS]`` (class, whether the
record is of that class, score bin); the confusion matrix ``[C, C]`` (true, predicted); the sum of the losses in
sixteenths; the number of records. Counts of several sites are added; nothing else of a record leaves the site.

Counts are not noised, so they are coarse on purpose: one record that a crafted model sets apart from all others shows
its score as one of 128 bins and its loss to a sixteenth. The bins are the same for everybody, no data chose them: they
are even in the inverse hyperbolic sine of the logit, so a step is about 0.05 near logit 0 (where models that were
trained with strong privacy squeeze their scores), 0.12 near 2 and 0.33 near 6.

What is lost: the AUROC of a model whose logits spread by less than about two steps falls towards 0.5, because pairs
within one bin count half; otherwise it is within 0.005. The mean loss is within 1/32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 128
LOGIT_RANGE = 16.0
"""Scores are told apart between the logits -16 and 16 (probability 1e-7 and 1 - 1e-7)."""

LOSS_SCALE = 16
"""Steps of the loss per nat; each record's loss is rounded to one before anything is added up."""
LOSS_LIMIT = LOGIT_RANGE
"""Largest loss of one record that is added up: that of the same least probability."""

Counts = npt.NDArray[np.int64]


def counts_width(classes: int) -> int:
    """Length of the counts vector for ``classes`` classes."""
    return classes * 2 * BINS + classes * classes + 2


def count(labels: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]]) -> Counts:
    """Counts of records with true classes ``labels`` ``[N]`` and predicted distributions ``probabilities`` ``[N, C]``.

    The predicted class is the most probable one, the first among equals.

    Raises:
        ValueError: shapes that do not fit, a label that is no class, or a probability that is not in [0, 1].
    """
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),):
        raise ValueError("labels [N] and probabilities [N, C] do not fit")
    records, classes = probabilities.shape
    scores = probabilities.astype(np.float64)
    if records and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError("a label is no class")
    if not ((scores >= 0) & (scores <= 1 + 1e-6)).all():  # also refuses NaN
        raise ValueError("a probability is not in [0, 1]")
    of_class = labels[:, None] == np.arange(classes)
    cell = (np.arange(classes) * 2 + of_class) * BINS + _bins(scores)
    histograms = np.bincount(cell.ravel(), minlength=classes * 2 * BINS)
    confusion = np.bincount(labels * classes + scores.argmax(1), minlength=classes * classes)
    of_truth = scores[np.arange(records), labels]
    losses = np.minimum(-np.log(np.maximum(of_truth, np.exp(-LOSS_LIMIT))), LOSS_LIMIT)
    fixed = np.rint(losses * LOSS_SCALE).astype(np.int64).sum()
    return np.concatenate([histograms, confusion, [fixed, records]]).astype(np.int64)


def metrics(counts: Counts, classes: int) -> dict[str, float | int | None]:
    """Metrics of summed counts; a metric that is not defined (a class without records) is None, never NaN.

    ``auroc``: of class index 1 for two classes, else the mean over classes of one against the rest. ``accuracy``,
    ``loss`` (mean cross entropy, nats) and ``n`` (records) are over all records. ``f1``, ``sensitivity`` and
    ``specificity``: of class index 1 for two classes, else the mean over classes.

    Raises:
        ValueError: a counts vector of another length.
    """
    if counts.shape != (counts_width(classes),):
        raise ValueError(f"a counts vector for {classes} classes has {counts_width(classes)} numbers")
    histograms = counts[: classes * 2 * BINS].reshape(classes, 2, BINS).astype(np.float64)
    confusion = counts[classes * 2 * BINS : -2].reshape(classes, classes).astype(np.float64)
    loss, records = int(counts[-2]) / LOSS_SCALE, int(counts[-1])
    asked = [1] if classes == 2 else list(range(classes))
    right = confusion.diagonal()
    of_class, called = confusion.sum(1), confusion.sum(0)
    return {
        "auroc": _mean([_auroc(histograms[c, 1], histograms[c, 0]) for c in asked]),
        "accuracy": _ratio(right.sum(), records),
        "f1": _mean([_ratio(2 * right[c], of_class[c] + called[c]) for c in asked]),
        "sensitivity": _mean([_ratio(right[c], of_class[c]) for c in asked]),
        "specificity": _mean(
            [_ratio(records - of_class[c] - called[c] + right[c], records - of_class[c]) for c in asked]
        ),
        "loss": _ratio(loss, records),
        "n": records,
    }


def _bins(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    lowest = 1.0 / (1.0 + np.exp(LOGIT_RANGE))
    bounded = np.clip(scores, lowest, 1.0 - lowest)
    logits = np.log(bounded) - np.log1p(-bounded)
    along = np.arcsinh(logits) / np.arcsinh(LOGIT_RANGE)
    bins: Counts = np.floor((along + 1.0) * (BINS / 2)).astype(np.int64)
    return np.clip(bins, 0, BINS - 1)


def _auroc(positive: npt.NDArray[np.float64], negative: npt.NDArray[np.float64]) -> float | None:
    """Mann–Whitney: the share of (positive, negative) pairs in the right order; pairs within one bin count half."""
    below = np.cumsum(negative) - negative
    return _ratio(float((positive * (below + negative / 2)).sum()), float(positive.sum() * negative.sum()))


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _mean(values: list[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if len(defined) == len(values) else None
