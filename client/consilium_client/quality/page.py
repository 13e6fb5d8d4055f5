"""The assessment as one HTML page in the site's home that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from consilium_client.quality.assessment import Quality, day, percent
from consilium_client.quality.figures import histogram
from consilium_client.quality.pictures import of_scanners
from consilium_shared.files import write_atomically
from consilium_shared.printable import printable

MOST_WORDS = 10
_SPANS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, 1000), (1001, 10**9))


def write(quality: Quality, site: str, folder: Path) -> Path:
    """Write the page for the site's own people, in place of the one before; returns its file, of mode 0600.

    Raises:
        OSError: the folder cannot be written.
    """
    file = folder / f"{quality.asset}-{quality.study}.html"
    write_atomically(file, render(quality, site))
    return file


def render(quality: Quality, site: str) -> bytes:
    """The page, UTF-8."""
    environment = Environment(
        loader=PackageLoader("consilium_client.quality", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        q=quality,
        site=site,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=metadata.version("consilium"),
        most=max(quality.records_by_patient, default=0),
        aside_count=sum(count for count, _ in quality.set_aside.values()),
        by_patient=list(_spans(quality.records_by_patient)),
        alike=[row for row in quality.alike.rows() if row[1]],
        scanners=of_scanners(quality.scanners, quality.size) if quality.size else [],
        use=[] if quality.pictures is None else _shares(quality.pictures.use.tolist()),
        day=day,
        variables=[(each, histogram(each.spread, each.constants)) for each in quality.variables],
        aside=_most(quality.set_aside),
        values=_most(quality.values_set_aside),
        notes=_most(quality.notes),
        percent=percent,
        number=_number,
        few=lambda words: list(islice(words.items(), MOST_WORDS)),
    )
    return page.encode()


def _spans(records_by_patient: Mapping[int, int]) -> Iterator[tuple[str, int]]:
    """Patients by their number of records, in spans."""
    for low, high in _SPANS:
        count = sum(patients for records, patients in records_by_patient.items() if low <= records <= high)
        if count:
            yield str(low) if low == high else f"{low} – {high}" if high < 10**9 else f"{low} and more", count


def _shares(counts: Sequence[int]) -> list[tuple[str, int, float]]:
    """Tenths of the grey range: name of each, its images, and its bar in per cent of the longest."""
    names = (f"{10 * tenth} – {10 * tenth + 10} %" for tenth in range(len(counts)))
    return [(name, count, 100 * count / max(*counts, 1)) for name, count in zip(names, counts, strict=True)]


def _most(placed: Mapping[str, tuple[int, str]]) -> list[tuple[str, tuple[int, str]]]:
    return sorted(placed.items(), key=lambda item: -item[1][0])


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _shown(value: Any) -> Any:
    """Printed form of a value in the template: text without characters that cannot be printed, all else as it is."""
    return printable(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value
