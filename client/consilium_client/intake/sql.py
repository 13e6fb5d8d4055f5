"""Records and samples of a database become the two tables that a study reads, as Parquet files.

    records     patient, [record,] a column for each that is declared
    samples     patient, [record,] time, variable, value

Times are minutes since the record's start, so no date leaves the source but in a column that site.yaml names. Memory
holds the records and one batch of samples. Both tables appear whole or not at all; people have the same pseudonyms as
in the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from consilium_client.data.columns import plain, to_numbers
from consilium_client.data.identity import settle
from consilium_client.data.timeseries import moments
from consilium_client.data.units import check, factor
from consilium_client.intake import selects
from consilium_client.intake.database import Rows, opened
from consilium_client.intake.omop import Queries
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.selects import RecordsQuery, SamplesQuery, Source
from consilium_client.intake.sql_settings import SqlExport, TimeUnit, Variable
from consilium_client.intake.written import Reasons, whole
from consilium_shared.errors import ConfigurationError, DataError

_MINUTES = {"milliseconds": 1 / 60_000, "seconds": 1 / 60, "minutes": 1.0, "hours": 60.0, "days": 1440.0}
_MOST_RECORDS = 20_000_000


@dataclass(frozen=True)
class Imported:
    """Outcome of an export: rows of each table, and what was left out, by reason."""

    patients: int
    records: int
    samples: int
    aside: dict[str, int]


@dataclass(frozen=True)
class _Records:
    """Records as samples are linked to them; row i of each part belongs together."""

    table: pd.DataFrame
    keys: pd.Index
    start: pd.Series | None
    end: pd.Series | None


def import_tables(export: SqlExport, names: Pseudonyms, on_rows: Callable[[int], None] = lambda _: None) -> Imported:
    """Read a database and write its tables.

    Args:
        export: what is declared of it; paths are absolute.
        names: the site's new names.
        on_rows: told how many rows of samples have been read.

    Raises:
        ConfigurationError: what is declared is not there, a unit is none, or the tables cannot be written.
        TransportError: the server does not answer.
        DataError: a file that cannot be read, or no record.
    """
    for name, variable in export.variables.items():
        try:
            for unit in [*([variable.unit] if variable.unit else []), *variable.spellings.values()]:
                check(unit)
        except ValueError as error:
            raise ConfigurationError(f"site.yaml: {name}: {error}") from None
    aside = Reasons()
    with opened(export.source) as (rows, source):
        query, queries = _queries(export, source)
        found = _records(query, rows, names, aside)
        with whole(export.to) as file:
            pq.write_table(pa.Table.from_pandas(found.table, preserve_index=False), file)
            count = _write_samples(export, query, queries, found, rows, aside, on_rows)
    people = found.table["patient"].nunique()
    return Imported(int(people), len(found.table), count, {why: n for why, n in aside.items() if n})


def _queries(export: SqlExport, source: Source) -> tuple[RecordsQuery, list[SamplesQuery]]:
    if export.omop is not None:
        omop = Queries(export.omop, source)
        return omop.records(), omop.samples()
    assert export.records is not None  # noqa: S101  (the settings hold it)
    return selects.records(export.records, source), [selects.samples(each, source) for each in export.samples]


def _records(query: RecordsQuery, rows: Rows, names: Pseudonyms, aside: Reasons) -> _Records:
    batches, count = [], 0
    for batch in rows(query.statement):
        batches.append(batch)
        count += len(batch)
        if count > _MOST_RECORDS:
            raise DataError(f"more than {_MOST_RECORDS} records; give conditions under where")
    if not count:
        raise DataError("no row is a record; look at table, join and where of records")
    frame = pd.concat(batches, ignore_index=True).drop_duplicates(ignore_index=True)
    key = "record" if query.has_record else "patient"

    def drop(reason: str, hit: NDArray[np.bool_]) -> None:
        nonlocal frame
        if hit.any():
            aside[reason] += int(hit.sum())
            frame = frame[~hit].reset_index(drop=True)

    for column in dict.fromkeys(["patient", key]):
        frame[column], wrong = settle(frame[column].astype("string"))
        for why, hit in wrong.items():
            aside[f"record whose {column} is {why}"] += int(hit.sum())
        drop(f"record without a {column}", frame[column].isna().to_numpy(dtype=bool))
    drop(f"{key} that stands in several rows with different values", frame.duplicated(key, keep=False).to_numpy())
    if frame.empty:
        raise DataError("no record is left: each lacks its patient, or stands in several rows; look at join of records")
    with names.together():
        people = {word: names.patient(word) for word in frame["patient"].unique().tolist()}
    table = pd.DataFrame({"patient": frame["patient"].map(people).astype("string")})
    if query.has_record:
        table["record"] = frame["record"].map(names.record).astype("string")
    for name in query.columns:
        table[name] = frame[f"column {name}"].astype("string")
    order = table.sort_values(list(table.columns[:2]), kind="stable").index  # not as the source has them
    frame, table = frame.loc[order].reset_index(drop=True), table.loc[order].reset_index(drop=True)
    return _Records(
        table,
        pd.Index(frame[key].astype(object)),
        frame["start"] if query.has_start else None,
        frame["end"] if query.has_end else None,
    )


# -- samples


def _write_samples(
    export: SqlExport,
    query: RecordsQuery,
    queries: list[SamplesQuery],
    found: _Records,
    rows: Rows,
    aside: Reasons,
    on_rows: Callable[[int], None],
) -> int:
    if export.samples_to is None:
        return 0
    keys = ["patient", "record"] if query.has_record else ["patient"]
    schema = pa.schema(
        [
            *((key, pa.string()) for key in keys),
            ("time", pa.float64()),
            ("variable", pa.string()),
            ("value", pa.float64()),
        ]
    )
    count = read = 0
    with whole(export.samples_to) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for each in queries:
            linked = _Linked(found, each.time_unit, aside)
            for batch in rows(each.statement):
                for part in _parts(batch, each, linked, export.variables, aside):
                    columns = {key: found.table[key].iloc[part.record].reset_index(drop=True) for key in keys}
                    made = pd.DataFrame(
                        {**columns, "time": part.minutes, "variable": part.variable, "value": part.value}
                    )
                    writer.write_table(pa.Table.from_pandas(made, schema, preserve_index=False))
                    count += len(made)
                read += len(batch)
                on_rows(read)
    return count


@dataclass(frozen=True)
class _Part:
    """Samples of one batch; row i of each part belongs together."""

    record: NDArray[np.int64]
    minutes: NDArray[np.float64]
    variable: Any
    value: NDArray[np.float64]


class _Linked:
    """Records of samples, and the minutes since their start."""

    def __init__(self, found: _Records, unit: TimeUnit, aside: Reasons) -> None:
        self._found, self._unit, self._aside = found, unit, aside
        self._start = None if found.start is None else self._minutes(found.start)
        self._end = None if found.end is None else self._minutes(found.end)
        if self._start is not None and (lost := int(np.isnan(self._start[0]).sum())):
            aside["record without a start: none of its samples is used"] = lost

    def _minutes(self, column: pd.Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Minutes, NaN where there are none, and whether a moment says its zone."""
        if self._unit == "timestamp":
            seconds, zone = moments(column)
            return seconds / 60, zone != 0
        numbers, _ = to_numbers(column)
        return numbers * _MINUTES[self._unit], np.zeros(len(column), dtype=bool)

    def __call__(self, batch: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
        """Record of each sample, minutes since its start, and which samples are usable."""
        words, _ = settle(batch["record"].astype("string"))
        record = self._found.keys.get_indexer(pd.Index(words.astype(object))).astype(np.int64)
        known = record >= 0
        self._aside["sample of no record"] += int((~known).sum())
        minutes, zoned = self._minutes(batch["time"])
        at = np.maximum(record, 0)
        late = np.zeros(len(batch), dtype=bool)
        if self._end is not None:
            late = minutes > self._end[0][at]  # False where either is not known
        if self._start is not None:
            begin, begin_zoned = self._start
            early = minutes < begin[at] if self._end is not None else np.zeros(len(batch), dtype=bool)
            self._aside["sample outside its record's start and end"] += int((known & (early | late)).sum())
            late |= early
            apart = known & (zoned != begin_zoned[at]) & ~np.isnan(minutes)
            self._aside["sample or start has a zone, and the other has none"] += int(apart.sum())
            minutes = np.where(apart, np.nan, minutes - begin[at])
        timed = ~np.isnan(minutes)
        self._aside["sample without a time"] += int((known & ~timed).sum())
        return record, minutes, known & timed & ~late


def _parts(
    batch: pd.DataFrame, query: SamplesQuery, linked: _Linked, variables: dict[str, Variable], aside: Reasons
) -> Iterator[_Part]:
    record, minutes, usable = linked(batch)
    if query.items:
        items = plain(batch["item"].astype("string")).map(
            {_plain_word(word): name for word, name in query.items.items()}
        )
        groups = {
            name: ("value", (items == name).to_numpy(dtype=bool, na_value=False)) for name in set(query.items.values())
        }
    else:
        groups = {name: (column, np.ones(len(batch), dtype=bool)) for name, column in query.values.items()}
    for name, (column, of) in sorted(groups.items()):
        at = np.flatnonzero(usable & of)
        if not len(at):
            continue
        numbers, wrong = to_numbers(batch[column].iloc[at].astype("string"))
        aside[f"{name}: a value that is no number"] += int(wrong.sum())
        aside[f"{name}: no value"] += int((np.isnan(numbers) & ~wrong).sum())
        units = batch["unit"].iloc[at].astype("string").fillna("").str.strip() if query.has_unit else None
        numbers = _converted(name, numbers, units, variables.get(name), aside)
        kept = ~np.isnan(numbers)
        yield _Part(record[at][kept], minutes[at][kept], name, numbers[kept])


def _plain_word(word: str) -> str:
    """Item in the form in which ``7.0`` and ``7`` are the same."""
    return str(plain(pd.Series([word]))[0])


def _converted(
    name: str, numbers: NDArray[np.float64], units: pd.Series | None, variable: Variable | None, aside: Reasons
) -> NDArray[np.float64]:
    """Values in the declared unit, NaN where they cannot be; within the declared bounds."""
    if variable is None:
        return numbers
    if variable.unit is not None:
        written = pd.Series("", index=range(len(numbers))) if units is None else units.reset_index(drop=True)
        made = np.full(len(numbers), np.nan)
        for spelling in written.unique().tolist():
            of = (written == spelling).to_numpy(dtype=bool) & ~np.isnan(numbers)
            try:
                unit = variable.spellings.get(spelling, spelling)
                scale, offset = factor(unit, variable.unit, variable.molar_mass)
            except DataError as error:
                aside[f"{name}: {error}"] += int(of.sum())
                continue
            made[of] = scale * numbers[of] + offset
        numbers = made
    low = -np.inf if variable.low is None else variable.low
    high = np.inf if variable.high is None else variable.high
    outside = (numbers < low) | (numbers > high)
    aside[f"{name}: outside low … high"] += int(outside.sum())
    return np.where(outside, np.nan, numbers)
