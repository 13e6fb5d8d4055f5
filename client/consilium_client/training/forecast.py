"""Forecast of the seconds that a private round takes on this machine, before anything of it is charged.

Measured on invented records, and told from the plan alone: its steps, and how many patients a step draws by the noised
number. So it depends on nobody's data. It is a lower bound: every patient has one record, and nothing is read, masked
or sent.
"""

from __future__ import annotations

import time

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

_TIMES = 3
"""Steps that are measured; the shortest counts, so that a moment in which the machine is busy does not."""

_LONG = 10.0
"""Seconds after which no further step is measured."""


def least_seconds(
    study: Study, plan: PrivacyPlan, device: torch.device, engine: Engine, rows: int, workers: int = 1
) -> float:
    """Seconds of a round's steps at the least, in microbatches of so many rows, by so many threads.

    Raises:
        Exception: whatever this machine raises.
    """
    fitting = max(1, rows // study.training.augment_multiplicity)
    data, nobody = invented.records(study, [1] * fitting), np.random.default_rng(0)
    with exact_arithmetic():
        model = build(study).to(device).train()
        steps = PrivateSteps(model, study, plan, task.of(study).loss(study, device), Noise(bytes(32)), rows, engine)
        everybody = Draw(np.arange(len(data)), data.patients)
        batch = Batch(study, data, everybody, device, nobody, Chunking(rows, fixed=True))
        steps.try_out([batch])  # what is done once, as choosing kernels, is no step's
        began, took = time.monotonic(), [steps.timed(batch, device)]
        while len(took) < _TIMES and time.monotonic() - began < _LONG:
            took.append(steps.timed(batch, device))
    microbatch, rest = min(each for each, _ in took), min(each for _, each in took)
    return plan.steps_per_round * (rest + microbatch * drawn(study, plan) / fitting / workers)


def drawn(study: Study, plan: PrivacyPlan) -> float:
    """Mean number of patients that a step draws: by their noised number or by the contract, whichever is less."""
    if study.privacy.sums is not None:
        return 0.0  # the contract's batch is of all sites, and the number of patients here is nobody's to know
    batch = float(study.training.expected_batch)
    return batch if plan.patients is None else min(batch, plan.sampling_rate * plan.patients)
