"""Intervals of metrics of noised counts, which hold the metric of the true counts.

The deviation of the noise on every number is known from the contract, so nothing is guessed. A ratio r of two sums of
counts lies where the sum "part - r · whole" is no farther from 0 than its own noise explains (Fieller 1954): that holds
also where the noise of what one divides by is large, where an error to first order is far too narrow. For the AUROC,
which multiplies counts, the deviation of that sum is estimated from the noised counts themselves, on the large side.
A mean over classes lies between the means of the classes' ends, which is on the large side too.

Metrics that are no such ratio (calibration, average precision) are read off a smoothed table, or off the table as it is
where smoothing would change more than noise does; and off ``DRAWS`` of them to which noise was added once more, half as
much again. Their interval reaches as far as those lie from the metric, and as far to its other side. It held the metric
of the true counts in 95 of 100 cases or more; that of the calibration's slope, which noise draws towards 0, in fewer
where patients are few. They are unknown where noise is a fifth of how many have the outcome.

That is the noise alone. That the patients are few, and others could have been held back, is an uncertainty beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium_shared.metrics import Counts, Layout, Part, Values, Vector, mean, metrics, read, table_at
from consilium_shared.score_table import WAVES, settled, smoothed

LEVEL = 0.95
DRAWS = 200
"""Tables drawn for the interval of one metric."""
WIDER = 1.5
"""Noise of a drawn table, in deviations of the counts' noise: what smoothing and settling bend grows with it."""
ROUGH = 2.0
"""Mean square, in variances of the noise, of what smoothing takes out: of more a part is the scores' own, and stays."""
TOLD = 5.0
"""Deviations of its noise that an outcome's number of records is to have at least."""
DEVIATIONS = 1.959963984540054
"""Standard deviations of a normal distribution, to either side, that leave out 1 - ``LEVEL``."""

Interval = tuple[float, float]


def variances(layout: Layout, noise_multiplier: float, sites: int) -> Vector:
    """Variance of the noise on each number of a counts vector ``[k]`` that ``sites`` have added, rounding included."""
    deviations = layout.deviations(noise_multiplier)
    one = np.concatenate([np.full(size, deviations[part] ** 2 + 1 / 12) for part, size in layout.sizes.items()])
    return sites * one


def intervals(
    counts: Counts, layout: Layout, variance: Vector, deviations: float = DEVIATIONS
) -> dict[str, Interval | None]:
    """Metric to the interval that holds that of the true counts, in 95 of 100 cases at least.

    Args:
        counts: the noised sum ``[k]``.
        variance: of the noise on each of its numbers ``[k]``.
        deviations: of a normal distribution, to either side of the metric; other than the default for other chances.

    Returns:
        (low, high), not cut off at 0 and 1; None where the noise leaves every value open.
    """
    return _of_part(counts.astype(np.float64), layout.whole, variance, deviations)


def _of_part(numbers: Vector, part: Part, variance: Vector, deviations: float) -> dict[str, Interval | None]:
    """Intervals of a part's orders and ratios."""
    found = dict[str, list[Interval | None]]()
    for name, ends in intervals_of(numbers, part, variance, deviations):
        found.setdefault(name, []).append(ends)
    return {name: _mean(each) for name, each in found.items()}


def intervals_of(
    numbers: Vector, part: Part, variance: Vector, deviations: float = DEVIATIONS
) -> Iterator[tuple[str, Interval | None]]:
    """Name and interval of each of a part's orders and ratios, classes one by one, of numbers of that variance."""
    for name, positive, negative in part.orders:
        yield name, _ordered(numbers, positive, negative, variance, deviations)
    for name, above, below in part.ratios:
        moments = (
            float(above * above @ variance),
            float(above * below @ variance),
            float(below * below @ variance),
        )
        yield name, _fieller(float(above @ numbers), float(below @ numbers), moments, deviations)


def _drawn(numbers: Vector, part: Part, variance: Vector) -> tuple[Values, dict[str, Interval | None]]:
    """Values and intervals of what is derived of a part's tables: by tables drawn about the one that was settled."""
    values, found = dict[str, list[float | None]](), dict[str, list[Interval | None]]()
    for name, places, function in part.derived:
        value, ends = _about(table_at(numbers, places), table_at(variance, places), function)
        values.setdefault(name, []).append(value)
        found.setdefault(name, []).append(ends)
    return {name: mean(each) for name, each in values.items()}, {name: _mean(each) for name, each in found.items()}


def _about(
    numbers: Vector, variance: Vector, function: Callable[[Vector], Vector]
) -> tuple[float | None, Interval | None]:
    totals, noise = numbers.sum(axis=-1), np.sqrt(variance.sum(axis=-1))
    if not (totals > TOLD * noise).all():
        return None, None
    rough = float(((numbers - smoothed(numbers)) ** 2 / variance).sum()) / numbers.shape[0]
    calm = smoothed if rough < ROUGH * (numbers.shape[-1] - WAVES) else np.asarray
    centre = settled(calm(numbers))
    more = np.random.default_rng(0).standard_normal((DRAWS, *centre.shape)) * np.sqrt(variance) * WIDER
    value, drawn = float(function(centre)), function(settled(calm(centre + more)))
    if not math.isfinite(value) or np.isnan(drawn).mean() > (1 - LEVEL) / 2:
        return None, None
    low, high = (float(each) for each in np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    ends = (low, high, 2 * value - low, 2 * value - high)
    return value, (min(ends), max(ends))


def noised_metrics(counts: Counts, layout: Layout, variance: Vector) -> tuple[Values, dict[str, Interval]]:
    """Metrics of noised counts, and the intervals of those that are known at all.

    A metric of which the noise leaves every value open is None: a number there would be nothing but noise.
    """
    values, known = _noised(counts, layout.whole, variance)
    return {**values, "n": metrics(counts, layout)["n"]}, known


def noised_parts(
    counts: Counts, layout: Layout, variance: Vector | None
) -> list[tuple[Part, Values, dict[str, Interval]]]:
    """Each part of the layout, its metrics and their intervals: none of exact counts, which have no ``variance``."""
    found = []
    for part in layout.parts_of():
        if variance is None:
            values: tuple[Values, dict[str, Interval]] = ({**read(counts.astype(np.float64), part)}, {})
        else:
            values = _noised(counts, part, variance)
        found.append((part, *values))
    return found


def _noised(counts: Counts, part: Part, variance: Vector) -> tuple[Values, dict[str, Interval]]:
    numbers = counts.astype(np.float64)
    derived, drawn = _drawn(numbers, part, variance)
    values = {**read(numbers, part._replace(derived=())), **derived}
    found = _of_part(numbers, part, variance, DEVIATIONS) | drawn
    known = {name: ends for name, ends in found.items() if ends is not None and values[name] is not None}
    return {name: value if name in known else None for name, value in values.items()}, known


def _ordered(
    numbers: Vector,
    positives: Sequence[NDArray[np.int64]],
    negatives: Sequence[NDArray[np.int64]],
    variance: Vector,
    deviations: float,
) -> Interval | None:
    """Interval of the share of (positive, negative) pairs in the right order: sums of products of two noised counts.

    What noise on a count does to the pairs in the right order, and to all pairs, is their derivative by that count.
    """
    right, pairs, by_right, by_pairs = 0.0, 0.0, np.zeros(len(numbers)), np.zeros(len(numbers))
    for ahead, behind in zip(positives, negatives, strict=True):
        positive, negative = numbers[ahead].sum(axis=1), numbers[behind].sum(axis=1)
        ahead_of = np.cumsum(negative) - negative / 2  # per positive in a bin: negatives below, half of those within
        behind_of = positive.sum() - np.cumsum(positive) + positive / 2
        right += float(positive @ ahead_of)
        pairs += float(positive.sum() * negative.sum())
        np.add.at(by_right, ahead, ahead_of[:, None])
        np.add.at(by_right, behind, behind_of[:, None])
        np.add.at(by_pairs, ahead, negative.sum())
        np.add.at(by_pairs, behind, positive.sum())
        if len(positives) == 1 and not (positive.sum() > 0 and negative.sum() > 0):
            return None
    moments = (
        float(by_right * by_right @ variance),
        float(by_right * by_pairs @ variance),
        float(by_pairs * by_pairs @ variance),
    )
    return _fieller(right, pairs, moments, deviations)


def _fieller(part: float, whole: float, moments: tuple[float, float, float], deviations: float) -> Interval | None:
    """Every r with part - r · whole within so many deviations of 0; its variance is aa - 2 · r · ab + r² · bb.

    None where these are no interval: what is divided by cannot be told from 0.
    """
    aa, ab, bb = (deviations**2 * moment for moment in moments)
    leading, middle, last = whole * whole - bb, part * whole - ab, part * part - aa
    if not (leading > 0 and whole > 0):
        return None
    root = math.sqrt(max(middle * middle - leading * last, 0.0))
    return (middle - root) / leading, (middle + root) / leading


def _mean(ends: list[Interval | None]) -> Interval | None:
    known = [each for each in ends if each is not None]
    if len(known) < len(ends):
        return None
    return float(np.mean([low for low, _ in known])), float(np.mean([high for _, high in known]))
