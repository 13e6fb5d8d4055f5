"""Evaluation counts of a forecasting study: for each target histograms of the error, of the outcome, of the error of
the last value, and whether the outcome was between the outer quantiles.

A record is in one cell of each histogram of each target. Errors count up to ``CUT`` scales of the study, larger ones as
so many: without an end, the noise on a bin of errors that nobody made would drown the rest. Bins of errors are narrow
near 0, and a record stands for the middle of its bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared.metrics import Block, Counts, Derived, Layout, Part, Ratio, Vector

METRICS = ("rmse", "mae", "r2", "skill", "coverage")
EXPLAINED = {
    "rmse": "Root of the mean squared error, in the target's unit",
    "mae": "Mean absolute error, in the target's unit",
    "r2": "R²: share of the outcome's variance that is explained",
    "skill": "Skill: 1 - the mean squared error over that of the last value",
    "coverage": "Share of outcomes between the outer quantiles",
}
CUT = 3.0


@dataclass(frozen=True)
class Axis:
    """One target, in units of its scale.

    Attributes:
        name: of the target.
        low: end of its range.
        high: other end.
        scale: of the study, in the target's unit.
        last: which of the targets' arrays is its last value, and the factor and offset to this scale.
    """

    name: str
    low: float
    high: float
    scale: float
    last: tuple[int, float, float] | None


@dataclass(frozen=True)
class ForecastLayout(Layout):
    """Histograms of each target.

    Attributes:
        axes: the targets.
        levels: quantiles of each, 1 where there are none.
        asked: names of metrics, of ``METRICS``.
        noised: whether the counts carry noise: then there are fewer bins.
    """

    axes: tuple[Axis, ...]
    levels: int
    asked: frozenset[str]
    noised: bool

    @property
    def bins(self) -> int:
        """Bins of each histogram."""
        return 24 if self.noised else 256

    @property
    def rows(self) -> tuple[str, ...]:
        """Histograms of each target."""
        return ("error", *(["outcome"] if "r2" in self.asked else []), *(["last"] if "skill" in self.asked else []))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Histograms of all targets; and outside and inside of the outer quantiles."""
        targets = len(self.axes)
        made = Block("errors", (targets, len(self.rows), self.bins), math.sqrt(targets * len(self.rows)))
        if "coverage" not in self.asked:
            return (made,)
        return made, Block("between", (targets, 2), math.sqrt(targets))

    @property
    def edges(self) -> Vector:
        """Borders ``[bins + 1]`` of the bins of absolute errors, in units of the scale."""
        return CUT * (np.arange(self.bins + 1) / self.bins) ** 2

    def _rows(self) -> npt.NDArray[np.int64]:
        return self.places()["errors"].reshape(len(self.axes), len(self.rows), self.bins)

    def every_record(self) -> Vector:
        """All errors of the first target."""
        return self._form(self._rows()[0, 0], 1.0)

    def parts_of(self) -> Iterator[Part]:
        """Each target, with the metrics that are asked for."""
        middles = (self.edges[:-1] + self.edges[1:]) / 2
        squares = middles**2
        for at, (axis, rows) in enumerate(zip(self.axes, self._rows(), strict=True)):
            error, ratios, derived = rows[0], list[Ratio](), list[Derived]()
            everybody = self._form(error, 1.0)
            if "mae" in self.asked:
                ratios.append(Ratio("mae", self._form(error, middles * axis.scale), everybody))
            if "skill" in self.asked:
                base = self._form(rows[-1], squares)
                ratios.append(Ratio("skill", base - self._form(error, squares), base))
            if "coverage" in self.asked:
                between = self.places()["between"].reshape(-1, 2)[at]
                ratios.append(Ratio("coverage", self._form(between[1:], 1.0), self._form(between, 1.0)))
            if "rmse" in self.asked:
                derived.append(Derived("rmse", np.stack([error, error]), _root(squares * axis.scale**2)))
            if "r2" in self.asked:
                derived.append(Derived("r2", rows[:2], _explained(squares, self._outcomes(axis))))
            yield Part("targets", axis.name, (), tuple(ratios), tuple(derived))

    def _outcomes(self, axis: Axis) -> Vector:
        """Middles ``[bins]`` of the bins of a target's outcomes."""
        return axis.low + (axis.high - axis.low) * (np.arange(self.bins) + 0.5) / self.bins

    def ratios(self) -> Iterator[Ratio]:
        """Mean error, skill and coverage of each target."""
        for part in self.parts_of():
            yield from part.ratios

    def derived(self) -> Iterator[Derived]:
        """Root of the mean squared error, and R², of each target."""
        for part in self.parts_of():
            yield from part.derived

    def most(self, metric: str) -> float:
        """Largest value: of errors the cut."""
        return CUT * float(np.mean([axis.scale for axis in self.axes])) if metric in ("rmse", "mae") else 1.0

    def least(self, metric: str) -> float:
        """Smallest value: R² and skill have none."""
        return -math.inf if metric in ("r2", "skill") else 0.0

    def never_positive(self) -> Iterator[tuple[Vector, str]]:
        """Histograms that are not of as many records as the first."""
        every, others = self.every_record(), dict[str, Vector]()
        for axis, rows in zip(self.axes, self._rows(), strict=True):
            others |= {
                f"{row} of {axis.name}": self._form(places, 1.0) for row, places in zip(self.rows, rows, strict=True)
            }
        if "coverage" in self.asked:
            between = self.places()["between"].reshape(-1, 2)
            others |= {
                f"quantiles of {axis.name}": self._form(each, 1.0)
                for axis, each in zip(self.axes, between, strict=True)
            }
        for name, form in list(others.items())[1:]:
            what = f"counts of {name} are not of as many records as those of {self.axes[0].name}"
            yield from ((form - every, what), (every - form, what))

    def _form(self, places: npt.NDArray[np.int64], weights: Vector | float) -> Vector:
        made = np.zeros(self.width)
        made[places] = weights
        return made


def _root(squares: Vector) -> Any:
    """Function of tables ``[…, 2, bins]``: root of the mean of ``squares`` over row 0."""

    def read(table: Vector) -> Vector:
        found: Vector = np.sqrt(np.maximum(table[..., 0, :] @ squares / table[..., 0, :].sum(-1), 0.0))
        return found

    return read


def _explained(squares: Vector, outcomes: Vector) -> Any:
    """Function of tables ``[…, 2, bins]``: 1 - mean square of row 0 / variance of row 1; NaN where that is 0."""

    def read(table: Vector) -> Vector:
        error, outcome = (table[..., row, :] / table[..., row, :].sum(-1, keepdims=True) for row in (0, 1))
        mean = (outcome @ outcomes)[..., None]
        variance = (outcome * (outcomes - mean) ** 2).sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Vector = np.where(variance > 0, 1.0 - error @ squares / variance, np.nan)
        return found

    return read


def count(values: npt.NDArray[np.float64], targets: Sequence[npt.NDArray[Any]], layout: ForecastLayout) -> Counts:
    """Exact counts of records with these values ``[N, T · Q]`` and targets, each ``[N]``, in units of their scales.

    Raises:
        ValueError: arrays that do not fit, or a value that is not finite.
    """
    axes, levels = layout.axes, layout.levels
    if values.ndim != 2 or values.shape[1] != len(axes) * levels or any(len(t) != len(values) for t in targets):
        raise ValueError("values [N, T · Q] and targets [N] do not fit")
    if not (np.isfinite(values).all() and all(np.isfinite(each).all() for each in targets)):
        raise ValueError("a value or target is not finite")
    found, places, bins = np.zeros(layout.width, dtype=np.int64), layout.places(), layout.bins
    rows, cuts = places["errors"].reshape(len(axes), len(layout.rows), bins), layout.edges[1:-1]
    for at, axis in enumerate(axes):
        mine, true = values[:, at * levels : (at + 1) * levels], targets[at].astype(np.float64)
        cells = {"error": np.searchsorted(cuts, np.abs(mine[:, levels // 2] - true), side="right")}
        share = (true - axis.low) / (axis.high - axis.low)
        cells["outcome"] = np.clip((share * bins).astype(np.int64), 0, bins - 1)
        if axis.last is not None:
            which, factor, offset = axis.last
            last = np.clip(targets[which].astype(np.float64) * factor + offset, axis.low, axis.high)
            cells["last"] = np.searchsorted(cuts, np.abs(last - true), side="right")
        for row, name in enumerate(layout.rows):
            found[rows[at, row]] += np.bincount(cells[name], minlength=bins)
        if "between" in places:
            inside = ((true >= mine[:, 0]) & (true <= mine[:, -1])).astype(np.int64)
            found[places["between"].reshape(-1, 2)[at]] += np.bincount(inside, minlength=2)
    return found
