"""The label table of an asset: for each row the patient, the class and whether the patient is held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import AssetSpec
from consilium_client.data.columns import place, plain, read_columns
from consilium_client.data.identity import near, settle
from consilium_client.data.patients import held_back, number_patients
from consilium_client.data.records import NothingUsable, SetAside
from consilium_shared import task
from consilium_shared.study import Study


@dataclass(frozen=True)
class LabelRows:
    """Usable rows of a label table. Row i of each part belongs together.

    Attributes:
        frame: the columns read, under the site's names; the index is the line (of Parquet the row) in the file.
        patient: identifiers, text, each in its one spelling.
        label: int64 class index.
        held_back: bool.
    """

    frame: pd.DataFrame
    patient: NDArray[np.object_]
    label: NDArray[np.int64]
    held_back: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> LabelRows:
        """The rows where ``keep`` is True, or at the positions ``keep``."""
        positions = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
        frame = self.frame.iloc[positions]
        return LabelRows(frame, self.patient[positions], self.label[positions], self.held_back[positions])


def read_labels(
    path: Path,
    asset: AssetSpec,
    study: Study,
    aside: SetAside,
    notes: SetAside,
    *,
    key: Sequence[str] | None,
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelRows:
    """Read and check a label table; rows that cannot be used are counted in ``aside``.

    Args:
        path: the table.
        asset: names of patient and label at this site.
        study: label and split.
        aside: takes the counts.
        notes: takes what is used and looks odd.
        key: the site's columns that may stand in one row only; None where only rows alike in all columns are doubles.
        text: further columns of the site to read as text.
        numbers: further columns of the site to read as numbers.
        on_progress: as in ``read_columns``.

    Raises:
        DataError: see ``read_columns``; or no usable row.
    """
    (target,) = task.reads(study).targets
    label_column = asset.here(target.column)
    split_column = study.evaluation.split_column and asset.here(study.evaluation.split_column)
    own = [asset.patient, label_column, *(key or ()), *([split_column] if split_column else ())]
    frame = read_columns(path, list(dict.fromkeys([*own, *text])), numbers, notes, on_progress)
    index = {word: number for number, word in enumerate(plain(pd.Series(target.classes)))}
    words = plain(frame[label_column])
    label = words.map(index).fillna(-1).to_numpy(dtype=np.int64)

    def drop(reason: str, bad: pd.Series | NDArray[np.bool_]) -> None:
        nonlocal frame, label, words
        hit = np.asarray(bad, dtype=bool)
        if hit.any():
            aside.add(f"label table: {reason}", int(hit.sum()), place(path, frame.index[hit]))
            frame, label, words = frame[~hit], label[~hit], words[~hit]

    drop(f"no {asset.patient}", frame[asset.patient].isna())
    for column in identifiers(asset, own):
        frame[column], wrong = settle(frame[column])
        nobody = np.full(len(frame), "", dtype=object)
        for why, mask in wrong.items():
            nobody[mask] = why
        for why in wrong:
            hit = nobody == why
            drop(f"{column} is {why}", hit)
            nobody = nobody[~hit]
    for column in key or ():
        drop(f"no {column}", frame[column].isna())
    drop(f"no {label_column}", words.isna())
    drop(f"{label_column} is none of the study's classes", label < 0)
    if split_column:
        drop(f"{split_column} is neither train nor test", ~frame[split_column].isin(["train", "test"]))
        parts = frame.groupby(asset.patient)[split_column].transform("nunique")
        drop("the patient is both in train and in test", parts > 1)
    doubles = list(key) if key is not None else None
    if doubles is not None:
        classes = pd.Series(label, index=frame.index).groupby([frame[c] for c in doubles]).transform("nunique")
        drop("rows for the same record with different labels", classes > 1)
    drop("the same row again", frame.duplicated(subset=doubles))
    if frame.empty:
        raise NothingUsable(f"{path}: no usable row", aside, notes=notes)

    patient = frame[asset.patient].to_numpy(dtype=object)
    _note_near(path, frame[asset.patient], notes)
    if split_column:
        back = (frame[split_column] == "test").to_numpy(dtype=bool)
    else:
        fraction = study.evaluation.split or 0.0
        numbers_of, names = number_patients(patient.tolist())
        back = np.array([held_back(study.study, name, fraction) for name in names], dtype=bool)[numbers_of]
    return LabelRows(frame, patient, label, back)


def identifiers(asset: AssetSpec, columns: Sequence[str]) -> list[str]:
    """Those of the columns that name patients or records; a file or an instance is written in one way only."""
    return [column for column in columns if column in (asset.patient, getattr(asset, "record", None))]


def _note_near(path: Path, patient: pd.Series, notes: SetAside) -> None:
    groups = near(patient.tolist())
    alike = {word for group in groups for word in group}
    rows = patient.index[patient.isin(alike) & ~patient.duplicated()]
    what = f"{patient.name}s alike but for leading zeros, case, blanks or width: counted apart"
    notes.add(what, len(alike), place(path, rows) if len(rows) else "")


def number_rows(rows: LabelRows) -> tuple[NDArray[np.int64], int, NDArray[np.bool_]]:
    """Patient number of each row, number of patients, and whether each patient is for training."""
    patients, names = number_patients(rows.patient.tolist())
    train = np.ones(len(names), dtype=bool)
    train[patients] = ~rows.held_back
    return patients, len(names), train
