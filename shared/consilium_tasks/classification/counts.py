"""Evaluation counts of a classifier: which there are, how records are counted, and what is read off their sum.

Which blocks there are follows from the metrics that the study asks for, since whatever leaves has its price: histograms
of the scores for the AUROC, ``[A, 2, bins]`` (class; whether the record is of that class; score bin), where A is 1
(class index 1) for two classes and else all of them; the confusion matrix ``[C, C]`` (true, predicted) for what is read
off it; the sum of the losses in sixteenths; and, where no other block tells it, the number of records. Score bins are
the same for everybody, no data chose them: they are even in the inverse hyperbolic sine of the logit.

``auroc``: of class index 1 for two classes, else the mean over classes of one against the rest. ``accuracy`` and
``loss`` (mean cross entropy, nats) are over all records. ``balanced-accuracy`` is the mean over classes of the share
of a class's records that are called so. ``f1``, ``sensitivity``, ``specificity`` and ``RICH`` are of
class index 1 for two classes, else the mean over classes of one against the rest. ``calibration-intercept`` holds the
slope at 1.

A study that asks for one of ``RICH`` asks for one table: of two classes everything but the loss is then read off the
histograms of the scores, whose bins have a border at one half, and with privacy no confusion matrix is released beside
them. From it also follow sensitivity, specificity and predictive value at thresholds, and calibration.

What is lost without noise: the AUROC of a model whose logits spread by less than about two steps (0.05 each near logit
0, 0.33 near 6) falls towards 0.5, because pairs within one bin count half; otherwise it is within 0.005. The mean loss
is within 1/32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared import score_table
from consilium_shared.metrics import (
    Block,
    Counts,
    Derived,
    Layout,
    Order,
    Part,
    Ratio,
    Vector,
    histograms,
    table,
    total,
)

LOSS_SCALE = 16
"""Steps of the loss per nat; each record's loss is rounded to one before anything is added up."""

_FIRST = ("accuracy", "f1", "sensitivity", "specificity")
_OF_CONFUSION = {*_FIRST, "balanced-accuracy"}
METRICS = ("auroc", *_FIRST, "loss")
"""Metrics that contracts of schema 1 have."""
RICH = ("auprc", "brier", "ece", "calibration-intercept", "calibration-slope")
"""Metrics of a table of scores by outcome."""
LATER = ("balanced-accuracy", *RICH)
"""Metrics that came with schema 2."""

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Probabilities of which the nearest borders of bins are shown as thresholds."""


@dataclass(frozen=True)
class ClassLayout(Layout):
    """Counts of a classifier.

    Attributes:
        classes: C.
        asked: names of metrics, of ``METRICS`` and ``LATER``.
        noised: whether the counts carry noise and every patient counts with one record.
    """

    classes: int
    asked: frozenset[str]
    noised: bool

    @classmethod
    def local(cls, classes: int) -> ClassLayout:
        """Everything, exactly: for the site's own eyes."""
        return cls(classes, frozenset((*METRICS, *LATER)), noised=False)

    @property
    def rich(self) -> bool:
        """True where the histograms of the scores are to tell more than their order."""
        return bool(self.asked & set(RICH))

    @property
    def told_by_scores(self) -> bool:
        """True where what a confusion matrix has is read off the scores, so that there is none."""
        return self.rich and self.noised and self.classes == 2

    @property
    def bins(self) -> int:
        """Score bins of a histogram."""
        return (32 if self.rich else 16) if self.noised else 128

    @property
    def borders(self) -> Vector:
        """Logits between the bins, float64 ``[bins - 1]``; the middle one is 0."""
        along = np.arange(1, self.bins) / (self.bins / 2) - 1.0
        return np.asarray(np.sinh(along * np.arcsinh(self.logit_range)), dtype=np.float64)

    @property
    def logits(self) -> Vector:
        """Logit that stands for each bin, float64 ``[bins]``: in its middle."""
        along = (np.arange(self.bins) + 0.5) / (self.bins / 2) - 1.0
        return np.asarray(np.sinh(along * np.arcsinh(self.logit_range)), dtype=np.float64)

    @property
    def logit_range(self) -> float:
        """Scores are told apart between minus and plus this logit."""
        return 8.0 if self.noised else 16.0

    @property
    def loss_limit(self) -> float:
        """Largest loss of one record that is added up, in nats: it scales the noise of the sum."""
        return 4.0 if self.noised else 16.0

    @property
    def squares(self) -> Vector:
        """Squared errors of the probability that stands for each bin, float64 ``[2, bins]``: of outcome 0, and of 1."""
        return np.asarray((np.array([[0.0], [1.0]]) - 1.0 / (1.0 + np.exp(-self.logits))) ** 2, dtype=np.float64)

    @property
    def scored(self) -> tuple[int, ...]:
        """Classes whose scores have histograms."""
        if "auroc" not in self.asked and not self.rich:
            return ()
        return (1,) if self.classes == 2 else tuple(range(self.classes))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Scores, confusion matrix, loss, records: those that the metrics need."""
        found = []
        if self.scored:
            found.append(histograms("scores", len(self.scored), self.bins))
        if self.asked & _OF_CONFUSION and not self.told_by_scores:
            found.append(table("confusion", self.classes, self.classes))
        told = bool(found)
        if "loss" in self.asked:
            found.append(total("loss", LOSS_SCALE * self.loss_limit))
        if not told:
            found.append(total("records", 1.0))
        return tuple(found)

    def every_record(self) -> Vector:
        """Form of the confusion matrix where there is one, else of the number of records or of one class's scores."""
        form, of = np.zeros(self.width), self.places()
        if "confusion" in of:
            form[of["confusion"]] = 1.0
        elif "records" in of:
            form[of["records"]] = 1.0
        else:
            form[of["scores"][: 2 * self.bins]] = 1.0
        return form

    def orders(self) -> Iterator[Order]:
        """AUROC of each class that has scores."""
        if "auroc" in self.asked:
            for negative, positive in self._scores():
                yield Order("auroc", (positive[:, None],), (negative[:, None],))

    def derived(self) -> Iterator[Derived]:
        """Average precision and calibration of each class that has scores: those that are asked for."""
        for places in self._scores():
            yield from self.derived_of(places)

    def derived_of(self, places: npt.NDArray[np.int64]) -> Iterator[Derived]:
        """Average precision and calibration of one table of scores, which stands at these places ``[2, bins]``."""
        yield from (Derived(name, places, function) for name, function in self._read.items() if name in self.asked)

    @property
    def _read(self) -> dict[str, Callable[[Vector], Vector]]:
        logits, probabilities = self.logits, 1.0 / (1.0 + np.exp(-self.logits))
        return {
            "auprc": score_table.average_precision,
            "ece": lambda found: score_table.calibration_error(found, probabilities),
            "calibration-intercept": lambda found: score_table.calibration(found, logits, sloped=False)[0],
            "calibration-slope": lambda found: score_table.calibration(found, logits)[1],
        }

    def ratios(self) -> Iterator[Ratio]:
        """Loss, Brier score, accuracy, balanced or not, of each class F1, sensitivity, specificity: those asked for."""
        of, everybody = self.places(), self.every_record()
        if "loss" in self.asked:
            losses = np.zeros(self.width)
            losses[of["loss"]] = 1 / LOSS_SCALE
            yield Ratio("loss", losses, everybody)
        for places in self._scores() if "brier" in self.asked else ():
            squares = np.zeros(self.width)
            squares[places] = self.squares
            yield Ratio("brier", squares, everybody)
        if self.told_by_scores:
            yield from self._at(self.bins // 2, self._scores()[0], _FIRST)
            if "balanced-accuracy" in self.asked:
                for share in self._at(self.bins // 2, self._scores()[0], ("sensitivity", "specificity"), every=True):
                    yield share._replace(name="balanced-accuracy")
        if "confusion" not in of:
            return
        place = of["confusion"].reshape(self.classes, self.classes)
        if "accuracy" in self.asked:
            yield Ratio("accuracy", self._form(place.diagonal()), everybody)
        for c in range(self.classes) if "balanced-accuracy" in self.asked else ():
            yield Ratio("balanced-accuracy", self._form(place[c, c]), self._form(place[c]))
        for c in [1] if self.classes == 2 else range(self.classes):
            right, of_class, called = self._form(place[c, c]), self._form(place[c]), self._form(place[:, c])
            named = {
                "f1": (2 * right, of_class + called),
                "sensitivity": (right, of_class),
                "specificity": (everybody - of_class - called + right, everybody - of_class),
            }
            yield from (Ratio(name, *named[name]) for name in named if name in self.asked)

    def recalibrated(self, counts: Vector, *, noised: bool) -> tuple[float, float] | None:
        """Calibration of two classes off the histograms of their scores, smoothed where they carry noise."""
        if not (self.rich and self.classes == 2):
            return None
        found = counts[self._scores()[0]]
        table = score_table.settled(score_table.smoothed(found)) if noised else found
        intercept, slope = score_table.calibration(table, self.logits)
        return float(intercept), float(slope)

    def parts_of(self) -> Iterator[Part]:
        """Thresholds of two classes, where the study asks for one of ``RICH``."""
        if not (self.rich and self.classes == 2):
            return
        borders, (places,) = 1.0 / (1.0 + np.exp(-self.borders)), self._scores()
        nearest = sorted({int(np.abs(borders - wanted).argmin()) for wanted in THRESHOLDS})
        for at in nearest:
            ratios = tuple(self._at(at + 1, places, ("sensitivity", "specificity", "ppv", "npv"), every=True))
            yield Part("thresholds", f"{borders[at]:.3f}", ratios=ratios)

    def _at(
        self, first: int, places: npt.NDArray[np.int64], names: tuple[str, ...], *, every: bool = False
    ) -> Iterator[Ratio]:
        """Metrics of calling 1 whoever has a score in the bin ``first`` or above, of the table at ``places``."""
        (true_negative, false_positive), (missed, right) = (
            (self._form(row[:first]), self._form(row[first:])) for row in places
        )
        negative, positive = true_negative + false_positive, missed + right
        named = {
            "accuracy": (true_negative + right, negative + positive),
            "f1": (2 * right, positive + right + false_positive),
            "sensitivity": (right, positive),
            "specificity": (true_negative, negative),
            "ppv": (right, right + false_positive),
            "npv": (true_negative, true_negative + missed),
        }
        yield from (Ratio(name, *named[name]) for name in names if every or name in self.asked)

    def _scores(self) -> list[npt.NDArray[np.int64]]:
        """Places of each scored class's histograms ``[2, bins]``."""
        of = self.places()
        return list(of["scores"].reshape(-1, 2, self.bins)) if "scores" in of else []

    def _form(self, *chosen: npt.NDArray[np.int64]) -> Vector:
        """Linear form that adds up the numbers at these places."""
        made = np.zeros(self.width)
        for places in chosen:
            made[places] += 1.0
        return made

    def most(self, metric: str) -> float:
        """The largest loss that is added up; no end of slope and intercept; 1 of every other metric."""
        if metric.startswith("calibration-"):
            return np.inf
        return self.loss_limit if metric == "loss" else 1.0

    def least(self, metric: str) -> float:
        """No end of slope and intercept; 0 of every other metric."""
        return -np.inf if metric.startswith("calibration-") else 0.0

    def never_positive(self) -> Iterator[tuple[Vector, str]]:
        """Losses beyond the largest; blocks that differ in how many records there are, in all and of each class."""
        of, records = self.places(), self.every_record()
        if "loss" in of:
            loss = -LOSS_SCALE * self.loss_limit * records
            loss[of["loss"]] += 1.0
            yield loss, "the losses are larger than those of so many records can be"
        scores = self._scores()
        confusion = of["confusion"].reshape(self.classes, self.classes) if "confusion" in of else None
        for c, each in zip(self.scored, scores, strict=True):
            whole = -records
            whole[each] += 1.0
            yield from _both(whole, f"the scores of class {c} are not of as many records as the others")
            if confusion is None:
                continue
            of_class = np.zeros(self.width)
            of_class[each[1]], of_class[confusion[c]] = 1.0, -1.0
            yield from _both(
                of_class, f"the scores and the confusion matrix differ in how many records are of class {c}"
            )
            if self.classes == 2:  # what is called 1 has a score of a half or more
                for truth in (0, 1):
                    called = np.zeros(self.width)
                    called[confusion[truth, 1]], called[each[truth][self.bins // 2 :]] = 1.0, -1.0
                    yield called, f"more records of class {truth} are called 1 than have such a score"


def _both(form: Vector, what: str) -> Iterator[tuple[Vector, str]]:
    yield form, what
    yield -form, what


def count(
    labels: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]], layout: ClassLayout
) -> Counts:
    """Exact counts of records with true classes ``labels`` ``[N]`` and predicted distributions ``[N, C]``.

    The predicted class is the most probable one, the first among equals.

    >>> layout = ClassLayout(classes=2, asked=frozenset({"accuracy"}), noised=False)
    >>> here = count(np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), layout)
    >>> there = count(np.array([1]), np.array([[0.3, 0.7]]), layout)
    >>> here.tolist()  # rows: true class; columns: predicted class
    [1, 0, 1, 1]
    >>> from consilium_shared.metrics import metrics
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
    cell = (np.arange(len(scored)) * 2 + of_class) * layout.bins + bins_of(scores[:, scored], layout)
    of_truth = scores[np.arange(records), labels]
    losses = np.minimum(-np.log(np.maximum(of_truth, np.exp(-layout.loss_limit))), layout.loss_limit)
    found = {
        "scores": np.bincount(cell.ravel(), minlength=len(scored) * 2 * layout.bins),
        "confusion": np.bincount(labels * classes + scores.argmax(1), minlength=classes * classes),
        "loss": np.rint(losses * LOSS_SCALE).sum(keepdims=True),
        "records": np.array([records]),
    }
    return np.concatenate([found[part] for part in layout.sizes]).astype(np.int64)


def bins_of(scores: npt.NDArray[np.float64], layout: ClassLayout) -> npt.NDArray[np.int64]:
    """Bins of probabilities, of the same shape."""
    lowest = 1.0 / (1.0 + np.exp(layout.logit_range))
    bounded = np.clip(scores, lowest, 1.0 - lowest)
    logits = np.log(bounded) - np.log1p(-bounded)
    along = np.arcsinh(logits) / np.arcsinh(layout.logit_range)
    bins: Counts = np.floor((along + 1.0) * (layout.bins / 2)).astype(np.int64)
    return np.clip(bins, 0, layout.bins - 1)
