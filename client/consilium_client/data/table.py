"""A table with a row a record, prepared for a tabular study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from consilium_client.data.asset import TableAsset
from consilium_client.data.columns import place
from consilium_client.data.dataset import ArrayDataset, Dataset, check_size
from consilium_client.data.features import columns_of, encode
from consilium_client.data.labels import number_rows, read_labels
from consilium_client.data.report import NothingUsable, Report, SetAside, Values
from consilium_shared import task
from consilium_shared.inputs import width
from consilium_shared.study import Study


def load_table(asset: TableAsset, study: Study, on_progress: Callable[[int, int], None]) -> Dataset:
    """Data set of a CSV or Parquet table; see ``data.load``."""
    reading = task.reads(study)
    features = reading.features
    aside, values, notes = SetAside(), Values(), SetAside()
    text, numbers = columns_of(features, asset)
    key = None if asset.record is None else [asset.patient, asset.record]
    rows = read_labels(
        asset.path, asset, study, aside, notes, values, key=key, text=text, numbers=numbers, on_progress=on_progress
    )
    check_size(len(rows), width(features))
    inputs, missing = encode(rows.frame, features, asset, values, asset.path)
    counts = {feature.name: int(count) for feature, count in zip(features, missing.sum(axis=0), strict=True)}
    report = Report(aside, values, notes, counts, len(rows))
    if reading.missing == "refuse":
        keep = np.asarray(~missing.any(axis=1))
        lacking = rows.frame.index[~keep]
        aside.add("a value is missing (the study refuses such records)", len(lacking), place(asset.path, lacking))
        rows, inputs = rows.take(keep), inputs[keep]
    if not len(rows):
        raise NothingUsable(f"{asset.path}: no usable record", report)
    patients, train, validation = number_rows(rows)
    on_progress(len(rows), len(rows))
    made = ArrayDataset.of((inputs,), rows.targets, patients, train, report, validation)
    return replace(made, groups=rows.groups)
