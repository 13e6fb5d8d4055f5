"""Fit of a site's data to a study's contract: what does not fit, and what a person should look at before approving.

Nothing here refuses anything. It is for the screen of the hospital's people, and no part of it enters a log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np

from consilium_client.data.dataset import Dataset
from consilium_client.data.profile import Spread, Words
from consilium_client.data.report import Report
from consilium_client.data.scanners import Scanner
from consilium_client.quality.units import mixed, suspected
from consilium_shared import task
from consilium_shared.inputs import Numeric
from consilium_shared.printable import printable
from consilium_shared.study import Study

FEW_PATIENTS = 20
FEW_OF_A_GROUP = 10
MUCH_MISSING = 0.8
MUCH_OUTSIDE = 0.01
MUCH_STRANGE = 0.01
LITTLE_RANGE = 0.05
"""Share of images; when more use little of the grey range it is told."""
MANY_RECORDS = 20
"""One patient with so many times the records of the median patient is told."""
_ROWS_TO_JUDGE = 10


@dataclass(frozen=True)
class Finding:
    """One thing in which a site's data does not fit a study, or looks odd.

    Attributes:
        level: ``misfit`` is something that the study says and the data does not have; ``odd`` is for a person's eyes.
        where: a variable, a class, or ``patients``.
        what: it, with numbers.
        advice: a person's next step.
    """

    level: Literal["misfit", "odd"]
    where: str
    what: str
    advice: str


def findings(study: Study, records: Dataset, minimum_patients: int = 0) -> list[Finding]:
    """Findings on records that were read for a study; ``minimum_patients``: of the site's policy."""
    found = [*_patients(records, minimum_patients), *_groups(study, records)]
    return found + of_report(study, records.report)


def of_report(study: Study, report: Report) -> list[Finding]:
    """Findings on what was read alone, also where no usable record is left."""
    constants = numeric(study)
    found: list[Finding] = []
    for spread in report.values.profile.spreads():
        found += _numbers(constants.get(spread.name), spread)
    for words in report.values.profile.columns():
        found += _words(words)
    return found + list(_missing(report.missing, report.looked_at))


def numeric(study: Study) -> dict[str, Numeric]:
    """Numeric variables and targets of a study by name."""
    reading = task.reads(study)
    series = () if reading.series is None else (*reading.series.variables, *reading.series.statics)
    every = (*reading.targets, *series, *reading.features)
    return {each.name: each for each in every if isinstance(each, Numeric)}


def of_images(low: int, images: int, scanners: Sequence[Scanner]) -> Iterator[Finding]:
    """Findings on images: ``low`` of them use little of the grey range; dates of scanners that cannot be."""
    if images and low > LITTLE_RANGE * images:
        what = f"{low} of {images} use less than a tenth of the grey range"
        yield Finding("odd", "images", what, "look at them on the page: too dark to see anything?")
    today = datetime.now().astimezone().strftime("%Y%m%d")
    for each in scanners:
        if each.last > today:
            yield Finding("odd", printable(each.name), "images from days that are still to come", "shifted dates?")


def _patients(records: Dataset, minimum: int) -> Iterator[Finding]:
    train = int(records.train.sum())
    if train < minimum:
        what = f"{train} patients to train on, fewer than minimum_patients ({minimum}) of this site's policy"
        yield Finding("misfit", "patients", what, "the site refuses the study; look at what was set aside")
    elif train < FEW_PATIENTS:
        yield Finding("odd", "patients", f"{train} patients to train on", "is this the whole asset?")
    if not records.patients_of("test").any():
        yield Finding("odd", "patients", "nobody is held back for evaluation", "the study's split leaves no patient")
    each = np.bincount(records.patients, minlength=1)
    most, median = int(each.max(initial=0)), float(np.median(each))
    if most >= MANY_RECORDS * max(median, 1.0):
        what = f"one patient has {most} records; half of them have {median:g} or fewer"
        yield Finding("odd", "patients", what, "is it one person, or a placeholder for many?")


def _groups(study: Study, records: Dataset) -> Iterator[Finding]:
    groups = task.of(study).groups(study, records.targets(np.arange(len(records))))
    counts = {name: len(np.unique(records.patients[of])) for name, of in groups.items()}
    full = [name for name, count in counts.items() if count]
    if len(counts) > 1 and (not full or (len(full) == 1 and groups[full[0]].all())):
        only = f"only records of {printable(full[0])}" if full else "no record of any class"
        yield Finding("misfit", "classes", only, "is the label column the right one, and written as the study has it?")
        return
    for name, count in counts.items():
        shown = printable(name)
        if not count:
            yield Finding("misfit", shown, "no record of this class", "is it written as the study has it?")
        elif count < FEW_OF_A_GROUP:
            yield Finding(
                "odd",
                shown,
                f"{count} patient{'' if count == 1 else 's'} of this class",
                "metrics of this site will say little",
            )


def _numbers(feature: Numeric | None, spread: Spread) -> Iterator[Finding]:
    if feature is None or not spread.values:
        return
    name, median = spread.name, f"median {spread.median:.4g}"
    if spread.values >= _ROWS_TO_JUDGE and spread.low == spread.high:
        yield Finding("odd", name, f"all {spread.values} values are {spread.low:g}", "is it the right column?")
    convert = suspected(feature, spread)
    if convert is not None:
        what = (
            f"{median}, where the study has {feature.center:g} ± {feature.scale:g}: as if in {convert.unit} in place "
            f"of {convert.other}"
        )
        yield Finding("misfit", name, what, "compare the units; declare this site's in site.yaml")
    outside = spread.below + spread.above
    share = outside / spread.values
    some = None if convert is not None else mixed(feature, spread)
    if some is not None:
        what = f"{some[1]:.1%} of the values are outside the study's range and inside it in {some[0].other}"
        what += f", were they in {some[0].unit}"
        yield Finding("odd", name, what, "are two units mixed?")
    elif share > MUCH_OUTSIDE:
        low = "–∞" if feature.low is None else f"{feature.low:g}"
        high = "∞" if feature.high is None else f"{feature.high:g}"
        what = f"{share:.1%} of the values are outside {low} … {high}; {median}"
        yield Finding("misfit" if share > 0.5 else "odd", name, what, "they count as missing: unit, or code?")
    for code, count in spread.codes.items():
        inside = (feature.low is None or code >= feature.low) and (feature.high is None or code <= feature.high)
        if inside and _apart(code, spread, count):
            yield Finding("odd", name, f"{count} values are {code:g}", "a code for missing? declare it in site.yaml")


def _apart(code: float, spread: Spread, count: int) -> bool:
    """True for a code that lies far from every other value and is more than an accident."""
    others = spread.sample[spread.sample != code]
    if count < 3 or len(np.unique(others)) < _ROWS_TO_JUDGE:
        return False
    q05, q95 = np.quantile(others, [0.05, 0.95])
    gap, width = float(np.abs(others - code).min()), float(q95 - q05)
    if code == 0:  # stands close to what is measured, but for cholesterol, weight or pressure nobody has it
        return float(others[0]) > 0 and gap > width / 4
    return gap > max(2.0 * width, 1.0)


def _words(words: Words) -> Iterator[Finding]:
    strange = sum(words.strange.values())
    if strange > MUCH_STRANGE * words.rows:
        shown = ", ".join(f"{printable(word)!r}" for word in list(words.strange)[:3])
        level: Literal["misfit", "odd"] = "misfit" if not any(words.known.values()) else "odd"
        what = f"{strange} of {words.rows} rows say {shown}{', …' if len(words.strange) > 3 else ''}"
        known = ", ".join(f"{printable(word)!r}" for word in list(words.known)[:3])
        yield Finding(level, words.name, what, f"the study knows {known}{', …' if len(words.known) > 3 else ''}")
    if sum(1 for count in words.known.values() if count) == 1 and not words.strange and words.rows >= _ROWS_TO_JUDGE:
        only = next(word for word, count in words.known.items() if count)
        yield Finding("odd", words.name, f"every row says {printable(only)!r}", "is it the right column?")


def _missing(missing: Mapping[str, int], records: int) -> Iterator[Finding]:
    for name, count in missing.items():
        if records and count >= records:
            yield Finding("misfit", name, "no record has a usable value", "is it another name at this site?")
        elif records and count > MUCH_MISSING * records:
            yield Finding("odd", name, f"{count / records:.0%} of the records have no usable value", "")
