"""The list of studies to pull: a CSV file of a person's."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from consilium_shared.config import read_text
from consilium_shared.errors import ConfigurationError

MOST = 1_000_000
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_COLUMNS = {
    "study": ("study", "studyinstanceuid", "study_instance_uid", "study instance uid"),
    "accession": ("accession", "accessionnumber", "accession_number", "accession number"),
}


@dataclass(frozen=True)
class Wanted:
    """One study of the list: named by its UID or by its accession number."""

    study: str = ""
    accession: str = ""

    @property
    def name(self) -> str:
        """The study as the list names it."""
        return self.study or self.accession


def read(path: Path) -> list[Wanted]:
    """The studies of a list, each once, in the list's order.

    The header names a column ``study`` (study instance UIDs) or ``accession`` (accession numbers), or both; then the
    UID counts where there is one. Other columns are left alone.

    Raises:
        ConfigurationError: no such file or column, or a line that names no study, with its number.
    """
    rows = csv.reader(read_text(path).removeprefix("\ufeff").splitlines(), strict=True)
    try:
        header = [word.strip().casefold() for word in next(rows, [])]
        places = {kind: next((header.index(name) for name in names if name in header), None)
                  for kind, names in _COLUMNS.items()}  # fmt: skip
        if not any(place is not None for place in places.values()):
            raise ConfigurationError(f"{path}:1: the header has neither a column 'study' nor 'accession'")
        found: dict[Wanted, None] = {}
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            values = {
                kind: row[place].strip() if place is not None and place < len(row) else ""
                for kind, place in places.items()
            }
            found[_wanted(values["study"], values["accession"], f"{path}:{rows.line_num}")] = None
    except csv.Error as error:
        raise ConfigurationError(f"{path}:{rows.line_num}: {error}") from error
    if not found:
        raise ConfigurationError(f"{path} names no study")
    if len(found) > MOST:
        raise ConfigurationError(f"{path} names more than {MOST} studies; divide it")
    return list(found)


def _wanted(study: str, accession: str, where: str) -> Wanted:
    if study:
        if len(study) > 64 or not _UID.fullmatch(study):
            raise ConfigurationError(f"{where}: the study is no UID")
        return Wanted(study=study)
    if not accession:
        raise ConfigurationError(f"{where}: neither a study nor an accession number")
    if len(accession) > 16 or any(each in accession for each in "*?\\"):
        # An archive would take them for a pattern or a list, and give studies that nobody asked for.
        raise ConfigurationError(f"{where}: no accession number: at most 16 characters, without * ? and \\")
    return Wanted(accession=accession)
