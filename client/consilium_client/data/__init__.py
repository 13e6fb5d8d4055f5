"""The site's data as a study asks for it: assets in, prepared records out. A reader is imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable

from consilium_client.data.asset import AssetSpec, DicomAsset, PicturesAsset, TimeseriesAsset
from consilium_client.data.dataset import Dataset
from consilium_client.prepared.store import AssetFolder
from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.study import Study

__all__ = ["AssetSpec", "Dataset", "load"]


def load(
    asset: AssetSpec,
    study: Study,
    on_progress: Callable[[int, int], None] | None = None,
    store: AssetFolder | None = None,
) -> Dataset:
    """Read an asset and prepare its records for a study's model.

    What cannot be used is set aside, by record and with a reason, and counted; nothing is dropped in silence.

    Args:
        asset: the site's asset with absolute paths (``asset.at(folder of site.yaml)``).
        study: says which columns, which preparation and which patients are held back.
        on_progress: called with ``(done, total)``, in units that differ between kinds of asset.

    Raises:
        DataError: the asset is of another kind than the task needs, a file or column is missing or unreadable, no
            record is left, or the inputs would exceed ``limits.INPUT_BYTES`` of memory, or the store's disk. Names
            files and columns, never a patient.
    """
    progress = on_progress or (lambda _done, _total: None)
    kind = task.reads(study).kind
    if asset.kind != kind and not (kind == "dicom" and isinstance(asset, PicturesAsset)):
        raise DataError(f"task {study.task} needs an asset of kind {kind}; {study.data.asset} is of kind {asset.kind}")
    if isinstance(asset, DicomAsset):
        from consilium_client.data.dicom import load_dicom

        return load_dicom(asset, study, progress, store)
    if isinstance(asset, PicturesAsset):
        from consilium_client.data.pictures import load_pictures

        return load_pictures(asset, study, progress, store)
    if isinstance(asset, TimeseriesAsset):
        from consilium_client.data.timeseries import load_timeseries

        return load_timeseries(asset, study, progress)
    from consilium_client.data.table import load_table

    return load_table(asset, study, progress)
