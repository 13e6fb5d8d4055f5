"""Patients by number, and which take part in a private step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd.keystream import KeyStream


def number_patients(identifiers: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Patient numbers ``[N]``, 0 upwards in order of first appearance, and the identifier of each number."""
    order: dict[str, int] = {}
    numbers = np.fromiter((order.setdefault(name, len(order)) for name in identifiers), np.int64, len(identifiers))
    return numbers, list(order)


@dataclass(frozen=True)
class Draw:
    """The records of one step.

    Attributes:
        records: int64 ``[B]``, indices of records; those of one patient stand together.
        owners: int64 ``[B]``, patient of each record: 0 for the first patient drawn, 1 for the next …, without gaps.
    """

    records: NDArray[np.int64]
    owners: NDArray[np.int64]


class PatientSampler:
    """Poisson sampling over patients: the sampling that the accountant's event describes.

    In every step each patient is included independently with probability ``sampling_rate`` (rounded down to a multiple
    of 2^-64), or a share of it that is its own; of an included patient so many records are drawn as it has, at most
    ``records_per_patient``, uniformly and without replacement. Iterating yields ``steps`` draws, some of them empty,
    which must be trained on (with noise alone) like any other.

    Args:
        patients: int64 ``[N]``, the patient number of each record.
        patient_count: number of patients; each has at least one record.
        sampling_rate: probability in (0, 1].
        steps: number of steps.
        seed: 32 bytes; with privacy secret, and used for these steps alone.
        records_per_patient: most records of a patient in a step.
        shares: float64 ``[patient_count]`` in (0, 1], of the rate at which each patient is included; None: all of it.
            A patient's is that patient's own, so nobody is included with more than the rate that is charged.

    Raises:
        ValueError: a rate or share outside (0, 1], a patient number out of range, a patient without a record, or no
            record wanted.
    """

    def __init__(
        self,
        patients: NDArray[np.int64],
        patient_count: int,
        sampling_rate: float,
        steps: int,
        seed: bytes,
        records_per_patient: int = 1,
        shares: NDArray[np.float64] | None = None,
    ) -> None:
        if not 0 < sampling_rate <= 1:
            raise ValueError("sampling_rate must lie in (0, 1]")
        if records_per_patient < 1:
            raise ValueError("records_per_patient must be at least 1")
        if len(patients) and not 0 <= patients.min() <= patients.max() < patient_count:
            raise ValueError("a patient number is out of range")
        if shares is not None and not (shares.shape == (patient_count,) and ((shares > 0) & (shares <= 1)).all()):
            raise ValueError("each patient has a share in (0, 1]")
        self._records = np.argsort(patients, kind="stable").astype(np.int64)
        self._counts = np.bincount(patients, minlength=patient_count)
        if patient_count and self._counts.min() == 0:
            raise ValueError("a patient has no record")
        self._starts = np.cumsum(self._counts) - self._counts
        own = np.full(patient_count, sampling_rate) if shares is None else sampling_rate * shares
        self._always = own >= 1
        self._below = np.array([min(int(rate * 2.0**64), 2**64 - 1) for rate in own.tolist()], dtype=np.uint64)
        self._steps = steps
        self._most = records_per_patient
        self._inclusion, self._choice = KeyStream(seed, "sampling"), KeyStream(seed, "records")

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Draw]:
        for _ in range(self._steps):
            drawn = self._drawn()
            counts = self._counts[drawn]
            owners = np.repeat(np.arange(len(drawn)), counts)
            first = np.cumsum(counts) - counts
            rank = np.arange(len(owners)) - first[owners]
            # Each record gets a word, and those with a patient's smallest words are its draw.
            order = np.lexsort((self._choice.words(len(owners)), owners))
            chosen = order[rank < self._most]
            yield Draw(self._records[self._starts[drawn][owners] + rank][chosen], owners[chosen])

    def _drawn(self) -> NDArray[np.int64]:
        """Patients drawn for one step."""
        words = self._inclusion.words(len(self._counts))
        return np.flatnonzero(self._always | (words < self._below))
