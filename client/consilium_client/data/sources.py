"""Sources of image records, linked to their rows of the label table, become a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from consilium_client.data.columns import place
from consilium_client.data.dataset import Dataset
from consilium_client.data.labels import LabelRows, number_rows
from consilium_client.data.made import make_all
from consilium_client.data.recipes import ImageRecipe
from consilium_client.data.report import NothingUsable, Report
from consilium_client.prepared.recipe import Source
from consilium_client.prepared.store import AssetFolder
from consilium_shared.inputs import Image


class Gathered(NamedTuple):
    """Files of an asset of images.

    Attributes:
        folder: in which they lie.
        table: of labels.
        files: all of them, also those that are no source's.
    """

    folder: Path
    table: Path
    files: tuple[Path, ...]


def gather(
    asset: Gathered,
    sources: Sequence[tuple[Source, int]],
    rows: LabelRows,
    image: Image,
    report: Report,
    store: AssetFolder | None,
    on_progress: Callable[[int], None],
) -> Dataset:
    """Data set of sources; what cannot be prepared is set aside.

    Args:
        asset: where the files lie.
        sources: of one record each, with the position of its row in the label table.
        rows: of the label table.
        image: what a record becomes.
        report: takes what is set aside.
        store: keeps what was prepared; None prepares in memory.
        on_progress: told the number of sources that are done.

    Raises:
        DataError: nothing is left, or more than memory or the store may hold.
    """
    nothing = f"{asset.folder}: no usable image in {len(asset.files)} files"
    if not sources:
        raise NothingUsable(nothing, report)
    made = make_all(ImageRecipe.of(image), [source for source, _ in sources], asset.files, store, on_progress)
    for number in sorted(made.reasons):
        report.set_aside.add(made.reasons[number], where=where(sources[number][0].paths[0], asset.folder))
    for number in sorted(made.remarks):
        report.notes.add(made.remarks[number], where=where(sources[number][0].paths[0], asset.folder))
    if not made.usable.any():
        raise NothingUsable(nothing, report)
    positions = np.array([row for _, row in sources], dtype=np.int64)[made.usable]
    unused = rows.frame.index[~np.isin(np.arange(len(rows)), positions)]
    at = place(asset.table, unused) if len(unused) else ""
    report.set_aside.add("label table: row without a usable image", len(unused), at)
    taken = rows.take(positions)
    patients, train, validation = number_rows(taken)
    return replace(made.dataset(taken.targets, patients, train, validation, report), groups=taken.groups)


def where(path: Path, folder: Path) -> str:
    """Path of a file in its asset. Its name may carry an identifier: for this site's screen alone (``SetAside``)."""
    return path.relative_to(folder).as_posix()
