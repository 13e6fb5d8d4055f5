"""Assessment of an asset for a study, as ``consilium-site data check`` shows it: for this site's eyes only.

Counts of few patients can identify them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from consilium_client.data.dataset import Dataset
from consilium_client.data.profile import Spread, Words
from consilium_client.data.report import NothingUsable, Report, SetAside
from consilium_client.data.scanners import Scanner
from consilium_client.quality import fit, lookalikes
from consilium_client.quality.fit import Finding
from consilium_client.quality.lookalikes import LookAlikes
from consilium_client.quality.pictures import Pictures
from consilium_shared import task
from consilium_shared.inputs import Numeric
from consilium_shared.printable import printable
from consilium_shared.study import Study

Placed = Mapping[str, tuple[int, str]]
"""Reason -> (how often; the first places)."""


@dataclass(frozen=True)
class Table:
    """A table to print: a title, column names and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Variable:
    """One numeric variable: values as they stand in the site's files, beside the study's constants.

    Attributes:
        spread: of the site's values.
        constants: the study's ``center``, ``scale``, ``low`` and ``high``.
        missing: records without a usable value.
    """

    spread: Spread
    constants: Numeric
    missing: int

    @property
    def outside(self) -> int:
        """Values outside the study's range."""
        return self.spread.below + self.spread.above

    def to_json(self) -> dict[str, Any]:
        """The variable as JSON-like data; what has no value is null."""
        found = {key: value for key, value in asdict(self.spread).items() if key not in ("sample", "codes")}
        numbers = {key: _number(value) for key, value in found.items()}
        study = self.constants.model_dump(mode="json", exclude={"name"})
        codes = {f"{code:g}": count for code, count in self.spread.codes.items()}
        return {**numbers, "missing": self.missing, "codes": codes, "study": study}


@dataclass(frozen=True)
class Quality:
    """Quality of an asset for a study.

    Attributes:
        study: the study's name.
        asset: the asset's name.
        records: usable records.
        patients: usable patients.
        patients_held_back: patients kept for evaluation, those for test.
        patients_for_validation: patients kept for validation, neither trained on nor for test.
        labels: class -> (records, patients, patients held back); a patient may count in several classes.
        records_by_patient: number of records -> patients that have so many.
        findings: what does not fit the study, or is odd.
        variables: numeric ones.
        columns: classes and categories.
        alike: records that are the same although they are not of one patient, or not of one class.
        pictures: of an image study, its images as a model would see them.
        scanners: of an image study, by the headers of its files.
        periods: column of moments -> its first and last, ISO 8601 in UTC.
        size: of an image study, pixels of a side.
        set_aside: reason -> (count of records, rows or files; the first places).
        values_set_aside: reason -> (single values taken as missing; the first places).
        notes: what is used although it looks odd -> (how often; the first places).
        missing: feature or variable -> records without a usable value of it.
        looked_at: records among which those were counted.
    """

    study: str
    asset: str
    records: int
    patients: int
    patients_held_back: int
    patients_for_validation: int
    labels: Mapping[str, tuple[int, int, int]]
    records_by_patient: Mapping[int, int]
    findings: Sequence[Finding]
    variables: Sequence[Variable]
    columns: Sequence[Words]
    alike: LookAlikes
    pictures: Pictures | None
    scanners: Sequence[Scanner]
    periods: Mapping[str, tuple[str, str]]
    size: int
    set_aside: Placed
    values_set_aside: Placed
    notes: Placed
    missing: Mapping[str, int]
    looked_at: int

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-like data."""
        parts = ("findings", "variables", "columns", "alike", "pictures", "scanners", "size")
        return {
            **{name: value for name, value in vars(self).items() if name not in parts},
            "findings": [asdict(each) for each in self.findings],
            "variables": {each.spread.name: each.to_json() for each in self.variables},
            "columns": {each.name: asdict(each) for each in self.columns},
            "alike": asdict(self.alike),
            "pictures": None if self.pictures is None else self.pictures.to_json(),
            "scanners": [
                {key: value for key, value in asdict(each).items() if key != "examples"} for each in self.scanners
            ],
        }

    def tables(self) -> Sequence[Table]:
        """The report as tables; empty tables are left out."""
        counts = Table(
            f"{self.asset} for {self.study}",
            ("", "count"),
            (
                ("records", str(self.records)),
                ("patients", str(self.patients)),
                ("patients held back for evaluation", str(self.patients_held_back)),
                *(
                    (("patients held back for validation", str(kept)),)
                    if (kept := self.patients_for_validation)
                    else ()
                ),
                ("most records of one patient", str(max(self.records_by_patient, default=0))),
                *((what, str(count)) for what, count in self.alike.rows() if count),
            ),
        )
        labels = tuple((name, *map(str, numbers)) for name, numbers in self.labels.items())
        tables = [
            counts,
            Table("Look at", ("where", "what", "advice"), tuple((f.where, f.what, f.advice) for f in self.findings)),
            Table("Classes", ("class", "records", "patients", "held back"), labels),
            _variables(self.variables, self.looked_at),
            self._scanners(),
            Table("Dates", ("column", "first", "last"), tuple((n, *span) for n, span in self.periods.items())),
            *_reasons(self.set_aside, self.values_set_aside, self.notes),
        ]
        numeric = {each.spread.name for each in self.variables}
        absent = tuple((name, str(n)) for name, n in _most(self.missing) if n and name not in numeric)
        tables.append(Table("Records without a value", ("variable", "records"), absent))
        return [table for table in tables if table.rows]

    def _scanners(self) -> Table:
        rows = tuple(
            (printable(each.name), str(each.images), day(each.first), day(each.last), printable(_sizes(each)))
            for each in self.scanners
        )
        return Table("Scanners", ("scanner", "files", "first", "last", "rows × columns"), rows)


def reasons(error: NothingUsable, study: Study) -> Sequence[Table]:
    """Tables that say why an asset has no usable record, with places; empty tables are left out."""
    found = error.report
    parts = (_placed(part) for part in (found.set_aside, found.values, found.notes))
    rows = tuple((each.where, each.what, each.advice) for each in fit.of_report(study, found))
    tables = [Table("Look at", ("where", "what", "advice"), rows), *_reasons(*parts)]
    return [table for table in tables if table.rows]


def assess(records: Dataset, study: Study, asset: str | None = None, minimum_patients: int = 0) -> Quality:
    """The report on records that were loaded for a study.

    Args:
        records: as the study's readers made them.
        study: the study.
        asset: name of the asset, the study's own where it is None.
        minimum_patients: fewest to train on, as the site's policy has it.
    """
    labels: dict[str, tuple[int, int, int]] = {}
    groups = task.of(study).groups(study, records.targets(np.arange(len(records))))
    image, pictures = task.reads(study).image, Pictures(groups)
    for name, of_class in groups.items():
        patients = np.unique(records.patients[of_class])
        labels[name] = (int(of_class.sum()), len(patients), int(records.patients_of("test")[patients].sum()))
    each, patients = np.unique(np.bincount(records.patients), return_counts=True)
    report = records.report
    shown = None if image is None else lambda start, some: pictures.add(start, some.inputs[0])
    alike = lookalikes.find(records, shown)
    found = fit.findings(study, records, minimum_patients)
    if image is not None:
        found += fit.of_images(pictures.low, len(records), report.values.profile.scanners.all())
    return Quality(
        study=study.study,
        asset=asset or study.data.asset,
        records=len(records),
        patients=records.patient_count,
        patients_held_back=int(records.patients_of("test").sum()),
        patients_for_validation=int(records.patients_of("validation").sum()),
        labels=labels,
        records_by_patient={int(n): int(count) for n, count in zip(each, patients, strict=True)},
        findings=found,
        variables=variables_of(study, report),
        columns=report.values.profile.columns(),
        alike=alike,
        pictures=None if image is None else pictures,
        scanners=report.values.profile.scanners.all(),
        periods={name: (_moment(a), _moment(b)) for name, (a, b) in report.values.profile.periods.items()},
        size=0 if image is None else image.size,
        set_aside=_placed(report.set_aside),
        values_set_aside=_placed(report.values),
        notes=_placed(report.notes),
        missing=dict(report.missing),
        looked_at=report.looked_at or len(records),
    )


def variables_of(study: Study, report: Report) -> list[Variable]:
    """Numeric variables of a study in the order in which they were read, with their constants."""
    known = fit.numeric(study)
    return [
        Variable(spread, known[spread.name], report.missing.get(spread.name, spread.rows - spread.values))
        for spread in report.values.profile.spreads()
        if spread.name in known
    ]


def _variables(variables: Sequence[Variable], records: int) -> Table:
    """Table of numeric variables; narrow enough for 80 columns."""
    rows = []
    for each in variables:
        spread, study = each.spread, each.constants
        span = "–" if not spread.values else f"{spread.low:.4g} … {spread.median:.4g} … {spread.high:.4g}"
        low, high = ("" if bound is None else f"{bound:g}" for bound in (study.low, study.high))
        limits = f"{low or '–∞'} … {high or '∞'}"
        rows.append(
            (
                spread.name,
                span,
                f"{study.center:g} ± {study.scale:g}",
                limits if low or high else "any",
                percent(each.outside, spread.values),
                percent(each.missing, records),
            )
        )
    names = ("variable", "least … median … most", "study", "range", "outside", "missing")
    return Table("Values", names, tuple(rows))


def percent(part: int, whole: int) -> str:
    """A share in per cent; a small one is never written as none.

    >>> percent(1, 3000), percent(0, 3000), percent(1, 2)
    ('<0.1 %', '0 %', '50 %')
    """
    if not part or not whole:
        return "0 %"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.1 else f"{share:.3g} %"


def day(date: str) -> str:
    """A date of DICOM's (``YYYYMMDD``) as people write it; a dash for none.

    >>> day("20240117")
    '2024-01-17'
    """
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if date else "–"


def _sizes(scanner: Scanner) -> str:
    return ", ".join(name for name, _ in scanner.sizes.most_common(3)) + (", …" if len(scanner.sizes) > 3 else "")


def _moment(seconds: float) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M")


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reasons(aside: Placed, values: Placed, notes: Placed) -> list[Table]:
    def rows(part: Placed) -> tuple[tuple[str, str, str], ...]:
        return tuple((reason, str(count), place) for reason, (count, place) in _most(part))

    return [
        Table("Set aside", ("reason", "count", "first"), rows(aside)),
        Table("Values taken as missing", ("reason", "count", "first"), rows(values)),
        Table("Used, but look at it", ("what", "count", "first"), rows(notes)),
    ]


def _placed(aside: SetAside) -> dict[str, tuple[int, str]]:
    """Counts with the places where each was first met, made safe for a screen: a file's name may hold anything."""
    places = aside.first
    return {reason: (count, printable(places.get(reason, ""))) for reason, count in aside.counts.items()}


def _most(counts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Items by count, the largest first."""
    return sorted(counts.items(), key=lambda item: (item[1], item[0]), reverse=True)
