"""Records that one asset gives for one study: prepared inputs in memory, with patient numbers and never identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from consilium_shared import limits
from consilium_shared.errors import DataError


def check_size(records: int, numbers: int) -> None:
    """Raises DataError when ``records`` records of so many float32 numbers would exceed ``limits.INPUT_BYTES``."""
    size = records * numbers * 4
    if size > limits.INPUT_BYTES:
        raise DataError(
            f"{records} records of {numbers} numbers each would take {size / 2**30:.0f} GiB of memory, more than the "
            f"{limits.INPUT_BYTES / 2**30:.0f} GiB allowed; the study needs smaller images, fewer bins or fewer columns"
        )


PLACES = 5
"""So many places of each reason are kept."""


class SetAside:
    """Counts what is not used, by reason, and the first places at which each reason was met.

    A reason and a count may stand in an error and so in a log. A place may be a file's name, which may carry an
    identifier: places are for the screen of ``data check`` alone.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._places: dict[str, list[str]] = {}

    def add(self, reason: str, count: int = 1, where: str = "") -> None:
        """Count ``count`` things under ``reason``; nothing happens when it is 0."""
        if count > 0:
            self.counts[reason] = self.counts.get(reason, 0) + count
            places = self._places.setdefault(reason, [])
            if where and len(places) < PLACES:
                places.append(where)

    @property
    def first(self) -> dict[str, str]:
        """Reason -> the first places."""
        return {reason: "; ".join(places) for reason, places in self._places.items() if places}


def explain(aside: SetAside) -> str:
    """The reasons counted so far, for an error's text."""
    return "".join(f"; {count} × {reason}" for reason, count in sorted(aside.counts.items(), key=lambda kv: -kv[1]))


class NothingUsable(DataError):
    """No record of an asset is left. The text has reasons and counts; the places are for this site's screen alone.

    Attributes:
        aside: what was set aside.
        values: single values taken as missing.
        notes: what looks odd.
    """

    def __init__(
        self, what: str, aside: SetAside, values: SetAside | None = None, notes: SetAside | None = None
    ) -> None:
        self.aside, self.values, self.notes = aside, values or SetAside(), notes or SetAside()
        super().__init__(what + explain(self.aside) + explain(self.values) + explain(self.notes))


@dataclass(frozen=True)
class Part:
    """Some patients' records, by number.

    Attributes:
        records: int64 ``[n]``, ascending, their numbers among all.
        patients: int64 ``[n]``, whose each is, 0 … ``patient_count`` - 1.
        patient_count: number of these patients.
    """

    records: NDArray[np.int64]
    patients: NDArray[np.int64]
    patient_count: int


@dataclass(frozen=True)
class Records:
    """Records of one asset, prepared for the study's model. Nothing in it was computed across patients.

    Attributes:
        inputs: float32 ``[N, 1, S, S]`` in [0, 1] (images), ``[N, bins, 3 V]`` (series: the V values, then the V
            masks, then the V gaps), or ``[N, F]`` (tables).
        statics: float32 ``[N, K]`` for a series with statics, else None.
        labels: int64 ``[N]``, index into the study's classes.
        patients: int64 ``[N]``, patient number 0 … ``patient_count`` - 1, each with at least one record.
        patient_count: number of patients.
        train: bool ``[patient_count]``; False is held back for evaluation.
        set_aside: reason -> records (or rows, files) that are not used.
        first_set_aside: reason -> the first places (lines, rows, files' names): for this site's screen, never logged.
        values_set_aside: reason -> single values taken as missing (not a number, out of the study's range …).
        missing: feature or variable -> records without a single usable value of it.
        first_values: reason -> the first places of values set aside.
        notes: what is used and looks odd -> how often (identifiers that are nearly the same, quoted lines …).
        first_notes: the first places of each note.
    """

    inputs: NDArray[np.float32]
    statics: NDArray[np.float32] | None
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]
    patient_count: int
    train: NDArray[np.bool_]
    set_aside: Mapping[str, int] = field(default_factory=dict)
    first_set_aside: Mapping[str, str] = field(default_factory=dict)
    values_set_aside: Mapping[str, int] = field(default_factory=dict)
    missing: Mapping[str, int] = field(default_factory=dict)
    first_values: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    first_notes: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, held_back: bool) -> Part:
        """Which records are of patients held back (or of those for training), without a copy of any."""
        wanted = self.train != held_back
        kept = np.flatnonzero(wanted[self.patients])
        number = np.cumsum(wanted, dtype=np.int64) - 1
        return Part(kept, number[self.patients[kept]], int(wanted.sum()))

    def select(self, held_back: bool) -> Records:
        """The records of the patients held back (or of those for training), with patients numbered anew from 0."""
        part = self.part(held_back)
        return replace(
            self,
            inputs=self.inputs[part.records],
            statics=None if self.statics is None else self.statics[part.records],
            labels=self.labels[part.records],
            patients=part.patients,
            patient_count=part.patient_count,
            train=self.train[self.train != held_back],
        )
