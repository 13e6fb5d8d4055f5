"""Output of ``consilium-site data check``. For this site's screen only: counts of few patients can identify them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from consilium_client.data.dataset import Dataset
from consilium_client.data.report import NothingUsable, SetAside
from consilium_shared import task
from consilium_shared.printable import printable
from consilium_shared.study import Study


@dataclass(frozen=True)
class Table:
    """A table to print: a title, column names and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Quality:
    """Quality of an asset for a study.

    Attributes:
        study: the study's name.
        asset: the asset's name.
        records: usable records.
        patients: usable patients.
        patients_held_back: patients kept for evaluation.
        labels: class -> (records, patients); a patient may count in several classes.
        set_aside: reason -> (count of records, rows or files; the first places).
        values_set_aside: reason -> (single values taken as missing; the first places).
        notes: what is used although it looks odd -> (how often; the first places).
        missing: feature or variable -> records without a usable value of it.
    """

    study: str
    asset: str
    records: int
    patients: int
    patients_held_back: int
    labels: Mapping[str, tuple[int, int]]
    set_aside: Mapping[str, tuple[int, str]]
    values_set_aside: Mapping[str, tuple[int, str]]
    notes: Mapping[str, tuple[int, str]]
    missing: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-like data."""
        return asdict(self)

    def tables(self) -> Sequence[Table]:
        """The report as tables; empty tables are left out."""
        counts = Table(
            f"{self.asset} for {self.study}",
            ("", "count"),
            (
                ("records", str(self.records)),
                ("patients", str(self.patients)),
                ("patients held back for evaluation", str(self.patients_held_back)),
            ),
        )
        labels = tuple((name, str(records), str(patients)) for name, (records, patients) in self.labels.items())
        absent = tuple((name, str(count)) for name, count in _most(self.missing) if count)
        tables = [
            counts,
            Table("Labels", ("class", "records", "patients"), labels),
            *_reasons(self.set_aside, self.values_set_aside, self.notes),
            Table("Records without a value", ("variable", "records"), absent),
        ]
        return [table for table in tables if table.rows]


def reasons(error: NothingUsable) -> Sequence[Table]:
    """Tables that say why an asset has no usable record, with places; empty tables are left out."""
    found = error.report
    parts = (_placed(part) for part in (found.set_aside, found.values, found.notes))
    return [table for table in _reasons(*parts) if table.rows]


def _reasons(
    aside: Mapping[str, tuple[int, str]], values: Mapping[str, tuple[int, str]], notes: Mapping[str, tuple[int, str]]
) -> list[Table]:
    def rows(part: Mapping[str, tuple[int, str]]) -> tuple[tuple[str, str, str], ...]:
        return tuple((reason, str(count), place) for reason, (count, place) in _most(part))

    return [
        Table("Set aside", ("reason", "count", "first"), rows(aside)),
        Table("Values taken as missing", ("reason", "count", "first"), rows(values)),
        Table("Used, but look at it", ("what", "count", "first"), rows(notes)),
    ]


def assess(records: Dataset, study: Study, asset: str | None = None) -> Quality:
    """The report on records that were loaded for a study, from its own asset where ``asset`` names none."""
    labels: dict[str, tuple[int, int]] = {}
    for name, of_class in task.of(study).groups(study, records.targets(np.arange(len(records)))).items():
        labels[name] = (int(of_class.sum()), len(np.unique(records.patients[of_class])))
    return Quality(
        study=study.study,
        asset=asset or study.data.asset,
        records=len(records),
        patients=records.patient_count,
        patients_held_back=int((~records.train).sum()),
        labels=labels,
        set_aside=_placed(records.report.set_aside),
        values_set_aside=_placed(records.report.values),
        notes=_placed(records.report.notes),
        missing=dict(records.report.missing),
    )


def _placed(aside: SetAside) -> dict[str, tuple[int, str]]:
    """Counts with the places where each was first met, made safe for a screen: a file's name may hold anything."""
    places = aside.first
    return {reason: (count, printable(places.get(reason, ""))) for reason, count in aside.counts.items()}


def _most(counts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Items by count, the largest first."""
    return sorted(counts.items(), key=lambda item: (item[1], item[0]), reverse=True)
