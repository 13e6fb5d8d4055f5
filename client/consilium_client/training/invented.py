"""Invented records in the shape of a study's: what a machine is tried on before anything is charged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from consilium_client.data.dataset import ArrayDataset
from consilium_shared import task
from consilium_shared.study import Study


def records(study: Study, counts: Sequence[int], seed: int = 0) -> ArrayDataset:
    """Data set of invented patients with this many records each, all for training; it depends on the seed alone."""
    examples = task.of(study).invented(study, sum(counts), np.random.default_rng(seed))
    patients = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return ArrayDataset.of(*examples, patients)
