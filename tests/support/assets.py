"""Assets that suit a study, written from what its task reads: nobody's patients, whole or damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consilium_client.data.asset import AssetSpec, DicomAsset, PicturesAsset, TableAsset, TimeseriesAsset
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared import task
from consilium_shared.inputs import Categorical, Feature, Label, Numeric
from consilium_shared.study import Study


def value(column: Feature | Label, draw: np.random.Generator) -> Any:
    """One cell of a column."""
    if isinstance(column, Label):
        return column.classes[int(draw.integers(len(column.classes)))]
    if isinstance(column, Categorical):
        return column.categories[int(draw.integers(len(column.categories)))]
    low = column.center - column.scale if column.low is None else column.low
    high = low + 2 * column.scale if column.high is None else column.high
    return round(float(draw.uniform(low, min(high, low + 2 * column.scale))), 3)


def label_table(study: Study, patients: int, draw: np.random.Generator) -> pd.DataFrame:
    """A row for each patient, with every column that the study reads of a label table."""
    reading = task.reads(study)
    columns: dict[str, Feature | Label] = dict(zip(reading.columns, reading.targets, strict=True))
    columns |= {each.name: each for each in (*reading.features, *(reading.series.statics if reading.series else ()))}
    rows = [
        {"patient": f"P{number:04d}", **{n: value(c, draw) for n, c in columns.items()}} for number in range(patients)
    ]
    return pd.DataFrame(rows)


def write(study: Study, folder: Path, patients: int = 60, seed: int = 0) -> AssetSpec:
    """Files of an asset of the kind that the study needs; returns where they lie."""
    reading, draw, table = task.reads(study), np.random.default_rng(seed), folder / "table.csv"
    folder.mkdir(parents=True, exist_ok=True)
    rows = label_table(study, patients, draw)
    rows.to_csv(table, index=False)
    if reading.kind == "table":
        return TableAsset(kind="table", path=table)
    if reading.kind == "dicom":
        (folder / "images").mkdir(exist_ok=True)
        for patient in rows["patient"]:
            write_radiograph(folder / "images" / f"{patient}.dcm", draw.random((24, 24)), patient, patient, Scanner(8))
        return DicomAsset(kind="dicom", path=folder / "images", table=table)
    assert reading.kind == "timeseries"
    assert reading.series is not None
    window = reading.series.bins * reading.series.step_minutes
    samples = [
        {"patient": p, "time": float(t), "variable": v.name, "value": value(Numeric(**v.model_dump()), draw)}
        for p in rows["patient"]
        for v in reading.series.variables
        for t in np.sort(draw.uniform(0, window, 4)).round(1)
    ]
    pd.DataFrame(samples).to_csv(folder / "samples.csv", index=False)
    return TimeseriesAsset(kind="timeseries", series=folder / "samples.csv", table=table)


def tables(asset: AssetSpec) -> list[Path]:
    """The asset's tables."""
    if isinstance(asset, TableAsset):
        return [asset.path]
    assert not isinstance(asset, PicturesAsset)
    return [asset.table, *([asset.series] if isinstance(asset, TimeseriesAsset) else [])]
