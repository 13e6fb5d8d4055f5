"""Data set that one asset gives for one study: patients by number, and records that are taken when they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.report import Report
from consilium_client.prepared.rows import StoredRows
from consilium_shared import limits, split
from consilium_shared.errors import DataError
from consilium_shared.task import Examples


def check_size(records: int, numbers: int) -> None:
    """Raises DataError when ``records`` records of so many float32 numbers would exceed ``limits.INPUT_BYTES``."""
    size = records * numbers * 4
    if size > limits.INPUT_BYTES:
        raise DataError(
            f"{records} records of {numbers} numbers each would take {size / 2**30:.0f} GiB of memory, more than the "
            f"{limits.INPUT_BYTES / 2**30:.0f} GiB allowed; the study needs smaller images, fewer bins or fewer columns"
        )


@dataclass(frozen=True)
class Part:
    """Some patients' records, by number.

    Attributes:
        records: int64 ``[n]``, ascending, their numbers among all.
        patients: int64 ``[n]``, the patient of each record, 0 … ``patient_count`` - 1.
        patient_count: number of these patients.
    """

    records: NDArray[np.int64]
    patients: NDArray[np.int64]
    patient_count: int


@dataclass(frozen=True)
class Dataset(ABC):
    """Records of one asset for one study. Nothing in it was computed across patients, and it names nobody.

    A subclass says where the numbers of a record come from: memory (``ArrayDataset``), or files that are read when
    records are taken.

    Attributes:
        patients: int64 ``[N]``, patient number 0 … ``patient_count`` - 1, each with at least one record.
        patient_count: number of patients.
        train: bool ``[patient_count]``; False is held back, for test or for validation.
        validation: bool ``[patient_count]``; True is held back for validation. None: nobody is.
        report: findings about the asset: what was set aside, and why.
        groups: number of each record's group in each of the study's groupings, int64 ``[N, groupings]``; None: none.
    """

    patients: NDArray[np.int64]
    patient_count: int
    train: NDArray[np.bool_]
    validation: NDArray[np.bool_] | None = field(default=None, kw_only=True)
    report: Report = field(default_factory=Report, kw_only=True)
    groups: NDArray[np.int64] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.patients)

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one record in each of the model's inputs."""

    @property
    def intact(self) -> bool:
        """True where the data set can be used; one that is not intact is loaded anew."""
        return True

    @abstractmethod
    def take(self, records: NDArray[np.int64]) -> Examples:
        """Inputs and targets of the records with these numbers, in this order; copies that the caller may change.

        A record's numbers do not depend on which others are taken. ``take`` raises nothing that depends on what
        a record holds, because a round that is charged may not fail for it: readers set such records aside before.
        """

    def targets(self, records: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Targets of these records alone."""
        return self.take(records).targets

    def patients_of(self, part: split.Part) -> NDArray[np.bool_]:
        """Mask bool ``[patient_count]`` of the patients in one part of the split."""
        validation = np.zeros_like(self.train) if self.validation is None else self.validation
        return {"train": self.train, "validation": validation, "test": ~self.train & ~validation}[part]

    def part(self, part: split.Part) -> Part:
        """Numbers of the records of the patients in one part of the split; no record is copied."""
        wanted = self.patients_of(part)
        kept = np.flatnonzero(wanted[self.patients])
        number = np.cumsum(wanted, dtype=np.int64) - 1
        return Part(kept, number[self.patients[kept]], int(wanted.sum()))


@dataclass(frozen=True)
class ArrayDataset(Dataset):
    """Records in memory.

    >>> data = ArrayDataset.of((np.ones((3, 2), np.float32),), (np.array([0, 1, 1]),), np.array([0, 0, 1]))
    >>> data.patient_count, data.shapes, data.take(np.array([2])).targets[0].tolist()
    (2, ((2,),), [1])

    Attributes:
        inputs: arrays ``[N, …]``, one for each of the model's inputs.
        labels: arrays ``[N, …]``, the targets.
    """

    inputs: tuple[NDArray[Any], ...] = field(kw_only=True)
    labels: tuple[NDArray[Any], ...] = field(kw_only=True)

    @classmethod
    def of(
        cls,
        inputs: tuple[NDArray[Any], ...],
        targets: tuple[NDArray[Any], ...],
        patients: NDArray[np.int64],
        train: NDArray[np.bool_] | None = None,
        report: Report | None = None,
        validation: NDArray[np.bool_] | None = None,
    ) -> ArrayDataset:
        """Data set of these arrays. ``train`` is by default True for everybody.

        Raises:
            ValueError: arrays of different lengths.
        """
        if any(len(each) != len(patients) for each in (*inputs, *targets)):
            raise ValueError("inputs, targets and patients differ in the number of records")
        count = int(patients.max(initial=-1)) + 1
        everybody = np.ones(count, dtype=bool) if train is None else train
        return cls(
            patients, count, everybody, validation=validation, report=report or Report(), inputs=inputs, labels=targets
        )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one record in each of the model's inputs."""
        return tuple(each.shape[1:] for each in self.inputs)

    def take(self, records: NDArray[np.int64]) -> Examples:
        """Inputs and targets of these records."""
        return Examples(tuple(each[records] for each in self.inputs), self.targets(records))

    def targets(self, records: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Targets of these records alone."""
        return tuple(each[records] for each in self.labels)

    def select(self, held_back: bool) -> ArrayDataset:
        """The records of the patients for test (or of those for training), with patients numbered anew from 0."""
        part = self.part("test" if held_back else "train")
        return replace(
            self,
            inputs=tuple(each[part.records] for each in self.inputs),
            labels=tuple(each[part.records] for each in self.labels),
            patients=part.patients,
            patient_count=part.patient_count,
            train=np.full(part.patient_count, not held_back),
            validation=None,
            groups=None if self.groups is None else self.groups[part.records],
        )


@dataclass(frozen=True)
class StoredDataset(Dataset):
    """Records that lie in the prepared store, and are decrypted when they are taken. Targets are in memory.

    Attributes:
        rows: of the store, row i of record i; their fields are the model's inputs.
        labels: arrays ``[N, …]``, the targets.
        more: arrays ``[N, …]`` in memory, further inputs of the model after those in the store.
    """

    rows: StoredRows = field(kw_only=True)
    labels: tuple[NDArray[Any], ...] = field(kw_only=True)
    more: tuple[NDArray[Any], ...] = field(default=(), kw_only=True)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one record in each of the model's inputs."""
        return (*(each.shape for each in self.rows.fields), *(each.shape[1:] for each in self.more))

    @property
    def intact(self) -> bool:
        """True while everything that was taken could be authenticated."""
        return self.rows.intact

    def take(self, records: NDArray[np.int64]) -> Examples:
        """Inputs and targets of these records; raises DamagedPack where the disk gives another file than was written,
        which no patient decides."""
        return Examples((*self.rows.take(records), *(each[records] for each in self.more)), self.targets(records))

    def targets(self, records: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Targets of these records alone."""
        return tuple(each[records] for each in self.labels)
