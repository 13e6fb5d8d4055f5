"""Answer of a question: tables of counts with known noise, and what can be read off them.

Every count has Gaussian noise of one known standard deviation, independent of the others', so that intervals need no
assumption about patients. Intervals are for the noise alone: who else could have come is not in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 1.959963984540054
"""Standard deviations to each side that hold 95 of 100 values."""
DRAWS = 2000
QUANTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Table:
    """Counts of one feature.

    Attributes:
        name: of the feature.
        rows: names of its categories or bins.
        columns: names of the classes.
        counts: float64 ``[rows, columns]``, with noise, so that a count may be negative.
        edges: ends of the bins, of a numeric feature.
    """

    name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: NDArray[np.float64]
    edges: tuple[float, ...] = ()

    def association(self, noise: float) -> tuple[float, float] | None:
        """Chi-squared statistic of rows and columns, and its p under independence and this noise; None where undefined.

        The usual distribution does not hold for noised counts. So p is the share of tables drawn from the independent
        table of these margins, with Poisson cells and the same noise, whose statistic is as large; margins are read off
        noised counts, so p is approximate, and no test of cells in which fewer than 5 patients are expected.
        """
        seen = self.counts[None]
        found, expected = _statistic(seen), _expected(seen)[0]
        if min(self.counts.shape) < 2 or not np.isfinite(found[0]) or expected.min() < 5:
            return None
        draw = np.random.default_rng(0)
        cells = draw.poisson(expected, (DRAWS, *expected.shape)) + draw.normal(0, noise, (DRAWS, *expected.shape))
        with np.errstate(invalid="ignore"):
            beyond = ~(_statistic(cells) < found[0])  # what is undefined counts against a finding
        return float(found[0]), float((1 + beyond.sum()) / (1 + DRAWS))

    def quantiles(self, column: int, noise: float) -> list[tuple[float, float, float]] | None:
        """Quartiles of one class of a numeric feature with the ends of their intervals; None where noise leaves nobody.

        Within a bin values are taken as evenly spread, so that a quartile is no finer than its bin. None lies beyond
        the outer edges.
        """
        counts, draw = self.counts[:, column], np.random.default_rng(0)
        if counts.sum() <= 2 * WIDTH * noise * math.sqrt(len(counts)):
            return None
        drawn = counts + draw.normal(0, noise, (DRAWS, len(counts)))
        found = []
        for level in QUANTILES:
            many = np.array([_quantile(each, self.edges, level) for each in drawn])
            low, high = np.nanquantile(many, (0.025, 0.975))
            found.append((_quantile(counts, self.edges, level), float(low), float(high)))
        return found


@dataclass(frozen=True)
class Answer:
    """Tables of one study.

    Attributes:
        study: its name.
        by: column whose classes are the tables' columns.
        tables: counts of all patients first, then of each feature.
        noise: standard deviation on each count.
        sites: hospitals in the sum.
        epsilon: what the study costs at most.
        delta: its δ.
    """

    study: str
    by: str
    tables: tuple[Table, ...]
    noise: float
    sites: int
    epsilon: float
    delta: float

    @property
    def margin(self) -> float:
        """Distance to each side of a count that holds the true one in 95 of 100 cases."""
        return WIDTH * self.noise

    def lines(self) -> list[str]:
        """Text for people, at most 80 characters a line but for long names."""
        said = [
            f"{self.study}: patients by {self.by}, from {self.sites} hospitals",
            f"each count ± {self.margin:.1f} (95 of 100); ε {self.epsilon:g}, δ {self.delta:g}",
        ]
        for table in self.tables:
            wide = max(10, *(len(each) for each in table.columns))
            first = max(len(table.name), *(len(each) for each in table.rows))
            said += ["", table.name.ljust(first) + "".join(f"  {each:>{wide}}" for each in table.columns)]
            for row, counts in zip(table.rows, table.counts, strict=True):
                said.append(row.ljust(first) + "".join(f"  {_whole(each):>{wide}}" for each in counts))
            tested = table.association(self.noise)
            if tested is not None:
                said.append(f"  association with {self.by}: chi-squared {tested[0]:.1f}, p {_p(tested[1])}")
            elif len(table.rows) > 1:
                said.append("  no test: fewer than 5 patients are expected in a cell, or noise leaves none")
            for number, column in enumerate(table.columns if table.edges else ()):
                quarters = table.quantiles(number, self.noise)
                spoken = ["too few patients beside the noise"]
                if quarters is not None:
                    spoken = [f"{value:.4g} ({low:.4g} to {high:.4g})" for value, low, high in quarters]
                said.append(f"  quartiles of {column}: {'; '.join(spoken)}")
        return said

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON carries it."""
        tables = []
        for table in self.tables:
            tested = table.association(self.noise)
            tables.append(
                {
                    "name": table.name,
                    "rows": list(table.rows),
                    "columns": list(table.columns),
                    "counts": [[round(each, 3) for each in row] for row in table.counts.tolist()],
                    "chi_squared": None if tested is None else {"statistic": tested[0], "p": tested[1]},
                    "quartiles": {
                        column: table.quantiles(number, self.noise)
                        for number, column in enumerate(table.columns if table.edges else ())
                    },
                }
            )
        return {
            "study": self.study,
            "by": self.by,
            "sites": self.sites,
            "noise": self.noise,
            "margin": self.margin,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "tables": tables,
        }


def _expected(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts that independence of rows and columns expects, of tables ``[n, rows, columns]``."""
    rows, columns = counts.sum(axis=2, keepdims=True), counts.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = rows * columns / counts.sum(axis=(1, 2), keepdims=True)
    return found


def _statistic(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chi-squared of tables ``[n, rows, columns]``; NaN where an expected count is not positive."""
    expected = _expected(counts)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = ((counts - expected) ** 2 / expected).sum(axis=(1, 2))
    return np.where((expected > 0).all(axis=(1, 2)), found, np.nan)


def _quantile(counts: NDArray[np.float64], edges: tuple[float, ...], level: float) -> float:
    """Value below which this share of noised counts lies, linear within its bin; both outer bins are their one edge."""
    below = np.maximum.accumulate(np.cumsum(np.maximum(counts, 0)))
    if below[-1] <= 0:
        return math.nan
    wanted = level * below[-1]
    place = int(np.searchsorted(below, wanted))
    if place == 0:
        return edges[0]
    if place >= len(edges):
        return edges[-1]
    part = (wanted - below[place - 1]) / (below[place] - below[place - 1])
    return float(edges[place - 1] + part * (edges[place] - edges[place - 1]))


def _whole(count: float) -> str:
    return f"{count:.0f}" if round(count) else "0"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
