"""Records made by a recipe, one of each source: in the prepared store, or where there is none in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.dataset import ArrayDataset, Dataset, StoredDataset, check_size
from consilium_client.data.report import Report
from consilium_client.prepared.recipe import Recipe, Source
from consilium_client.prepared.rows import StoredRows
from consilium_client.prepared.store import AssetFolder
from consilium_shared.preparation.foreign import Unusable


@dataclass(frozen=True)
class Made:
    """Records of sources.

    Attributes:
        rows: the usable sources' records, in their order: in the store, or arrays ``[N, …]``.
        usable: bool ``[sources]``.
        reasons: number of a source -> why it has no record.
        remarks: number of a source -> what looks odd about its record.
    """

    rows: StoredRows | tuple[NDArray[Any], ...]
    usable: NDArray[np.bool_]
    reasons: dict[int, str]
    remarks: dict[int, str]

    def dataset(
        self,
        targets: tuple[NDArray[Any], ...],
        patients: NDArray[np.int64],
        train: NDArray[np.bool_],
        validation: NDArray[np.bool_],
        report: Report,
    ) -> Dataset:
        """The data set of these records as inputs, with ``[N]`` targets and patients of the usable sources."""
        if isinstance(self.rows, StoredRows):
            return StoredDataset(
                patients, len(train), train, validation=validation, report=report, rows=self.rows, labels=targets
            )
        return ArrayDataset.of(self.rows, targets, patients, train, report, validation)


def make_all(
    recipe: Recipe,
    sources: Sequence[Source],
    there: Iterable[Path],
    store: AssetFolder | None,
    on_progress: Callable[[int], None],
) -> Made:
    """A record of each source, the same bit for bit with a store and without.

    Args:
        recipe: how a source becomes a record.
        sources: files each.
        there: all files of the asset (``prepared.records.prepare``).
        store: of the asset; None: records are made here, one after the other, and held in memory.
        on_progress: told the number of sources that are done.

    Raises:
        DataError: the records are too many for memory or disk, or the store cannot be used.
    """
    if store is not None:
        from consilium_client.prepared.records import prepare

        found = prepare(store, recipe, sources, there, on_progress)
        return Made(found.rows, found.usable, found.reasons, found.remarks)
    check_size(len(sources), recipe.record_bytes // 4)
    arrays = tuple(np.zeros((len(sources), *field.shape), dtype=field.dtype) for field in recipe.fields)
    usable, reasons, count = np.zeros(len(sources), dtype=bool), dict[int, str](), 0
    remarks: dict[int, str] = {}
    for number, source in enumerate(sources):
        try:
            made = recipe.make(source)
            for array, part in zip(arrays, made, strict=True):
                array[count] = part
            usable[number], count = True, count + 1
            if remark := recipe.remark(made):
                remarks[number] = remark
        except Unusable as error:
            reasons[number] = str(error)
        on_progress(number + 1)
    return Made(tuple(array[:count] for array in arrays), usable, reasons, remarks)
