"""Invented records in the shape of a study's: what a machine is tried on before anything is charged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from consilium_client.data.records import Records
from consilium_shared import task
from consilium_shared.study import Study


def records(study: Study, counts: Sequence[int], seed: int = 0) -> Records:
    """So many records of each patient, all of them for training; the same for the same seed, and nobody's."""
    (inputs, *beside), (labels,) = task.of(study).invented(study, sum(counts), np.random.default_rng(seed))
    return Records(
        inputs=inputs,
        statics=beside[0] if beside else None,
        labels=labels,
        patients=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
        patient_count=len(counts),
        train=np.ones(len(counts), dtype=bool),
    )
