"""Evaluation counts of several labels: a table of scores by outcome for each, in which unknown ones have a cell too.

A record is in one cell of each label's table, so one patient moves all L of them by √L; they are one block. Metrics are
means over the labels (macro), and each label's own stand beside them. The mean is unknown where one label's is: a study
asks for labels that enough held-back patients have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared.metrics import Block, Counts, Derived, Layout, Order, Part, Ratio, Vector
from consilium_tasks.classification.counts import RICH, ClassLayout, bins_of

METRICS = ("auroc", *RICH, "prevalence")


@dataclass(frozen=True)
class FindingsLayout(Layout):
    """Scores of each label.

    Attributes:
        findings: names of the labels.
        asked: names of metrics, of ``METRICS``.
        noised: whether the counts carry noise and every patient counts with one record.
    """

    findings: tuple[str, ...]
    asked: frozenset[str]
    noised: bool

    @property
    def one(self) -> ClassLayout:
        """Layout of one label alone: its bins, and what is read off them."""
        return ClassLayout(2, self.asked | {"auroc"}, self.noised)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """A row for each label: bins of the negatives, of the positives, and a last cell of those unknown."""
        labels = len(self.findings)
        return (Block("scores", (labels, 2 * self.one.bins + 1), math.sqrt(labels)),)

    def _rows(self) -> npt.NDArray[np.int64]:
        """Places of each label's numbers ``[L, 2 · bins + 1]``."""
        return self.places()["scores"].reshape(len(self.findings), -1)

    def every_record(self) -> Vector:
        """All cells of the first label."""
        return self._form(self._rows()[0])

    def parts_of(self) -> Iterator[Part]:
        """Each label, with the metrics that are asked for."""
        one = self.one
        for name, row in zip(self.findings, self._rows(), strict=True):
            places = row[:-1].reshape(2, one.bins)
            negative, positive = places
            orders = (Order("auroc", (positive[:, None],), (negative[:, None],)),)
            squares, known = np.zeros(self.width), self._form(row[:-1])
            squares[places] = one.squares
            ratios = Ratio("brier", squares, known), Ratio("prevalence", self._form(positive), known)
            yield Part(
                "findings",
                name,
                tuple(each for each in orders if each.name in self.asked),
                tuple(each for each in ratios if each.name in self.asked),
                tuple(one.derived_of(places)),
            )

    def orders(self) -> Iterator[Order]:
        """AUROC of each label."""
        for part in self.parts_of():
            yield from part.orders

    def ratios(self) -> Iterator[Ratio]:
        """Brier score and share of positives of each label."""
        for part in self.parts_of():
            yield from part.ratios

    def derived(self) -> Iterator[Derived]:
        """Average precision and calibration of each label."""
        for part in self.parts_of():
            yield from part.derived

    def most(self, metric: str) -> float:
        """Largest value, as of two classes."""
        return self.one.most(metric)

    def least(self, metric: str) -> float:
        """Smallest value, as of two classes."""
        return self.one.least(metric)

    def never_positive(self) -> Iterator[tuple[Vector, str]]:
        """Labels that are not of as many records as the first."""
        for name, row in zip(self.findings[1:], self._rows()[1:], strict=True):
            form = self._form(row) - self.every_record()
            what = f"the scores of {name} are not of as many records as those of {self.findings[0]}"
            yield from ((form, what), (-form, what))

    def _form(self, places: npt.NDArray[np.int64]) -> Vector:
        made = np.zeros(self.width)
        made[places] = 1.0
        return made


def count(
    findings: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]], layout: FindingsLayout
) -> Counts:
    """Exact counts of records with these findings (1, 0, or -1 where unknown) and probabilities, each ``[N, L]``.

    >>> layout = FindingsLayout(("mass", "effusion"), frozenset({"auroc"}), noised=False)
    >>> found = count(np.array([[1, -1], [0, 1]]), np.array([[0.9, 0.1], [0.2, 0.8]]), layout)
    >>> from consilium_shared.metrics import read
    >>> [read(found.astype(float), part)["auroc"] for part in layout.parts_of()]
    [1.0, None]

    Raises:
        ValueError: arrays that do not fit, or a probability that is not in [0, 1].
    """
    labels, one = len(layout.findings), layout.one
    if findings.shape != probabilities.shape or findings.ndim != 2 or findings.shape[1] != labels:
        raise ValueError("findings [N, L] and probabilities [N, L] do not fit")
    scores = probabilities.astype(np.float64)
    if not ((scores >= 0) & (scores <= 1 + 1e-6)).all():  # also refuses NaN
        raise ValueError("a probability is not in [0, 1]")
    cell = np.where(findings < 0, 2 * one.bins, findings * one.bins + bins_of(scores, one))
    places = np.arange(labels) * (2 * one.bins + 1) + cell
    return np.bincount(places.ravel(), minlength=layout.width).astype(np.int64)
