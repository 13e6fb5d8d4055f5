"""Profile of an asset's values as they stand in its files, before the study's bounds: for the site's own eyes.

It is taken while an asset is read, in bounded memory, and changes nothing of what is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.scanners import Scanners
from consilium_shared.inputs import Numeric

SAMPLE = 10_000
"""Values of a variable that are kept, evenly over the file, for quantiles and the histogram; counts are exact."""
BINS = 24
MOST_WORDS = 1_000
"""Different words of a column that are counted."""
CODES = (0.0, -1.0, -9.0, -99.0, -999.0, -9999.0, 99.0, 999.0, 9999.0, 99999.0, 888.0, 8888.0)
"""Numbers by which tables say that there is none."""


@dataclass(frozen=True)
class Spread:
    """Spread of one numeric variable, in the site's own numbers.

    Attributes:
        name: the study's name of it.
        rows: values that were looked at, with those that are missing.
        values: numbers among them.
        below: numbers under the study's ``low``.
        above: numbers over its ``high``.
        low: smallest, as the other five in the variable's unit.
        q05: quantile of the sample; likewise ``median`` and ``q95``.
        median: of the sample.
        q95: of the sample.
        high: largest.
        distinct: different numbers in the sample.
        counts: histogram of the sample, ``BINS`` bins from ``q00`` to ``q100``.
        q00: where the histogram begins; a few far values at the ends stand in its last bins.
        q100: where it ends.
        codes: number that may be a code for missing -> how often it occurs.
        sample: float64 ``[≤ 2 SAMPLE]``, sorted.
    """

    name: str
    rows: int
    values: int
    below: int
    above: int
    low: float
    q05: float
    median: float
    q95: float
    high: float
    distinct: int
    counts: tuple[int, ...]
    q00: float
    q100: float
    codes: dict[float, int]
    sample: NDArray[np.float64] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Words:
    """Words of one column of classes or categories.

    Attributes:
        name: the study's name of it.
        rows: rows that were looked at.
        known: word of the study -> rows.
        strange: other word -> rows, the most frequent first.
        missing: rows without a word.
    """

    name: str
    rows: int
    known: dict[str, int]
    strange: dict[str, int]
    missing: int


class Profile:
    """Collector of spreads, words, scanners and dates while an asset is read.

    >>> profile = Profile()
    >>> profile.numbers(Numeric(name="age", low=0, high=120), np.array([40.0, 50.0, np.nan, 1950.0]))
    >>> age = profile.spreads()[0]
    >>> age.values, age.above, age.median
    (3, 1, 50.0)
    """

    def __init__(self) -> None:
        self.scanners = Scanners()
        """Scanners of an image asset."""
        self.periods: dict[str, tuple[float, float]] = {}
        """Column of moments -> its first and last, seconds since 1970."""
        self._numbers: dict[str, _Numbers] = {}
        self._words: dict[str, tuple[tuple[str, ...], Counter[str], list[int]]] = {}

    def numbers(self, feature: Numeric, values: NDArray[np.float64]) -> None:
        """Add numbers of a variable, float64 ``[n]``, NaN where there is none; it may be called again and again."""
        self._numbers.setdefault(feature.name, _Numbers(feature)).add(values)

    def moments(self, name: str, seconds: NDArray[np.float64]) -> None:
        """Add moments of a column, seconds since 1970 ``[n]``, NaN where there is none."""
        known = seconds[np.isfinite(seconds)]
        if len(known):
            first, last = self.periods.get(name, (np.inf, -np.inf))
            self.periods[name] = (min(first, float(known.min())), max(last, float(known.max())))

    def words(self, name: str, study: Sequence[str], found: Iterable[tuple[str, int]], missing: int) -> None:
        """Add words of a column with how often each occurs, and the number of rows without one."""
        _, counts, rows = self._words.setdefault(name, (tuple(study), Counter(), [0]))
        for word, count in found:
            if word in counts or len(counts) < MOST_WORDS:
                counts[word] += count
            else:
                counts["…"] += count
        rows[0] += missing

    def spreads(self) -> list[Spread]:
        """Spread of each numeric variable, in the order in which they were met."""
        return [each.spread() for each in self._numbers.values()]

    def columns(self) -> list[Words]:
        """Words of each column, in the order in which they were met."""
        found = []
        for name, (study, counts, (missing,)) in self._words.items():
            strange = {word: count for word, count in counts.most_common() if word not in study}
            known = {word: counts.get(word, 0) for word in study}
            found.append(Words(name, counts.total() + missing, known, strange, missing))
        return found


class _Numbers:
    """Numbers of one variable, counted as they come."""

    def __init__(self, feature: Numeric) -> None:
        self._feature = feature
        self._rows = self._values = self._below = self._above = 0
        self._low, self._high = np.inf, -np.inf
        self._codes: Counter[float] = Counter()
        self._kept: list[NDArray[np.float64]] = []
        self._held, self._stride, self._next = 0, 1, 0

    def add(self, values: NDArray[np.float64]) -> None:
        self._rows += len(values)
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self._values += len(values)
        low, high = self._feature.low, self._feature.high
        self._below += 0 if low is None else int(np.count_nonzero(values < low))
        self._above += 0 if high is None else int(np.count_nonzero(values > high))
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        for code in CODES:
            self._codes[code] += int(np.count_nonzero(values == code))
        taken = values[self._next :: self._stride].astype(np.float64)
        self._next = (self._next - len(values)) % self._stride
        self._kept.append(taken)
        self._held += len(taken)
        while self._held > 2 * SAMPLE:
            # Every second one of what is kept, so that all of a file counts alike, however long it is.
            self._kept = [np.concatenate(self._kept)[::2]]
            self._held, self._stride = len(self._kept[0]), 2 * self._stride
            self._next %= self._stride

    def spread(self) -> Spread:
        name, rows = self._feature.name, self._rows
        if not self._values:
            nan, none = float("nan"), np.zeros(0)
            return Spread(name, rows, 0, 0, 0, nan, nan, nan, nan, nan, 0, (), nan, nan, {}, none)
        sample = np.sort(np.concatenate(self._kept))
        q00, q05, median, q95, q100 = (float(q) for q in np.quantile(sample, [0.005, 0.05, 0.5, 0.95, 0.995]))
        if q00 == q100:
            q00, q100 = q00 - 0.5, q100 + 0.5
        counts, _ = np.histogram(np.clip(sample, q00, q100), bins=BINS, range=(q00, q100))
        return Spread(
            name=name,
            rows=rows,
            values=self._values,
            below=self._below,
            above=self._above,
            low=self._low,
            q05=q05,
            median=median,
            q95=q95,
            high=self._high,
            distinct=len(np.unique(sample)),
            counts=tuple(int(count) for count in counts),
            q00=q00,
            q100=q100,
            codes={code: count for code, count in self._codes.items() if count},
            sample=sample,
        )
