"""Patients: which are held back, and which take part in a private step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def held_back(study: str, patient: str, fraction: float) -> bool:
    """Whether a patient is held back for evaluation.

    SHA-256 of the study's name and the patient's identifier, read as a number in [0, 1), is below ``fraction``. It
    depends on no other patient: adding or removing one moves nobody else between the two parts, as the privacy
    guarantee needs, and two sites (or a pooled copy) that know the same patient agree.

    The coordinator chooses the study's name, and with it, blindly, who is held back: it knows no identifiers, but each
    new name draws a new part of the same patients. What their counts tell adds up over studies; the site's people see
    every study before any of them.
    """
    digest = hashlib.sha256(b"consilium split\0" + study.encode() + b"\0" + patient.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def number_patients(identifiers: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Patient numbers ``[N]``, 0 upwards in order of first appearance, and the identifier of each number."""
    order: dict[str, int] = {}
    numbers = np.fromiter((order.setdefault(name, len(order)) for name in identifiers), np.int64, len(identifiers))
    return numbers, list(order)


class PatientSampler:
    """Poisson sampling over patients: the sampling that the accountant's event describes.

    In every step each patient is included independently with probability ``sampling_rate``; of an included patient
    one record is chosen uniformly, so that a patient gives one gradient a step. Iterating yields ``steps`` int64
    arrays of record indices, some of them empty, which must be trained on (with noise alone) like any other.

    Args:
        patients: int64 ``[N]``, the patient number of each record.
        patient_count: number of patients; each has at least one record.
        sampling_rate: probability in (0, 1].
        steps: number of steps.
        generator: with privacy, the caller seeds it from the operating system's entropy and keeps no copy.

    Raises:
        ValueError: a rate outside (0, 1], a patient number out of range, or a patient without a record.
    """

    def __init__(
        self,
        patients: NDArray[np.int64],
        patient_count: int,
        sampling_rate: float,
        steps: int,
        generator: np.random.Generator,
    ) -> None:
        if not 0 < sampling_rate <= 1:
            raise ValueError("sampling_rate must lie in (0, 1]")
        if len(patients) and not 0 <= patients.min() <= patients.max() < patient_count:
            raise ValueError("a patient number is out of range")
        self._records = np.argsort(patients, kind="stable").astype(np.int64)
        self._counts = np.bincount(patients, minlength=patient_count)
        if patient_count and self._counts.min() == 0:
            raise ValueError("a patient has no record")
        self._starts = np.cumsum(self._counts) - self._counts
        self._rate = sampling_rate
        self._steps = steps
        self._generator = generator

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for _ in range(self._steps):
            chosen = np.flatnonzero(self._generator.random(len(self._counts)) < self._rate)
            record = self._starts[chosen] + self._generator.integers(0, self._counts[chosen])
            yield self._records[record]
