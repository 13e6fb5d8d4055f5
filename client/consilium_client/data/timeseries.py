"""Irregular series as regular bins: for each variable its value, a mask, and the time since its last sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import TimeseriesAsset
from consilium_client.data.columns import place, plain, read_columns, to_numbers
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

    samples = _read_samples(asset, series, notes, lambda done, total: on_progress(done, 2 * total))
    record = _link(samples, asset, rows, aside, notes)
    minutes, startless = _minutes(samples, asset, rows, record, values, notes)
    bin_, in_window = _bins(samples, asset, series, minutes, record, values)
    _note_absent(samples, asset, series, notes)
    usable = (record >= 0) & in_window
    inputs = np.zeros((len(rows), series.bins, series.inputs), dtype=np.float32)
    sampled = np.zeros(len(rows), dtype=bool)
    for slot, (variable, at) in enumerate(_samples_of(samples, asset, series, usable)):
        column = asset.value if asset.layout == "long" else asset.here(variable.name)
        numbers = number(variable, samples[column].iloc[at], asset, values, asset.series, samples.index[at])
        scaled = scale(variable, numbers, values, asset.series, samples.index[at])
        kept = ~np.isnan(scaled)
        value, mask, gap = fill(record[at][kept], bin_[at][kept], scaled[kept], len(rows), series.bins)
        for block, part in enumerate((value, mask, gap)):
            inputs[:, :, block * len(series.variables) + slot] = part
        with_sample = mask.any(axis=1)
        missing[variable.name] = int(np.count_nonzero(~with_sample))
        sampled |= with_sample
        on_progress(len(series.variables) + slot + 1, 2 * len(series.variables))

    unsampled = {
        f"{asset.start}: missing or not a moment": startless,
        "no sample in the series table": ~startless & ~np.isin(np.arange(len(rows)), record),
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
    patients, train = number_rows(rows)
    return ArrayDataset.of(
        (inputs if keep.all() else inputs[keep], *([statics[keep]] if series.statics else [])),
        rows.targets,
        patients,
        train,
        report,
    )


def _set_aside(aside: SetAside, reason: str, lost: NDArray[np.bool_], asset: TimeseriesAsset, rows: LabelRows) -> None:
    if lost.any():
        aside.add(reason, int(lost.sum()), place(asset.table, rows.frame.index[lost]))


def fill(
    record: NDArray[np.int64], bin_: NDArray[np.int64], value: NDArray[np.float64], records: int, bins: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Samples of one variable on the grid of records and bins.

    Args:
        record: int64 ``[n]``, record of each sample.
        bin_: int64 ``[n]``, its bin.
        value: float64 ``[n]``, its scaled value, finite.
        records: number of records.
        bins: number of bins.

    Returns:
        three arrays ``[records, bins]``: the mean of the bin's samples, or the last bin's that had one, or 0 (the
        study's center) before the first; whether the bin has a sample; and the time since the last bin with a sample
        as a fraction of the whole window, 0 in a bin with one, 1 before the first.
    """
    cell = record * bins + bin_
    count = np.bincount(cell, minlength=records * bins).reshape(records, bins)
    total = np.bincount(cell, weights=value, minlength=records * bins).reshape(records, bins)
    mask = count > 0
    last = np.maximum.accumulate(np.where(mask, np.arange(bins), _NEVER), axis=1)
    mean = np.divide(total, count, out=np.zeros((records, bins)), where=mask)
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


def _read_samples(
    asset: TimeseriesAsset, series: Series, notes: SetAside, on_progress: Callable[[int, int], None]
) -> pd.DataFrame:
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
    samples = read_columns(asset.series, text, numbers, notes, on_progress, asset.csv)
    if asset.layout == "long":
        samples[asset.variable] = plain(samples[asset.variable])
    return samples


def _link(
    samples: pd.DataFrame, asset: TimeseriesAsset, rows: LabelRows, aside: SetAside, notes: SetAside
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
    places = samples.index[np.sort(np.flatnonzero(lost)[first])]
    aside.add("series record without a usable label row", len(first), place(asset.series, places) if len(first) else "")
    for key in keys:
        _note_strangers(samples[key][lost], key, rows.frame[key], asset, notes)
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
    rows: LabelRows,
    record: NDArray[np.int64],
    values: Values,
    notes: SetAside,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Minutes of each sample since its record's start, NaN where unknown; and which records have no start."""
    known = record >= 0
    startless = np.zeros(len(rows), dtype=bool)
    if asset.time_unit == "timestamp":
        start, start_zone = _moments(rows.frame[str(asset.start)])
        moment, zone = _moments(samples[asset.time])
        values.profile.moments(str(asset.start), start)
        values.profile.moments(asset.time, moment)
        startless = np.isnan(start)
        known &= ~startless[np.maximum(record, 0)]
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
    return minutes, startless


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


def _moments(column: pd.Series) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
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


def _note_absent(samples: pd.DataFrame, asset: TimeseriesAsset, series: Series, notes: SetAside) -> None:
    """Counts the study's variables that no row of a long table names, and rows that name one in another spelling.

    A spelling is like the study's own name: it may stand in a note, which is part of an error's text.
    """
    if asset.layout == "wide":
        return
    written = samples[asset.variable]
    present = written.dropna().unique().tolist()
    for name in plain(pd.Series([asset.here(variable.name) for variable in series.variables])):
        close = [word for word in present if word != name and alike(word) == alike(name)]
        if name not in present:
            meant = f"; did you mean {close[0]!r}?" if close else ""
            notes.add(f"no row of {asset.series.name} has the variable {name!r}{meant}")
        for word in close:
            hit = (written == word).fillna(False).to_numpy(dtype=bool)
            _count(notes, f"rows with the variable {word!r}, which is not {name!r}: not read", hit, asset, samples)


def _samples_of(
    samples: pd.DataFrame, asset: TimeseriesAsset, series: Series, usable: NDArray[np.bool_]
) -> Iterator[tuple[Numeric, NDArray[np.int64]]]:
    """The study's variables in turn, each with the positions of its usable samples."""
    rows = np.flatnonzero(usable)
    if asset.layout == "wide":
        for variable in series.variables:
            yield variable, rows
        return
    names = pd.Index(plain(pd.Series([asset.here(variable.name) for variable in series.variables])).astype(object))
    code = names.get_indexer(pd.Index(samples[asset.variable].iloc[rows].astype(object)))
    order = np.argsort(code, kind="stable")
    edges = np.searchsorted(code[order], np.arange(len(names) + 1))
    for slot, variable in enumerate(series.variables):
        yield variable, rows[order[edges[slot] : edges[slot + 1]]]
