"""Label tables rewritten with the same pseudonyms, UIDs and shifted dates as the images."""

from __future__ import annotations

import csv
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import LabelTable
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.files import put_in_place

_NUMBERS = {
    ".": re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)?(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?(?<=[0-9])"),
    ",": re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(\.[0-9]{3})+)?(,[0-9]+)?([eE][+-]?[0-9]{1,3})?(?<=[0-9])"),
}


def rename(table: LabelTable, names: Pseudonyms) -> Counter[str]:
    """Write a table anew: pseudonyms, new UIDs, shifted dates, the columns that stay; all else is left out.

    Args:
        table: from where, to where, and what each column is; paths are absolute.
        names: the site's new names.

    Returns:
        how many rows were written (``done``), and left out by reason.

    Raises:
        ConfigurationError: a file or a column is not there, or the table cannot be written.
        DataError: a row has more or fewer fields than the header, or a quotation mark is not closed.
    """
    counts: Counter[str] = Counter()
    chosen = [table.patient, *table.uids, *table.dates, *table.numbers, *table.keep]
    double = next((name for name, count in Counter(chosen).items() if count > 1), None)
    if double is not None:
        raise ConfigurationError(f"{table.source}: column {double!r} cannot be two things at once")
    try:
        table.to.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=table.to.parent, prefix=f".{table.to.name}.")
        temporary = Path(name)
    except OSError as error:
        raise ConfigurationError(f"cannot write {table.to}: {error.strerror}") from error
    try:
        encoding = "utf-8-sig" if table.encoding == "utf-8" else table.encoding
        with table.source.open(encoding=encoding, newline="") as source, os.fdopen(fd, "w+b") as target:
            rows = csv.reader(source, delimiter=table.delimiter, strict=True)
            header = next(rows, [])
            missing = [name for name in chosen if name not in header]
            if missing:
                raise ConfigurationError(f"{table.source}: no column {missing[0]!r}; there are {', '.join(header)}")
            places = [header.index(name) for name in chosen]
            target.write(_line(chosen))
            for row in rows:
                if len(row) != len(header):
                    raise DataError(
                        f"{table.source}:{rows.line_num}: {len(row)} fields where the header has {len(header)}"
                    )
                try:
                    target.write(_line(_renamed([row[place] for place in places], table, names, counts)))
                except DataError as error:
                    counts[str(error)] += 1
                else:
                    counts["done"] += 1
            put_in_place(target, temporary, table.to)
    except OSError as error:
        raise ConfigurationError(f"cannot read {table.source}: {error.strerror}") from error
    except UnicodeError as error:
        raise ConfigurationError(f"{table.source} is not text in {table.encoding}; declare its encoding") from error
    except csv.Error as error:
        raise DataError(f"{table.source}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _renamed(row: list[str], table: LabelTable, names: Pseudonyms, counts: Counter[str]) -> list[str]:
    pseudonym = names.patient(row[0])
    dates = 1 + len(table.uids)
    numbers = dates + len(table.dates)
    keep = numbers + len(table.numbers)
    return [
        pseudonym,
        *(names.uid(uid.strip()) if uid.strip() else "" for uid in row[1:dates]),
        *(names.date(pseudonym, date.strip()) if date.strip() else "" for date in row[dates:numbers]),
        *(_number(cell, table.decimal, counts) for cell in row[numbers:keep]),
        *row[keep:],
    ]


def _number(cell: str, decimal: str, counts: Counter[str]) -> str:
    """A number with a point as its decimal mark; nothing where there is none."""
    word = cell.strip().replace("\u00a0", "").replace(" ", "")
    if not word:
        return ""
    if not _NUMBERS[decimal].fullmatch(word):
        counts["value that is no number, left empty"] += 1
        return ""
    return word.replace("," if decimal == "." else ".", "").replace(",", ".")


def _line(cells: list[str]) -> bytes:
    quoted = ('"' + cell.replace('"', '""') + '"' if any(each in cell for each in ',"\r\n') else cell for cell in cells)
    return (",".join(quoted) + "\n").encode()
