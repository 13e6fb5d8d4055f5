"""Irregular series as regular bins: for each variable its value, a mask, and the time since its last sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import TimeseriesAsset
from consilium_client.data.batches import read_batches
from consilium_client.data.columns import place, plain, to_numbers
from consilium_client.data.dataset import ArrayDataset, Dataset, check_size
from consilium_client.data.features import columns_of, encode, number, scale
from consilium_client.data.identity import alike, settle, strangers
from consilium_client.data.labels import LabelRows, number_rows, read_labels
from consilium_client.data.report import NothingUsable, Report, SetAside, Values
from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.inputs import Numeric, Series
from consilium_shared.study import Study

_MINUTES = {"seconds": 1 / 60, "minutes": 1.0, "hours": 60.0, "days": 1440.0}
_NEVER = np.int64(-1)
_EDGE = 1e-4  # of a step
_NONE, _UTC, _OTHER = 0, 1, 2  # the zone of a moment
_FIRST, _LAST = pd.Timestamp("1678-01-01", tz="UTC"), pd.Timestamp("2262-01-01", tz="UTC")
_ZONE = r"[0-9T ][0-9]{2}:?[0-9]{2}(?::?[0-9]{2}(?:[.,][0-9]+)?)?\s*([Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)$"


def load_timeseries(asset: TimeseriesAsset, study: Study, on_progress: Callable[[int, int], None]) -> Dataset:
    """Data set of a table of samples and its label table; see ``data.load``."""
    reading = task.reads(study)
    series = reading.series
    if series is None:
        raise DataError(f"study {study.study} has no series")
    aside, values, notes = SetAside(), Values(), SetAside()
    rows = _label_rows(asset, study, series, aside, notes, values)
    check_size(len(rows), series.bins * series.inputs + series.statics_width)
    statics, absent = encode(rows.frame, series.statics, asset, values, asset.table)
    missing = {feature.name: int(n) for feature, n in zip(series.statics, absent.sum(axis=0), strict=True)}
    refused = absent.any(axis=1) & (reading.missing == "refuse")

    grid, unknown = _Grid(asset, series, rows, values, notes), _Unknown()
    for samples in _batches(asset, series, notes, on_progress):
        grid.add(samples, _link(samples, asset, rows, aside, notes, unknown))
    inputs, sampled = grid.inputs(missing)

    unsampled = {
        f"{asset.start}: missing or not a moment": grid.startless,
        "no sample in the series table": ~grid.startless & ~grid.linked,
    }
    unsampled["no usable sample in the study's window"] = ~sampled & ~np.any(list(unsampled.values()), axis=0)
    for reason, lost in unsampled.items():
        _set_aside(aside, reason, lost, asset, rows)
    _set_aside(aside, "a static value is missing (the study refuses such records)", sampled & refused, asset, rows)
    keep = sampled & ~refused
    report = Report(aside, values, notes, missing, len(rows))
    if not keep.any():
        raise NothingUsable(f"{asset.series}: no usable record", report)
    rows = rows.take(keep)
    patients, train, validation = number_rows(rows)
    taken = (inputs if keep.all() else inputs[keep], *([statics[keep]] if series.statics else []))
    made = ArrayDataset.of(taken, rows.targets, patients, train, report, validation)
    return replace(made, groups=rows.groups)


def _set_aside(aside: SetAside, reason: str, lost: NDArray[np.bool_], asset: TimeseriesAsset, rows: LabelRows) -> None:
    if lost.any():
        aside.add(reason, int(lost.sum()), place(asset.table, rows.frame.index[lost]))


class _Grid:
    """Samples of all records, added up in the cells of records and bins as they come."""

    def __init__(
        self, asset: TimeseriesAsset, series: Series, rows: LabelRows, values: Values, notes: SetAside
    ) -> None:
        self._asset, self._series, self._values, self._notes = asset, series, values, notes
        self._shape, cells = (len(rows), series.bins), len(rows) * series.bins
        self._total = [np.zeros(cells) for _ in series.variables]
        self._count = [np.zeros(cells, dtype=np.int32) for _ in series.variables]
        self._names = dict[str, None]()
        self._start: tuple[NDArray[np.float64], NDArray[np.int8]] | None = None
        self.linked, self.startless = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
        if asset.time_unit == "timestamp":
            self._start = moments(rows.frame[str(asset.start)])
            values.profile.moments(str(asset.start), self._start[0])
            self.startless = np.isnan(self._start[0])

    def add(self, samples: pd.DataFrame, record: NDArray[np.int64]) -> None:
        """Add samples in the file's order; ``record``: int64 ``[n]``, the record of each, -1 where it has none."""
        asset = self._asset
        self.linked[record[record >= 0]] = True
        minutes = _minutes(samples, asset, self._start, record, self._values, self._notes)
        bin_, in_window = _bins(samples, asset, self._series, minutes, record, self._values)
        if asset.layout == "long":
            self._names.update(dict.fromkeys(samples[asset.variable].dropna().unique().tolist()))
            _note_spellings(samples, asset, self._series, self._notes)
        usable = (record >= 0) & in_window
        for slot, (variable, at) in enumerate(_samples_of(samples, asset, self._series, usable)):
            column = asset.value if asset.layout == "long" else asset.here(variable.name)
            numbers = number(variable, samples[column].iloc[at], asset, self._values, asset.series, samples.index[at])
            scaled = scale(variable, numbers, self._values, asset.series, samples.index[at])
            kept = ~np.isnan(scaled)
            cell = record[at][kept] * self._series.bins + bin_[at][kept]
            # One after the other as they stand in the file: where a batch ends changes no bit of a sum.
            np.add.at(self._total[slot], cell, scaled[kept])
            np.add.at(self._count[slot], cell, 1)

    def inputs(self, missing: dict[str, int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Inputs float32 ``[records, bins, 3 V]``, and bool ``[records]``, those that have a sample.

        ``missing`` is told how many records lack each variable. What was added up is freed on the way.
        """
        variables = self._series.variables
        if self._asset.layout == "long":
            _note_absent(list(self._names), self._asset, self._series, self._notes)
        inputs = np.zeros((*self._shape, self._series.inputs), dtype=np.float32)
        sampled = np.zeros(self._shape[0], dtype=bool)
        for slot, variable in enumerate(variables):
            parts = fill(self._total[slot].reshape(self._shape), self._count[slot].reshape(self._shape))
            self._total[slot], self._count[slot] = np.zeros(0), np.zeros(0, dtype=np.int32)
            for block, part in enumerate(parts):
                inputs[:, :, block * len(variables) + slot] = part
            with_sample = parts[1].any(axis=1)
            missing[variable.name] = int(np.count_nonzero(~with_sample))
            sampled |= with_sample
        return inputs, sampled


def fill(
    total: NDArray[np.float64], count: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Samples of one variable on the grid of records and bins.

    Args:
        total: float64 ``[records, bins]``, sum of the scaled values in each bin.
        count: int32 ``[records, bins]``, their number.

    Returns:
        three arrays ``[records, bins]``: the mean of the bin's samples, or the last bin's that had one, or 0 (the
        study's center) before the first; whether the bin has a sample; and the time since the last bin with a sample
        as a fraction of the whole window, 0 in a bin with one, 1 before the first.
    """
    bins = count.shape[1]
    mask = count > 0
    last = np.maximum.accumulate(np.where(mask, np.arange(bins), _NEVER), axis=1)
    mean = np.divide(total, count, out=np.zeros(count.shape), where=mask)
    held = np.take_along_axis(mean, np.maximum(last, 0), axis=1)
    gap = np.where(last == _NEVER, 1.0, (np.arange(bins) - last) / bins)
    return np.where(last == _NEVER, 0.0, held), mask, gap


def _label_rows(
    asset: TimeseriesAsset, study: Study, series: Series, aside: SetAside, notes: SetAside, values: Values
) -> LabelRows:
    text, numbers = columns_of(series.statics, asset)
    # A record's name belongs to its patient: with the patient in the key nobody's row can push out another's.
    key = [asset.patient] if asset.record is None else [asset.patient, asset.record]
    if asset.start is not None:
        text = [*text, asset.start]
    return read_labels(asset.table, asset, study, aside, notes, values, key=key, text=text, numbers=numbers)


def _batches(
    asset: TimeseriesAsset, series: Series, notes: SetAside, on_progress: Callable[[int, int], None]
) -> Iterator[pd.DataFrame]:
    """Batches of the series table, with the columns that the study needs."""
    text = [asset.patient] if asset.record is None else [asset.patient, asset.record]
    timed = asset.time_unit != "timestamp"
    if asset.layout == "long":
        text, numbers = [*text, asset.variable], [asset.value]
    else:
        numbers = [asset.here(variable.name) for variable in series.variables]
    if timed:
        numbers = [asset.time, *numbers]
    else:
        text = [*text, asset.time]
    for samples in read_batches(asset.series, text, numbers, notes, on_progress, asset.csv):
        if asset.layout == "long":
            samples[asset.variable] = plain(samples[asset.variable])
        yield samples


@dataclass
class _Unknown:
    """Records of the series table that no label row names, over all batches: each counts once."""

    records: set[tuple[str, ...]] = field(default_factory=set)
    words: dict[str, set[str]] = field(default_factory=dict)


def _link(
    samples: pd.DataFrame,
    asset: TimeseriesAsset,
    rows: LabelRows,
    aside: SetAside,
    notes: SetAside,
    before: _Unknown,
) -> NDArray[np.int64]:
    """Record of each sample, as the position of its label row; -1 for samples without one."""
    keys = [asset.patient] if asset.record is None else [asset.patient, asset.record]
    unknown = samples[keys].isna().any(axis=1).to_numpy(dtype=bool)
    _count(aside, "sample without a patient or record", unknown, asset, samples)
    for key in keys:
        samples[key], wrong = settle(samples[key])
        for why, hit in wrong.items():
            _count(aside, f"sample whose {key} is {why}", hit & ~unknown, asset, samples)
            unknown = unknown | hit
    # One factorisation over both tables gives both sides the same codes, at the speed of a hash table.
    codes = np.zeros(len(samples) + len(rows), dtype=np.int64)
    for key in keys:
        words = pd.concat([samples[key], rows.frame[key]], ignore_index=True)
        part, names = pd.factorize(words)
        codes, _ = pd.factorize(codes * (len(names) + 1) + part + 1)
    code, label_code = codes[: len(samples)], codes[len(samples) :]
    position = np.full(int(codes.max()) + 1, -1, dtype=np.int64)
    position[label_code] = np.arange(len(rows))
    record = np.where(unknown, -1, position[code])
    lost = (record < 0) & ~unknown
    _, first = np.unique(code[lost], return_index=True)
    at = np.sort(np.flatnonzero(lost)[first])
    lost_records = list(zip(*(samples[key].iloc[at] for key in keys), strict=True))
    fresh = at[[each not in before.records for each in lost_records]] if lost_records else at
    before.records.update(lost_records)
    places = samples.index[fresh]
    aside.add("series record without a usable label row", len(fresh), place(asset.series, places) if len(fresh) else "")
    for key in keys:
        words, known = samples[key].iloc[fresh], before.words.setdefault(key, set())
        words = words[~words.isin(known)]
        known.update(words)
        _note_strangers(words, key, rows.frame[key], asset, notes)
    return record


def _note_strangers(words: pd.Series, key: str, known: pd.Series, asset: TimeseriesAsset, notes: SetAside) -> None:
    found = strangers(words.unique().tolist(), known.tolist())
    if found:
        where = words.index[words.isin(found) & ~words.duplicated()]
        what = f"{key}s of {asset.series.name} that would match the label table without leading zeros, case or blanks"
        notes.add(what, len(found), place(asset.series, where))


def _count(aside: SetAside, reason: str, hit: NDArray[np.bool_], asset: TimeseriesAsset, samples: pd.DataFrame) -> None:
    if hit.any():
        aside.add(reason, int(hit.sum()), place(asset.series, samples.index[hit]))


def _minutes(
    samples: pd.DataFrame,
    asset: TimeseriesAsset,
    starts: tuple[NDArray[np.float64], NDArray[np.int8]] | None,
    record: NDArray[np.int64],
    values: Values,
    notes: SetAside,
) -> NDArray[np.float64]:
    """Minutes of each sample since its record's start, NaN where unknown; ``starts``: ``moments`` of the records."""
    known = record >= 0
    if starts is not None:
        start, start_zone = starts
        moment, zone = moments(samples[asset.time])
        values.profile.moments(asset.time, moment)
        known &= ~np.isnan(start)[np.maximum(record, 0)]
        minutes = (moment - start[np.maximum(record, 0)]) / 60.0
        wrong = np.isnan(moment)
        of_start = start_zone[np.maximum(record, 0)]
        # Without a zone a moment counts as UTC; beside one of another zone nobody knows how far apart the two are.
        apart = known & ~wrong & ((zone == _OTHER) & (of_start == _NONE) | (zone == _NONE) & (of_start == _OTHER))
        _count(values, "time: one of time and start has a zone, the other has none", apart, asset, samples)
        minutes[apart] = np.nan
        mixed = known & ~wrong & ~apart & ((zone == _NONE) != (of_start == _NONE))
        _count(
            notes,
            "time: one of time and start is in UTC, the other without a zone: taken as UTC",
            mixed,
            asset,
            samples,
        )
    else:
        numbers, _ = to_numbers(samples[asset.time])
        minutes, wrong = numbers * _MINUTES[asset.time_unit], np.isnan(numbers)
    _count(values, "time: missing or not a time", wrong & known, asset, samples)
    return minutes


def _bins(
    samples: pd.DataFrame,
    asset: TimeseriesAsset,
    series: Series,
    minutes: NDArray[np.float64],
    record: NDArray[np.int64],
    values: SetAside,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Bin of each sample, and a mask of the samples inside the study's window."""
    timed = ~np.isnan(minutes)
    # Moments such as 3/180 s, rounded to float32, must not fall below the edge of their own bin.
    position = np.floor(np.nan_to_num(minutes, nan=-1.0) / series.step_minutes + _EDGE)
    inside = (position >= 0) & (position < series.bins) & timed
    _count(values, "time: outside the study's window", ~inside & timed & (record >= 0), asset, samples)
    return np.where(inside, position, 0).astype(np.int64), inside


def moments(column: pd.Series) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Seconds since 1970 of ISO 8601 moments, NaN for other text; and the zone that each gives: none, UTC, another.

    Each by itself: pandas takes a unit for the whole column, by its finest moment, and what fits into nanoseconds (the
    years 1678 to 2261) fits into every unit. Another is none, whatever the others are.
    """
    moments = pd.to_datetime(column, errors="coerce", format="ISO8601", utc=True)
    moments = moments.where(moments.between(_FIRST, _LAST)).dt.as_unit("ns")
    since = (moments - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    zone = column.astype("string").str.extract(_ZONE, expand=False)
    utc = zone.isin(["Z", "z"]) | zone.str.fullmatch(r"[+-]00(?::?00)?").fillna(False)
    kind = np.where(zone.isna(), _NONE, np.where(utc.to_numpy(dtype=bool), _UTC, _OTHER)).astype(np.int8)
    return np.asarray(since.to_numpy(dtype=np.float64, na_value=np.nan), dtype=np.float64), kind


def _note_absent(present: list[str], asset: TimeseriesAsset, series: Series, notes: SetAside) -> None:
    """Counts the study's variables that no row of a long table names; ``present``: those that some row names.

    A spelling is like the study's own name: it may stand in a note, which is part of an error's text.
    """
    for name in _own_names(asset, series):
        close = [word for word in present if word != name and alike(word) == alike(name)]
        if name not in present:
            meant = f"; did you mean {close[0]!r}?" if close else ""
            notes.add(f"no row of {asset.series.name} has the variable {name!r}{meant}")


def _note_spellings(samples: pd.DataFrame, asset: TimeseriesAsset, series: Series, notes: SetAside) -> None:
    """Counts rows of a long table that name a variable in another spelling than the study's."""
    written = samples[asset.variable]
    present = written.dropna().unique().tolist()
    for name in _own_names(asset, series):
        for word in (word for word in present if word != name and alike(word) == alike(name)):
            hit = (written == word).fillna(False).to_numpy(dtype=bool)
            _count(notes, f"rows with the variable {word!r}, which is not {name!r}: not read", hit, asset, samples)


def _own_names(asset: TimeseriesAsset, series: Series) -> pd.Series:
    return plain(pd.Series([asset.here(variable.name) for variable in series.variables]))


def _samples_of(
    samples: pd.DataFrame, asset: TimeseriesAsset, series: Series, usable: NDArray[np.bool_]
) -> Iterator[tuple[Numeric, NDArray[np.int64]]]:
    """The study's variables in turn, each with the positions of its usable samples."""
    rows = np.flatnonzero(usable)
    if asset.layout == "wide":
        for variable in series.variables:
            yield variable, rows
        return
    names = pd.Index(_own_names(asset, series).astype(object))
    code = names.get_indexer(pd.Index(samples[asset.variable].iloc[rows].astype(object)))
    order = np.argsort(code, kind="stable")
    edges = np.searchsorted(code[order], np.arange(len(names) + 1))
    for slot, variable in enumerate(series.variables):
        yield variable, rows[order[edges[slot] : edges[slot + 1]]]
