"""Evaluation counts by group: a layout of a task once for each declared group, as one release.

A patient, who counts with one record, is in one group of each grouping, and moves only the counts of those: each block
holds the task's block once a group, and is moved by √(groupings) times as much. All of them are one Gaussian release.
What is read of all patients is read off the sums over all groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilium_shared.groups import Grouping
from consilium_shared.metrics import Block, Counts, Derived, Layout, Order, Part, Ratio, Vector

if TYPE_CHECKING:
    from consilium_shared.task import Task


@dataclass(frozen=True)
class GroupedLayout(Layout):
    """Counts of a task's layout, once for each group.

    Attributes:
        base: the task's own layout.
        groupings: of the contract.
    """

    base: Layout
    groupings: tuple[Grouping, ...]

    @cached_property
    def sizes_of(self) -> tuple[int, ...]:
        """Number of groups of each grouping."""
        return tuple(len(each.names) for each in self.groupings)

    @property
    def groups(self) -> int:
        """Number of all groups."""
        return sum(self.sizes_of)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The task's blocks, each once a group."""
        factor = math.sqrt(len(self.groupings))
        return tuple(Block(each.name, (self.groups, *each.shape), each.moved * factor) for each in self.base.blocks)

    @cached_property
    def at(self) -> NDArray[np.int64]:
        """Place in the vector of each number of the task's vector, for each group: int64 ``[groups, k]``."""
        rows, start = [], 0
        for size in self.base.sizes.values():
            rows.append(start + np.arange(self.groups * size).reshape(self.groups, size))
            start += self.groups * size
        return np.concatenate(rows, axis=1).astype(np.int64)

    def stacked(self, counts: Sequence[Counts]) -> Counts:
        """Vector of the counts of each group, each ``[k]`` of the task's layout."""
        found = np.zeros(self.width, dtype=np.int64)
        for places, each in zip(self.at, counts, strict=True):
            found[places] = each
        return found

    def all_of(self, counts: NDArray[Any]) -> Vector:
        """Counts of all records in the task's layout ``[k]``: the mean over groupings, which differ by noise alone."""
        found: Vector = counts[self.at].sum(axis=0) / len(self.groupings)
        return found

    # -- what is read of everybody, off the sums over all groups

    def orders(self) -> Iterator[Order]:
        """The task's, of all groups together."""
        return (self._order(each, self.at) for each in self.base.orders())

    def ratios(self) -> Iterator[Ratio]:
        """The task's, of all groups together."""
        return (self._ratio(each, self.at) for each in self.base.ratios())

    def derived(self) -> Iterator[Derived]:
        """The task's, of all groups together."""
        return (self._derived(each, self.at) for each in self.base.derived())

    def every_record(self) -> Vector:
        """Mean over groupings of their records."""
        return self._form(self.base.every_record(), self.at) / len(self.groupings)

    def recalibrated(self, counts: Vector, *, noised: bool) -> tuple[float, float] | None:
        """Intercept and slope of all groups together, as the task reads them."""
        return self.base.recalibrated(self.all_of(counts), noised=noised)

    def most(self, metric: str) -> float:
        """The task's."""
        return 1.0 if metric == "share" else self.base.most(metric)

    def least(self, metric: str) -> float:
        """The task's."""
        return 0.0 if metric == "share" else self.base.least(metric)

    def never_positive(self) -> Iterator[tuple[Vector, str]]:
        """The task's of each group; and that each grouping has the same records."""
        for (name, group), places in zip(self._names(), self.at, strict=True):
            for form, what in self.base.never_positive():
                yield self._form(form, places[None]), f"of {name} {group}: {what}"
        first, *others = self._of_groupings()
        for grouping, places in zip(self.groupings[1:], others, strict=True):
            every = self.base.every_record()
            form = self._form(every, places) - self._form(every, first)
            what = f"{grouping.column} has another number of records than {self.groupings[0].column}"
            yield form, what
            yield -form, what

    # -- parts

    def parts_of(self) -> Iterator[Part]:
        """The task's parts, of all groups together; then each group, with its share of its grouping's records."""
        for part in self.base.parts_of():
            yield self._part(part.kind, part.name, part, self.at)
        names, every = list(self._names()), self.base.every_record()
        for places in self._of_groupings():
            whole = self._form(every, places)
            for own in places:
                column, group = names[int(np.flatnonzero((self.at == own).all(axis=1))[0])]
                made = self._part(f"by {column}", group, self.base.whole, own[None])
                share = Ratio("share", self._form(every, own[None]), whole)
                yield made._replace(ratios=(share, *made.ratios))

    def _names(self) -> Iterator[tuple[str, str]]:
        """Column and name of each group, in the order of the vector's."""
        return ((each.column, name) for each in self.groupings for name in each.names)

    def _of_groupings(self) -> list[NDArray[np.int64]]:
        """Rows of ``at`` of each grouping."""
        return np.split(self.at, np.cumsum(self.sizes_of)[:-1])

    # -- forms and places of the task's vector in this one, summed over some groups

    def _part(self, kind: str, name: str, part: Part, rows: NDArray[np.int64]) -> Part:
        return Part(
            kind,
            name,
            tuple(self._order(each, rows) for each in part.orders),
            tuple(self._ratio(each, rows) for each in part.ratios),
            tuple(self._derived(each, rows) for each in part.derived),
        )

    def _form(self, form: Vector, rows: NDArray[np.int64]) -> Vector:
        made = np.zeros(self.width)
        made[rows] = form
        return made

    def _order(self, order: Order, rows: NDArray[np.int64]) -> Order:
        def of(sides: tuple[NDArray[np.int64], ...]) -> tuple[NDArray[np.int64], ...]:
            return tuple(np.concatenate([each[places] for each in rows], axis=1) for places in sides)

        return Order(order.name, of(order.positive), of(order.negative))

    def _ratio(self, ratio: Ratio, rows: NDArray[np.int64]) -> Ratio:
        return Ratio(ratio.name, self._form(ratio.part, rows), self._form(ratio.whole, rows))

    def _derived(self, derived: Derived, rows: NDArray[np.int64]) -> Derived:
        places = derived.places.reshape(*derived.places.shape[:2], -1)
        found = np.concatenate([each[places] for each in rows], axis=2)
        return Derived(derived.name, found, derived.read)


def count(
    own: Task,
    layout: Layout,
    measured: NDArray[np.float64],
    targets: Sequence[NDArray[Any]],
    groups: NDArray[np.int64] | None,
) -> Counts:
    """Exact counts of records by a task, in groups where the layout has them.

    Args:
        own: the task.
        layout: of the counts.
        measured: ``[N, m]``.
        targets: each ``[N, …]``.
        groups: number of each record's group in each grouping, int64 ``[N, groupings]``; None: not given.
    """
    if not isinstance(layout, GroupedLayout):
        return own.count(layout, measured, targets)
    last = np.array(layout.sizes_of) - 1
    belongs = np.broadcast_to(last, (len(measured), len(last))) if groups is None else groups
    members = [belongs[:, column] == group for column, size in enumerate(layout.sizes_of) for group in range(size)]
    return layout.stacked([own.count(layout.base, measured[m], [each[m] for each in targets]) for m in members])
