"""Data sets as the readers give them today: whole arrays, which tests look into."""

from __future__ import annotations

from collections.abc import Callable

from consilium_client import data
from consilium_client.data import AssetSpec
from consilium_client.data.dataset import ArrayDataset
from consilium_shared.study import Study


def load(asset: AssetSpec, study: Study, on_progress: Callable[[int, int], None] | None = None) -> ArrayDataset:
    """As ``data.load``."""
    found = data.load(asset, study, on_progress)
    assert isinstance(found, ArrayDataset)
    return found
