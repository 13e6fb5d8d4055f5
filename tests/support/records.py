"""Data sets in memory, written down array by array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.dataset import ArrayDataset


def dataset(
    *,
    inputs: NDArray[Any],
    labels: NDArray[Any],
    patients: NDArray[np.int64],
    patient_count: int,
    train: NDArray[np.bool_],
    statics: NDArray[Any] | None = None,
) -> ArrayDataset:
    """Records with one input, or a series with its statics, and one target."""
    found = ArrayDataset.of((inputs, *([] if statics is None else [statics])), (labels,), patients, train)
    assert found.patient_count == patient_count
    return found
