"""Evaluation as counts that add up across hospitals, and the metrics that follow from their sum.

A counts vector is int64. Which parts it has follows from the metrics that the study asks for, since whatever leaves has
its price: histograms of the scores for the AUROC, ``[A, 2, bins]`` (class; whether the record is of that class; score
bin), where A is 1 (class index 1) for two classes and else all of them; the confusion matrix ``[C, C]`` (true,
predicted) for what is read off it; the sum of the losses in sixteenths; and, where no other part tells it, the number
of records. Counts of several sites are added; nothing else of a record leaves the site.

With privacy every patient counts with one record, so that one patient moves each part by a known amount, and each part
carries Gaussian noise (``deviations``). The fewer bins then sum less noise. Score bins are the same for everybody, no
data chose them: they are even in the inverse hyperbolic sine of the logit.

What is lost without noise: the AUROC of a model whose logits spread by less than about two steps (0.05 each near logit
0, 0.33 near 6) falls towards 0.5, because pairs within one bin count half; otherwise it is within 0.005. The mean loss
is within 1/32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared.study import Study

LOSS_SCALE = 16
"""Steps of the loss per nat; each record's loss is rounded to one before anything is added up."""

Counts = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
Values = dict[str, float | int | None]

_OF_CONFUSION = {"accuracy", "f1", "sensitivity", "specificity"}
METRICS = ("auroc", *sorted(_OF_CONFUSION), "loss")


@dataclass(frozen=True)
class Layout:
    """Which parts a counts vector has.

    Attributes:
        classes: C.
        asked: names of metrics, of ``METRICS``.
        noised: whether the counts carry noise and every patient counts with one record.
    """

    classes: int
    asked: frozenset[str]
    noised: bool

    @classmethod
    def of(cls, study: Study) -> Layout:
        """Layout of the counts that leave a site in this study."""
        return cls(
            len(study.data.label.classes), frozenset(study.evaluation.metrics), noised=study.privacy.mode == "dp"
        )

    @classmethod
    def local(cls, classes: int) -> Layout:
        """Everything, exactly: for the site's own eyes."""
        return cls(classes, frozenset(METRICS), noised=False)

    @property
    def bins(self) -> int:
        """Score bins of a histogram."""
        return 16 if self.noised else 128

    @property
    def logit_range(self) -> float:
        """Scores are told apart between minus and plus this logit."""
        return 8.0 if self.noised else 16.0

    @property
    def loss_limit(self) -> float:
        """Largest loss of one record that is added up, in nats: it scales the noise of the sum."""
        return 4.0 if self.noised else 16.0

    @property
    def scored(self) -> tuple[int, ...]:
        """Classes whose scores have histograms."""
        if "auroc" not in self.asked:
            return ()
        return (1,) if self.classes == 2 else tuple(range(self.classes))

    @property
    def sizes(self) -> dict[str, int]:
        """Part to its numbers in the vector, in the order in which they stand there."""
        found = {
            "scores": len(self.scored) * 2 * self.bins,
            "confusion": self.classes**2 if self.asked & _OF_CONFUSION else 0,
            "loss": 1 if "loss" in self.asked else 0,
        }
        found["records"] = 0 if found["scores"] or found["confusion"] else 1
        return {part: size for part, size in found.items() if size}

    @property
    def width(self) -> int:
        """Length of the vector."""
        return sum(self.sizes.values())

    def deviations(self, noise_multiplier: float) -> dict[str, float]:
        """Part to the standard deviation of the noise on each of its numbers: together they are one Gaussian release.

        A patient, who counts with one record, moves part p by at most Δ_p in L2 norm; with deviation
        σ · Δ_p · √(number of parts) on each of its coordinates, the whole vector in units of its deviations moves
        by at most 1/σ: the release of ``privacy.event.GaussianEvent(noise_multiplier)``.
        """
        moved = {
            "scores": math.sqrt(len(self.scored)),
            "confusion": 1.0,
            "loss": LOSS_SCALE * self.loss_limit,
            "records": 1.0,
        }
        return {part: noise_multiplier * moved[part] * math.sqrt(len(self.sizes)) for part in self.sizes}

    def parts(self, counts: Counts) -> dict[str, Counts]:
        """The vector's parts; raises ValueError for a vector of another length."""
        if counts.shape != (self.width,):
            raise ValueError(f"a counts vector of this study has {self.width} numbers")
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(counts, ends[:-1]), strict=True))


def count(labels: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]], layout: Layout) -> Counts:
    """Exact counts of records with true classes ``labels`` ``[N]`` and predicted distributions ``[N, C]``.

    The predicted class is the most probable one, the first among equals.

    >>> layout = Layout(classes=2, asked=frozenset({"accuracy"}), noised=False)
    >>> here = count(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), layout)
    >>> there = count(np.array([1]), np.array([[0.3, 0.7]]), layout)
    >>> here.tolist()  # rows: true class; columns: predicted class
    [1, 0, 1, 1]
    >>> metrics(here + there, layout)["accuracy"]
    0.75

    Raises:
        ValueError: shapes that do not fit, a label that is no class, or a probability that is not in [0, 1].
    """
    classes = layout.classes
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),) or probabilities.shape[1] != classes:
        raise ValueError("labels [N] and probabilities [N, C] do not fit")
    records = len(labels)
    scores = probabilities.astype(np.float64)
    if records and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError("a label is no class")
    if not ((scores >= 0) & (scores <= 1 + 1e-6)).all():  # also refuses NaN
        raise ValueError("a probability is not in [0, 1]")
    scored = np.array(layout.scored, dtype=np.int64)
    of_class = labels[:, None] == scored
    cell = (np.arange(len(scored)) * 2 + of_class) * layout.bins + _bins(scores[:, scored], layout)
    of_truth = scores[np.arange(records), labels]
    losses = np.minimum(-np.log(np.maximum(of_truth, np.exp(-layout.loss_limit))), layout.loss_limit)
    found = {
        "scores": np.bincount(cell.ravel(), minlength=len(scored) * 2 * layout.bins),
        "confusion": np.bincount(labels * classes + scores.argmax(1), minlength=classes * classes),
        "loss": np.rint(losses * LOSS_SCALE).sum(keepdims=True),
        "records": np.array([records]),
    }
    return np.concatenate([found[part] for part in layout.sizes]).astype(np.int64)


def metrics(counts: Counts, layout: Layout) -> Values:
    """Metrics of summed counts; a metric that is not defined (a class without records) is None, never NaN.

    ``auroc``: of class index 1 for two classes, else the mean over classes of one against the rest. ``accuracy``,
    ``loss`` (mean cross entropy, nats) and ``n`` (records; with noise, an estimate) are over all records. ``f1``,
    ``sensitivity`` and ``specificity``: of class index 1 for two classes, else the mean over classes. Those that were
    not asked for are left out. Noise makes single counts negative, and takes a ratio above 1 or below 0; they are taken
    as they are, since cutting would pull every metric one way and make the lucky ones look certain. ``intervals`` says
    how far the noise may have moved them. None is where noise left nothing to divide by.

    Raises:
        ValueError: a counts vector of another length.
    """
    parts = {part: numbers.astype(np.float64) for part, numbers in layout.parts(counts).items()}
    numbers, shares = counts.astype(np.float64), dict[str, list[float | None]]()
    if "scores" in parts:
        shares["auroc"] = [_auroc(each[1], each[0]) for each in parts["scores"].reshape(-1, 2, layout.bins)]
    for name, part, whole in ratios(layout):
        shares.setdefault(name, []).append(_ratio(float(part @ numbers), float(whole @ numbers)))
    found = {name: _mean(values) for name, values in shares.items()}
    return {**found, "n": max(int(every_record(layout) @ numbers), 0)}


def every_record(layout: Layout) -> Vector:
    """The linear form ``[k]`` whose value on a counts vector is its number of records."""
    form, of = np.zeros(layout.width), _places(layout)
    if "confusion" in of:
        form[of["confusion"]] = 1.0
    elif "records" in of:
        form[of["records"]] = 1.0
    else:
        form[of["scores"][: 2 * layout.bins]] = 1.0
    return form


def ratios(layout: Layout) -> Iterator[tuple[str, Vector, Vector]]:
    """Metrics that are ratios of linear forms of the counts: (name, numerator ``[k]``, denominator ``[k]``).

    A metric over classes comes once for each class: it is their mean.
    """
    of, everybody = _places(layout), every_record(layout)
    if "loss" in layout.asked:
        total = np.zeros(layout.width)
        total[of["loss"]] = 1 / LOSS_SCALE
        yield "loss", total, everybody
    if "confusion" not in of:
        return
    place = of["confusion"].reshape(layout.classes, layout.classes)

    def form(*chosen: npt.NDArray[np.int64]) -> Vector:
        made = np.zeros(layout.width)
        for places in chosen:
            made[places] += 1.0
        return made

    if "accuracy" in layout.asked:
        yield "accuracy", form(place.diagonal()), everybody
    for c in [1] if layout.classes == 2 else range(layout.classes):
        right, of_class, called = form(place[c, c]), form(place[c]), form(place[:, c])
        named = {
            "f1": (2 * right, of_class + called),
            "sensitivity": (right, of_class),
            "specificity": (everybody - of_class - called + right, everybody - of_class),
        }
        yield from ((name, *named[name]) for name in named if name in layout.asked)


def _places(layout: Layout) -> dict[str, npt.NDArray[np.int64]]:
    """Part to where its numbers stand in the vector."""
    return layout.parts(np.arange(layout.width, dtype=np.int64))


def _bins(scores: npt.NDArray[np.float64], layout: Layout) -> npt.NDArray[np.int64]:
    lowest = 1.0 / (1.0 + np.exp(layout.logit_range))
    bounded = np.clip(scores, lowest, 1.0 - lowest)
    logits = np.log(bounded) - np.log1p(-bounded)
    along = np.arcsinh(logits) / np.arcsinh(layout.logit_range)
    bins: Counts = np.floor((along + 1.0) * (layout.bins / 2)).astype(np.int64)
    return np.clip(bins, 0, layout.bins - 1)


def _auroc(positive: npt.NDArray[np.float64], negative: npt.NDArray[np.float64]) -> float | None:
    """Mann–Whitney: the share of (positive, negative) pairs in the right order; pairs within one bin count half."""
    below = np.cumsum(negative) - negative
    pairs = max(float(positive.sum()), 0.0) * max(float(negative.sum()), 0.0)
    return _ratio(float((positive * (below + negative / 2)).sum()), pairs)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _mean(values: list[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if len(defined) == len(values) else None
