"""A folder of PNG, JPEG and TIFF files, or of NIfTI volumes: a label table or their own paths say whose each is."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from consilium_client.data.asset import PicturesAsset
from consilium_client.data.dataset import Dataset
from consilium_client.data.folder import files
from consilium_client.data.labels import read_labels
from consilium_client.data.layout import ENDINGS, VOLUMES, layout_pattern
from consilium_client.data.recipes import FILE
from consilium_client.data.report import Report, SetAside, Values
from consilium_client.data.sources import Gathered, gather, where
from consilium_client.prepared.recipe import Source
from consilium_client.prepared.store import AssetFolder
from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.study import Study

_FILE = "file"


def load_pictures(
    asset: PicturesAsset, study: Study, on_progress: Callable[[int, int], None], store: AssetFolder | None = None
) -> Dataset:
    """Data set of a folder of picture files; see ``data.load``."""
    image = task.reads(study).image
    if image is None:
        raise DataError(f"study {study.study} has no images")
    if image.modality and asset.modality not in image.modality:
        raise DataError(
            f"study {study.study} takes pictures of modality {', '.join(image.modality)}, and the asset says "
            f"{asset.modality or 'none'}: PNG, JPEG, TIFF and NIfTI files do not tell it (modality: of the asset)"
        )
    if image.select is not None:
        raise DataError(f"study {study.study} selects by tags of DICOM files; these pictures have none")
    aside, values, notes = SetAside(), Values(), SetAside()
    endings = ENDINGS if image.depth is None else VOLUMES
    found = files(asset.path, aside, lambda path: path != asset.table and path.name.lower().endswith(endings))
    link = asset.file if asset.table is not None else _FILE
    made = None if asset.table is not None else _from_paths(asset, study, found, aside)
    table = asset.path if asset.table is None else asset.table
    rows = read_labels(table, asset, study, aside, notes, values, key=[asset.patient, link], made=made)
    positions: dict[str, list[int]] = {}
    for row, key in enumerate(rows.frame[link].astype(object)):
        positions.setdefault(_slashes(str(key)), []).append(row)
    sources = []
    for path in found:
        of = positions.get(_slashes(where(path, asset.path)), [])
        if not of and asset.table is not None:
            aside.add("no usable row in the label table", where=where(path, asset.path))
        sources += [(Source((path,), FILE), row) for row in of]
    report = Report(aside, values, notes)
    gathered = Gathered(asset.path, table, tuple(found))
    return gather(gathered, sources, rows, image, report, store, lambda done: on_progress(done, len(sources)))


def _from_paths(asset: PicturesAsset, study: Study, found: list[Path], aside: SetAside) -> pd.DataFrame:
    """A label table made of the files' paths, under the names that the site's own table would have."""
    labels = task.reads(study).columns
    if len(labels) != 1:
        raise DataError(f"study {study.study} has {len(labels)} labels: they stand in a table, not in paths")
    names = {"patient": asset.patient, "label": asset.here(labels[0])}
    if study.evaluation.split_column is not None:
        names["split"] = asset.here(study.evaluation.split_column)
    pattern, rows = layout_pattern(asset.layout or ""), []
    for path in found:
        name = where(path, asset.path)
        hit = pattern.fullmatch(name)
        if hit is None:
            aside.add("path that layout does not describe", where=name)
        else:
            rows.append({_FILE: name, **{names[key]: value for key, value in hit.groupdict().items() if key in names}})
    missing = [key for key in names if f"{{{key}}}" not in (asset.layout or "")]
    if missing:
        raise DataError(f"layout of the asset has no {{{missing[0]}}}, which study {study.study} needs")
    if not rows:
        raise DataError(f"{asset.path}: layout describes none of {len(found)} picture files")
    frame = pd.DataFrame(rows, columns=[_FILE, *names.values()], dtype="string")
    frame.index = pd.Index([row[_FILE] for row in rows])
    return frame


def _slashes(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
