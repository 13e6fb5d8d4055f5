"""Scanners of an image asset and when they took its images, by the headers of its files: for the site's own eyes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXAMPLES = 6
"""Files of each scanner that are remembered, to be shown."""
MOST = 100
"""Scanners that are told apart; of more, the rest is one."""
REST = "other scanners"
_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])")


@dataclass
class Scanner:
    """Images of one scanner.

    Attributes:
        name: manufacturer and model, as the files have them.
        images: number of its files.
        first: earliest date of an image (``YYYYMMDD``), or empty.
        last: latest date.
        undated: images without a date.
        sizes: rows × columns -> files.
        bits: bits stored -> files.
        examples: some of its files.
    """

    name: str
    images: int = 0
    first: str = ""
    last: str = ""
    undated: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    bits: Counter[str] = field(default_factory=Counter)
    examples: list[Path] = field(default_factory=list)


class Scanners:
    """Collector of scanners while headers are read; nothing of it raises, whatever a header holds."""

    def __init__(self) -> None:
        self._found: dict[str, Scanner] = {}

    def add(self, path: Path, header: Any) -> None:
        """Count one file by its header, a ``pydicom.Dataset``."""
        words = " ".join(_text(header, tag) for tag in ("Manufacturer", "ManufacturerModelName"))
        name = words.strip() or "no manufacturer in the file"
        if name not in self._found and len(self._found) >= MOST:
            name = REST
        scanner = self._found.setdefault(name, Scanner(name))
        scanner.images += 1
        dates = (_text(header, tag) for tag in ("AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate"))
        date = next((word for word in dates if _DATE.fullmatch(word)), "")
        if date:
            scanner.first = min(scanner.first or date, date)
            scanner.last = max(scanner.last, date)
        else:
            scanner.undated += 1
        scanner.sizes[f"{_text(header, 'Rows')} × {_text(header, 'Columns')}"] += 1
        scanner.bits[_text(header, "BitsStored")] += 1
        if len(scanner.examples) < EXAMPLES:
            scanner.examples.append(path)

    def all(self) -> list[Scanner]:
        """Every scanner, the one with most images first."""
        return sorted(self._found.values(), key=lambda each: (-each.images, each.name))


def _text(header: Any, tag: str) -> str:
    try:
        return str(header.get(tag) or "").strip()[:64]
    except Exception:  # a value that pydicom reads only now, and cannot
        return ""
