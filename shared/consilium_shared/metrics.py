"""Evaluation counts as blocks that add up across hospitals, and the metrics of their sum.

A counts vector is int64. A task declares its blocks (histograms, tables, sums), each with the most that one patient
moves, and which metrics are read off them (``Layout``). Counts of several sites are added; nothing else of a record
leaves the site.

With privacy every patient counts with one record, so that one patient moves each block by a known amount, and each
block carries Gaussian noise (``Layout.deviations``). The fewer numbers then sum less noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from consilium_shared.score_table import settled

if TYPE_CHECKING:
    from consilium_shared.study import Study

Counts = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
Values = dict[str, float | int | None]


@dataclass(frozen=True)
class Block:
    """One part of a counts vector.

    Attributes:
        name: of the part, once in a layout.
        shape: of its numbers, which stand in the vector in C order.
        moved: most that one patient, who counts with one record, moves it in L2 norm.
    """

    name: str
    shape: tuple[int, ...]
    moved: float

    @property
    def size(self) -> int:
        """Number of its numbers."""
        return math.prod(self.shape)

    @property
    def counts_records(self) -> bool:
        """True where its numbers count records, of which one is in a cell, or in a cell of each row; False of sums."""
        return self.moved == 1 or (len(self.shape) > 1 and math.isclose(self.moved**2, self.shape[0]))


def histograms(name: str, count: int, bins: int) -> Block:
    """Block of ``count`` pairs of histograms ``[count, 2, bins]``: a record is in one bin of each pair.

    >>> histograms("scores", 4, 16).moved
    2.0
    """
    return Block(name, (count, 2, bins), math.sqrt(count))


def table(name: str, *axes: int) -> Block:
    """Block of a table of counts, one index for each of ``axes``: a record is in one cell.

    >>> table("time", 24, 2, 64).size
    3072
    """
    return Block(name, axes, 1.0)


def total(name: str, most: float) -> Block:
    """Block of one number, a sum to which a record adds between 0 and ``most``.

    >>> total("loss", 64.0)
    Block(name='loss', shape=(1,), moved=64.0)
    """
    return Block(name, (1,), most)


class Ratio(NamedTuple):
    """Metric that is a ratio of two linear forms of the counts.

    Attributes:
        name: of the metric; several of one name are its classes, and the metric is their mean.
        part: numerator ``[k]``.
        whole: denominator ``[k]``.
    """

    name: str
    part: Vector
    whole: Vector


class Order(NamedTuple):
    """Metric that is the share of pairs (one positive, one negative) whose scores are in the right order.

    Pairs within one bin count half (Mann–Whitney). Who is compared with whom may differ by stratum: the metric is the
    share over the pairs of all strata.

    Attributes:
        name: as of ``Ratio``.
        positive: of each stratum int64 ``[bins, a]``, places in the vector whose sums over a are the histogram of the
            positives' scores, the lowest first.
        negative: of each stratum int64 ``[bins, b]``, those of the negatives. All places are of one block.
    """

    name: str
    positive: tuple[npt.NDArray[np.int64], ...]
    negative: tuple[npt.NDArray[np.int64], ...]


class Derived(NamedTuple):
    """Metric that is any other function of one table of scores by outcome (``score_table``).

    Attributes:
        name: as of ``Ratio``.
        places: int64 ``[2, bins]``, where the table's numbers stand in the vector; all are of one block. Or
            ``[2, bins, a]``: a number is the sum over a of them.
        read: settled tables float64 ``[…, 2, bins]`` to values ``[…]``; NaN where there is none.
    """

    name: str
    places: npt.NDArray[np.int64]
    read: Callable[[Vector], Vector]


class Part(NamedTuple):
    """Metrics of a part of what was counted: of a group of patients, a threshold, a label.

    Attributes:
        kind: what it is a part by, such as ``groups``.
        name: of the part, once in its kind.
        orders: as of a layout, and so ``ratios`` and ``derived``.
    """

    kind: str
    name: str
    orders: tuple[Order, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    derived: tuple[Derived, ...] = ()


class Layout(ABC):
    """Layout of a counts vector: its blocks, and what is read off them. A task has a class of its own."""

    @classmethod
    def of(cls, study: Study) -> Layout:
        """Layout of the counts that leave a site in this study."""
        from consilium_shared import task
        from consilium_shared.grouped import GroupedLayout

        own = task.of(study).layout(study)
        return GroupedLayout(own, study.evaluation.by) if study.evaluation.by else own

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """Blocks in the order in which they stand in the vector; none is empty."""

    @abstractmethod
    def ratios(self) -> Iterator[Ratio]:
        """Metrics that are ratios of linear forms."""

    def orders(self) -> Iterator[Order]:
        """Metrics that are shares of ordered pairs."""
        return iter(())

    def derived(self) -> Iterator[Derived]:
        """Metrics that are other functions of a table of scores."""
        return iter(())

    def parts_of(self) -> Iterator[Part]:
        """Parts that have metrics of their own, read off the same counts."""
        return iter(())

    def recalibrated(self, counts: Vector, *, noised: bool) -> tuple[float, float] | None:
        """Intercept and slope of the outcome on the score's logit; None where these counts have no such table."""
        return None

    @abstractmethod
    def every_record(self) -> Vector:
        """Linear form ``[k]`` whose value on a counts vector is its number of records."""

    def never_positive(self) -> Iterator[tuple[Vector, str]]:
        """Linear forms ``[k]`` that are 0 or less on honest counts without noise, and what it means where they are not.

        No count is negative: that need not be said.
        """
        return iter(())

    def most(self, metric: str) -> float:
        """Largest value of a metric."""
        return 1.0

    def least(self, metric: str) -> float:
        """Smallest value of a metric."""
        return 0.0

    @property
    def whole(self) -> Part:
        """All of it as one part."""
        return Part("", "", tuple(self.orders()), tuple(self.ratios()), tuple(self.derived()))

    @property
    def sizes(self) -> dict[str, int]:
        """Block to its numbers in the vector, in the order in which they stand there."""
        return {block.name: block.size for block in self.blocks}

    @property
    def width(self) -> int:
        """Length k of the vector."""
        return sum(self.sizes.values())

    def deviations(self, noise_multiplier: float) -> dict[str, float]:
        """Block to the standard deviation of the noise on each of its numbers: together they are one Gaussian release.

        A patient, who counts with one record, moves block b by at most Δ_b in L2 norm; with deviation
        σ · Δ_b · √(number of blocks) on each of its coordinates, the whole vector in units of its deviations moves
        by at most 1/σ: the release of ``privacy.event.GaussianEvent(noise_multiplier)``.
        """
        blocks = self.blocks
        return {block.name: noise_multiplier * block.moved * math.sqrt(len(blocks)) for block in blocks}

    def parts(self, counts: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Blocks of a vector, each flat; raises ValueError for a vector of another length."""
        if counts.shape != (self.width,):
            raise ValueError(f"a counts vector of this study has {self.width} numbers")
        ends = np.cumsum(list(self.sizes.values()))
        return dict(zip(self.sizes, np.split(counts, ends[:-1]), strict=True))

    def places(self) -> dict[str, npt.NDArray[np.int64]]:
        """Block to where its numbers stand in the vector: int64, flat."""
        return self.parts(np.arange(self.width, dtype=np.int64))


def metrics(counts: Counts, layout: Layout) -> Values:
    """Metrics of summed counts; a metric that is not defined (a class without records) is None, never NaN.

    Those that were not asked for are left out; ``n`` is the number of records, with noise an estimate. Noise makes
    single counts negative, and takes a ratio above 1 or below 0; they are taken as they are, since cutting would pull
    every metric one way and make the lucky ones look certain. ``intervals`` says how far the noise may have moved them.
    None is where noise left nothing to divide by.

    Raises:
        ValueError: a counts vector of another length.
    """
    layout.parts(counts)  # of this layout's length
    numbers = counts.astype(np.float64)
    return {**read(numbers, layout.whole), "n": max(round(float(layout.every_record() @ numbers)), 0)}


def read(numbers: Vector, part: Part) -> dict[str, float | None]:
    """Metrics of one part of the counts ``[k]``; None where one is not defined."""
    shares = dict[str, list[float | None]]()
    for name, positive, negative in part.orders:
        shares.setdefault(name, []).append(_ordered(numbers, positive, negative))
    for name, above, below in part.ratios:
        shares.setdefault(name, []).append(_ratio(float(above @ numbers), float(below @ numbers)))
    for name, places, function in part.derived:
        value = float(function(settled(table_at(numbers, places))))
        shares.setdefault(name, []).append(value if math.isfinite(value) else None)
    return {name: mean(values) for name, values in shares.items()}


def table_at(numbers: Vector, places: npt.NDArray[np.int64]) -> Vector:
    """Table ``[2, bins]`` at the places of a ``Derived``."""
    found: Vector = numbers[places] if places.ndim == 2 else numbers[places].sum(axis=-1)
    return found


def _ordered(
    numbers: Vector, positives: Sequence[npt.NDArray[np.int64]], negatives: Sequence[npt.NDArray[np.int64]]
) -> float | None:
    """Mann–Whitney: the share of (positive, negative) pairs in the right order; pairs within one bin count half.

    The pairs of several strata are added as they are, those that noise made negative too: without them the sum would
    be too large, and the share too small.
    """
    right, pairs = 0.0, 0.0
    for ahead, behind in zip(positives, negatives, strict=True):
        positive, negative = numbers[ahead].sum(axis=1), numbers[behind].sum(axis=1)
        below = np.cumsum(negative) - negative
        right += float((positive * (below + negative / 2)).sum())
        if len(positives) == 1 and not (positive.sum() > 0 and negative.sum() > 0):
            return None
        pairs += float(positive.sum() * negative.sum())
    return _ratio(right, pairs)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of values; None where one of them is."""
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if len(defined) == len(values) else None
