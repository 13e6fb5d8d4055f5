"""Records that are the same to the last bit: one person under two identifiers, or one record with two labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from consilium_client.data.dataset import Dataset
from consilium_shared.task import Examples

BATCH = 256


@dataclass(frozen=True)
class LookAlikes:
    """Numbers of records whose prepared inputs are equal to another record's.

    Attributes:
        same_patient: of one patient, the same again.
        patients: patients with a record that another patient has too.
        across: those of them of whom one part is for training and the other held back.
        labels: records with another label than one that is equal to them.
    """

    same_patient: int
    patients: int
    across: int
    labels: int

    def rows(self) -> Iterator[tuple[str, int]]:
        """Each number with its words."""
        yield "records equal to another of the same patient", self.same_patient
        yield "patients with a record equal to another patient's", self.patients
        yield "  of them, with one in training and one held back", self.across
        yield "records equal to one with another label", self.labels


def find(records: Dataset, also: Callable[[int, Examples], None] | None = None) -> LookAlikes:
    """Equal records, found by a digest of what the model would see of each.

    ``also``: shown the same records, some at a time, with the number of the first, so that they are taken once.
    """
    numbers: dict[bytes, int] = {}
    group = np.empty(len(records), dtype=np.int64)
    labels: list[bytes] = []
    for start in range(0, len(records), BATCH):
        some = records.take(np.arange(start, min(start + BATCH, len(records))))
        if also is not None:
            also(start, some)
        for at in range(len(some.inputs[0])):
            made = hashlib.blake2b(digest_size=16)
            for each in some.inputs:
                made.update(np.ascontiguousarray(each[at]).tobytes())
            group[start + at] = numbers.setdefault(made.digest(), len(numbers))
            labels.append(b"".join(np.ascontiguousarray(each[at]).tobytes() for each in some.targets))
    words: dict[bytes, int] = {}
    label = np.array([words.setdefault(each, len(words)) for each in labels], dtype=np.int64)
    patient = records.patients
    pairs = np.unique(np.stack([group, patient], axis=1), axis=0)
    by_group = np.bincount(pairs[:, 0], minlength=len(numbers))
    shared = pairs[by_group[pairs[:, 0]] > 1]
    trains = records.train[shared[:, 1]]
    both = np.isin(shared[:, 0], shared[trains, 0]) & np.isin(shared[:, 0], shared[~trains, 0])
    kinds = np.unique(np.stack([group, label], axis=1), axis=0)
    differing = np.flatnonzero(np.bincount(kinds[:, 0], minlength=len(numbers)) > 1)
    return LookAlikes(
        same_patient=len(records) - len(pairs),
        patients=len(np.unique(shared[:, 1])),
        across=len(np.unique(shared[both, 1])),
        labels=int(np.isin(group, differing).sum()),
    )
