"""Label table of an asset: the patient, the targets and the split of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import AssetSpec
from consilium_client.data.columns import place, plain, read_columns, to_numbers
from consilium_client.data.declared import converted, settled
from consilium_client.data.features import count_words
from consilium_client.data.groups import columns_of, groups_of
from consilium_client.data.identity import near, settle
from consilium_client.data.patients import number_patients
from consilium_client.data.report import NothingUsable, Report, SetAside, Values
from consilium_shared import split, task
from consilium_shared.errors import DataError
from consilium_shared.inputs import Label, Numeric
from consilium_shared.study import Study


@dataclass(frozen=True)
class LabelRows:
    """Usable rows of a label table. Row i of each part belongs together.

    Attributes:
        frame: the columns read, under the site's names; the index is the line (of Parquet the row) in the file.
        patient: identifiers, text, each in its one spelling.
        targets: of each of the study's targets int64 class indices, or float32 scaled numbers.
        part: of the split, by name.
        groups: as ``Dataset`` has them.
    """

    frame: pd.DataFrame
    patient: NDArray[np.object_]
    targets: tuple[NDArray[Any], ...]
    part: NDArray[np.object_]
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> LabelRows:
        """The rows where ``keep`` is True, or at the positions ``keep``."""
        positions = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
        frame = self.frame.iloc[positions]
        targets = tuple(each[positions] for each in self.targets)
        groups = None if self.groups is None else self.groups[positions]
        return LabelRows(frame, self.patient[positions], targets, self.part[positions], groups)


def read_labels(
    path: Path,
    asset: AssetSpec,
    study: Study,
    aside: SetAside,
    notes: SetAside,
    values: Values,
    *,
    key: Sequence[str] | None,
    text: Sequence[str] = (),
    numbers: Sequence[str] = (),
    made: pd.DataFrame | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelRows:
    """Read and check a label table; rows that cannot be used are counted in ``aside``.

    Args:
        path: the table.
        asset: names of patient and label at this site.
        study: label and split.
        aside: takes the counts.
        notes: takes what is used although it looks odd.
        values: takes the profile of the targets.
        key: the site's columns that may stand in one row only; None where only rows alike in all columns are doubles.
        text: further columns of the site to read as text.
        numbers: further columns of the site to read as numbers.
        made: the table's columns where they stand in no file, text, with the row's number as index.
        on_progress: as in ``read_columns``.

    Raises:
        DataError: see ``read_columns``; or no usable row.
    """
    reading = task.reads(study)
    columns = {asset.here(name): target for name, target in zip(reading.columns, reading.targets, strict=True)}
    if len(columns) < len(reading.columns):  # each target is read from a column of its own
        twice = ", ".join(reading.columns)
        raise DataError(f"{path}: {twice} are different columns of study {study.study}, and two of them are one here")
    grouping, banding = columns_of(study, asset)
    numbers = [*numbers, *(column for column, target in columns.items() if isinstance(target, Numeric)), *banding]
    split_column = study.evaluation.split_column and asset.here(study.evaluation.split_column)
    classes = [column for column, target in columns.items() if isinstance(target, Label)]
    own = [asset.patient, *classes, *(key or ()), *([split_column] if split_column else ())]
    wanted = list(dict.fromkeys([*own, *text, *(each for each in grouping if each not in numbers)]))
    frame = read_columns(path, wanted, numbers, notes, on_progress, asset.csv) if made is None else made
    found = {column: _target(target, frame[column], asset, values) for column, target in columns.items()}

    def drop(reason: str, bad: pd.Series | NDArray[np.bool_]) -> None:
        nonlocal frame, found
        hit = np.asarray(bad, dtype=bool)
        if hit.any():
            aside.add(f"label table: {reason}", int(hit.sum()), place(path, frame.index[hit]))
            frame = frame[~hit]
            found = {column: _Target(*(part[~hit] for part in each)) for column, each in found.items()}

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
    optional = {asset.here(name) for name in reading.optional}
    if optional.issuperset(columns):
        drop("none of the study's targets", np.all([each.missing for each in found.values()], axis=0))
    for column, target in columns.items():
        if column in optional:
            found[column] = found[column].without_missing()
        drop(f"no {column}", found[column].missing)
        wrong_value = "is none of the study's classes" if isinstance(target, Label) else "is no number of the study's"
        drop(f"{column} {wrong_value}", found[column].wrong)
    if split_column:
        drop(f"{split_column} is neither train nor test", ~frame[split_column].isin(["train", "test"]))
        words = frame.groupby(asset.patient)[split_column].transform("nunique")
        drop("the patient is both in train and in test", words > 1)
    doubles = list(key) if key is not None else None
    if doubles is not None:
        for column in columns:
            same = pd.Series(found[column].values, index=frame.index).groupby([frame[c] for c in doubles])
            drop("rows for the same record with different labels", same.transform("nunique") > 1)
    # Numbers as numbers: as text they stand there only where some row, of anybody's, has a word among them.
    compared = frame.copy(deep=False)
    for name in set(numbers).difference(own, text):
        compared[name] = to_numbers(frame[name])[0]
    drop("the same row again", compared.duplicated(subset=doubles))
    if frame.empty:
        raise NothingUsable(f"{path}: no usable row", Report(aside, values, notes))

    patient = frame[asset.patient].to_numpy(dtype=object)
    _note_near(path, frame[asset.patient], notes)
    numbers_of, names = number_patients(patient.tolist())
    said: list[bool | None] = [None] * len(names)
    if split_column:
        for number, word in zip(numbers_of.tolist(), frame[split_column].tolist(), strict=True):
            said[number] = word == "test"
    parts = [split.part_of(study, name, in_test) for name, in_test in zip(names, said, strict=True)]
    part = np.array(parts, dtype=object)[numbers_of]
    groups = groups_of(frame, study, asset, notes)
    return LabelRows(frame, patient, tuple(each.values for each in found.values()), part, groups)


class _Target(NamedTuple):
    """One target: its values by row, a mask of missing ones, and a mask of values that the study does not list."""

    values: NDArray[Any]
    missing: NDArray[np.bool_]
    wrong: NDArray[np.bool_]

    def without_missing(self) -> _Target:
        """Target that a row may lack: there it is -1 or NaN, which is neither missing nor wrong."""
        return _Target(self.values, np.zeros_like(self.missing), self.wrong & ~self.missing)


def _target(target: Label | Numeric, column: pd.Series, asset: AssetSpec, values: Values) -> _Target:
    column = settled(column, target.column if isinstance(target, Label) else target.name, asset)
    if isinstance(target, Label):
        index = {word: number for number, word in enumerate(plain(pd.Series(target.classes)))}
        words = plain(column)
        count_words(values, target.column, words, list(index))
        label = words.map(index).fillna(-1).to_numpy(dtype=np.int64)
        return _Target(label, words.isna().to_numpy(dtype=bool), label < 0)
    numbers, wrong = to_numbers(column)
    numbers = converted(numbers, target, asset)
    values.profile.numbers(target, numbers)
    low = -np.inf if target.low is None else target.low
    high = np.inf if target.high is None else target.high
    outside = (numbers < low) | (numbers > high)
    scaled = ((numbers - target.center) / target.scale).astype(np.float32)
    return _Target(scaled, np.isnan(numbers) & ~wrong, wrong | outside | np.isinf(scaled))


def identifiers(asset: AssetSpec, columns: Sequence[str]) -> list[str]:
    """Columns with identifiers of patients or records, which may be spelt in several ways; no files or instances."""
    return [column for column in columns if column in (asset.patient, getattr(asset, "record", None))]


def _note_near(path: Path, patient: pd.Series, notes: SetAside) -> None:
    groups = near(patient.tolist())
    alike = {word for group in groups for word in group}
    rows = patient.index[patient.isin(alike) & ~patient.duplicated()]
    what = f"{patient.name}s alike but for leading zeros, case, blanks or width: counted apart"
    notes.add(what, len(alike), place(path, rows) if len(rows) else "")


def number_rows(rows: LabelRows) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Patient number of each row; whether each patient is for training; whether for validation."""
    patients, names = number_patients(rows.patient.tolist())
    parts = np.empty(len(names), dtype=object)
    parts[patients] = rows.part
    return patients, parts == "train", parts == "validation"
