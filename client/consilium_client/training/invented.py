"""Invented records in the shape of a study's: what a machine is tried on before anything is charged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from consilium_client.data.dataset import ArrayDataset
from consilium_shared import task
from consilium_shared.study import Study


def records(study: Study, counts: Sequence[int], seed: int = 0) -> ArrayDataset:
    """So many records of each patient, all of them for training; the same for the same seed, and nobody's."""
    examples = task.of(study).invented(study, sum(counts), np.random.default_rng(seed))
    patients = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return ArrayDataset.of(*examples, patients)
