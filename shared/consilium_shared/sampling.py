"""Intervals of metrics for that other patients could have been held back, from the counts alone.

A cell's count varies about as a Poisson number does: its variance is the count. Of a share that gives Wilson's interval
(1927), of another ratio of sums Fieller's, and of the AUROC that of DeLong et al. (1988) on binned scores, since the
derivative by a cell's count is a record's placement. Where counts carry noise its variance is added, so that the
interval is of both. Other functions of an exact table (calibration, average precision) are read off ``DRAWS`` tables
whose cells are drawn anew.

Each record counts as a patient of its own: where patients have several, and without privacy all of them count, the
intervals are too narrow. What distinguishes one hospital from the next is not in them.
"""

from __future__ import annotations

import math

import numpy as np

from consilium_shared.grouped import GroupedLayout
from consilium_shared.intervals import DEVIATIONS, DRAWS, LEVEL, Interval, intervals_of
from consilium_shared.metrics import Counts, Derived, Layout, Part, Ratio, Vector, mean, table_at
from consilium_shared.score_table import settled

BENT = 0.25
"""Largest distance of the drawn tables' mean from the metric, in their deviations."""

Ends = dict[str, Interval]


def sampling(counts: Counts, layout: Layout, noise: Vector | None) -> tuple[Ends, dict[tuple[str, str], Ends]]:
    """Intervals of the metrics of all patients, and of those of each part by its kind and name.

    Args:
        counts: the sum ``[k]``.
        layout: of the counts.
        noise: variance on each of its numbers ``[k]``; None for exact counts.
    """
    numbers = counts.astype(np.float64)
    if isinstance(layout, GroupedLayout):  # a patient is in every grouping: of all they count once
        times = len(layout.groupings)
        every = layout.all_of(numbers)
        of_every = None if noise is None else noise[layout.at].sum(axis=0) / times**2
        whole, parts = sampling_of(layout.base, every, of_every)
        apart = [part for part in layout.parts_of() if part.kind.startswith("by ")]
        parts |= {(part.kind, part.name): _of_part(part, layout, numbers, noise) for part in apart}
        return whole, parts
    return sampling_of(layout, numbers, noise)


def sampling_of(layout: Layout, numbers: Vector, noise: Vector | None) -> tuple[Ends, dict[tuple[str, str], Ends]]:
    """Intervals of a layout without groups, as ``sampling`` gives them."""
    parts = {(part.kind, part.name): _of_part(part, layout, numbers, noise) for part in layout.parts_of()}
    return _of_part(layout.whole, layout, numbers, noise), parts


def _of_part(part: Part, layout: Layout, numbers: Vector, noise: Vector | None) -> Ends:
    """Intervals of a part's metrics, of those that are read off counts of records alone."""
    base = layout.base if isinstance(layout, GroupedLayout) else layout
    kinds = zip(layout.blocks, base.blocks, strict=True)
    sums = np.concatenate([np.full(block.size, not own.counts_records) for block, own in kinds])
    ratios = [each for each in part.ratios if not (sums & ((each.part != 0) | (each.whole != 0))).any()]
    shares = [each for each in ratios if noise is None and _is_share(each)]
    others = [each for each in ratios if not any(each is share for share in shares)]
    variance = np.maximum(numbers, 0.0) + (0.0 if noise is None else noise)
    found: dict[str, list[Interval | None]] = {}
    for name, ends in intervals_of(numbers, part._replace(ratios=tuple(others)), variance):
        found.setdefault(name, []).append(ends)
    for share in shares:
        found.setdefault(share.name, []).append(_wilson(float(share.part @ numbers), float(share.whole @ numbers)))
    for each in part.derived if noise is None else ():
        found.setdefault(each.name, []).append(_redrawn(each, numbers))
    told = {}
    for name, several in found.items():
        low, high = (mean([None if each is None else each[end] for each in several]) for end in (0, 1))
        if low is not None and high is not None:
            told[name] = max(low, layout.least(name)), min(high, layout.most(name))
    return told


def _is_share(ratio: Ratio) -> bool:
    """True where the ratio is the share of some of the records that it divides by."""
    return bool(np.isin(ratio.whole, (0.0, 1.0)).all() and ((ratio.part == 0) | (ratio.part == ratio.whole)).all())


def _wilson(part: float, whole: float) -> Interval | None:
    """Interval of a share (Wilson 1927): one that no patient showed is not certain either."""
    if whole <= 0:
        return None
    square = DEVIATIONS**2
    centre = (part + square / 2) / (whole + square)
    half = DEVIATIONS * math.sqrt(max(part * (whole - part) / whole, 0.0) + square / 4) / (whole + square)
    return centre - half, centre + half


def _redrawn(derived: Derived, numbers: Vector) -> Interval | None:
    """Interval of a function of a table of scores, by tables whose cells are drawn anew; None where few patients bend
    it, as they do a calibration error, which is above 0 in every sample."""
    table = table_at(numbers, derived.places)
    drawn = derived.read(settled(np.random.default_rng(0).poisson(np.maximum(table, 0.0), (DRAWS, *table.shape))))
    if np.isnan(drawn).mean() > (1 - LEVEL) / 2:
        return None
    low, high = (float(each) for each in np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    beside = float(np.nanmean(drawn)) - float(derived.read(settled(table)))
    return (low, high) if abs(beside) <= BENT * float(np.nanstd(drawn)) else None
