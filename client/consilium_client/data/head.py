"""Quick check of an asset: this account can open its files, and its tables have the columns that site.yaml names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilium_client.data.asset import AssetSpec, DicomAsset, PicturesAsset, TableAsset
from consilium_client.data.columns import header, read_columns, require
from consilium_client.data.folder import walk
from consilium_client.data.identity import settle
from consilium_client.data.layout import patients_of
from consilium_client.data.report import SetAside, explain
from consilium_shared.errors import DataError


def look(asset: AssetSpec) -> int:
    """Open each file of an asset (the first image of a folder), and read the header and the patients of its tables.

    Args:
        asset: with absolute paths.

    Returns:
        The number of different patients in its table.

    Raises:
        DataError: a file is missing, cannot be opened by this account, is a folder, or lacks a column that site.yaml
            names. Names files and columns, never a patient.
    """
    if isinstance(asset, TableAsset):
        _require(asset, asset.path, (asset.patient, asset.record, *asset.columns.values()))
        table = asset.path
    elif isinstance(asset, PicturesAsset):
        _open_one(asset.path)
        if asset.table is None:
            return len(patients_of(asset))
        _require(asset, asset.table, (asset.patient, asset.file, *asset.columns.values()))
        table = asset.table
    elif isinstance(asset, DicomAsset):
        _require(asset, asset.table, (asset.patient, asset.link, *asset.columns.values()))
        _open_one(asset.path)
        table = asset.table
    else:
        own = (asset.variable, asset.value) if asset.layout == "long" else ()
        _require(asset, asset.series, (asset.patient, asset.record, asset.time, *own))
        _require(asset, asset.table, (asset.patient, asset.record, asset.start))
        if asset.layout == "wide":  # in the long layout a name may be one of a variable, which stands in the rows
            present = {*header(asset.series, asset.csv), *header(asset.table, asset.csv)}
            missing = [name for name in asset.columns.values() if name not in present]
            if missing:
                raise DataError(f"neither {asset.series} nor {asset.table} has a column {missing[0]!r} (columns:)")
        table = asset.table
    people, _ = settle(read_columns(table, [asset.patient], dialect=asset.csv)[asset.patient])
    return int(people.nunique())


def _require(asset: AssetSpec, path: Path, names: Sequence[str | None]) -> None:
    require(path, [name for name in names if name is not None], header(path, asset.csv))


def _open_one(folder: Path) -> None:
    aside = SetAside()
    for path in walk(folder, aside):
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        return
    raise DataError(f"{folder} holds no file{explain(aside)}")
