"""Rehearsal of the largest microbatches that a study allows, on invented records and before the charge.

So whether memory suffices depends on the study alone, and not on a data set in which somebody has as many records as
the study allows.
"""

from __future__ import annotations

import numpy as np
import torch

from consilium_client.data.patients import Draw
from consilium_client.training import invented
from consilium_client.training.microbatches import Batch, Chunking
from consilium_client.training.steps import PrivateSteps
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from dpsgd.device import exact_arithmetic
from dpsgd.engines import Engine
from dpsgd.noise import Noise


def largest(rows: int, records: int, copies: int) -> list[list[int]]:
    """Largest microbatches, each as the number of records of each patient in it.

    They are a full one of patients with one record each; one in which a patient has so many that room for as many of
    everybody (``RowOwners.by_patient``) is largest; and, where a microbatch has not enough rows for as many records as
    the study allows, one of a patient with that number alone.

    Args:
        rows: of a microbatch of several patients.
        records: most of a patient, in so many ``copies``.
    """
    fitting = max(1, rows // copies)
    found = [[1] * fitting]
    most = max(range(1, min(records, fitting) + 1), key=lambda many: many * (fitting - many + 1))
    if most > 1:
        found.append([1] * (fitting - most) + [most])
    if records * copies > rows:
        found.append([records])
    return found


def rehearse(
    study: Study, plan: PrivacyPlan, device: torch.device, engine: Engine, rows: int, workers: int = 1
) -> None:
    """Run one private step of the largest microbatches, in so many rows, by so many threads at once.

    Raises:
        Exception: whatever this machine raises.
    """
    loss, nobody = task.of(study).loss(study, device), np.random.default_rng(0)
    with exact_arithmetic():
        model = build(study).to(device).train()
        steps = PrivateSteps(model, study, plan, loss, Noise(bytes(32)), rows, engine, workers=workers)
        batches = []
        for counts in largest(rows, plan.records_per_patient, study.training.augment_multiplicity):
            data = invented.records(study, counts)
            everybody = Draw(np.arange(len(data)), data.patients)
            batches.append(Batch(study, data, everybody, device, nobody, Chunking(rows, fixed=True)))
        steps.try_out(batches)
