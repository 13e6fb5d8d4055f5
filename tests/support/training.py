"""Small studies of every kind of model, with their records and plans, for tests of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tests.support import studies
from tests.support.records import dataset

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training.trainer import TrainResult, train
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import NonPrivatePlan, PrivacyPlan
from consilium_shared.study import Study

CPU = torch.device("cpu")
DP = {"mode": "dp", "epsilon": 3.0, "delta": 1e-3, "clipping_norm": 0.5}
OPEN = {"mode": "none"}
KINDS = ["mlp", "small-cnn", "gru", "lstm"]
DATA: dict[str, dict[str, Any]] = {
    "mlp": {"features": [{"name": n} for n in "abcd"]},
    "small-cnn": {"image": {"size": 12}},
    "gru": {"series": {"variables": [{"name": "hr"}], "bins": 4, "step_minutes": 60, "statics": [{"name": "age"}]}},
}
DATA["lstm"] = DATA["gru"]


def study(model: str = "mlp", privacy: dict[str, Any] | None = None, **training: Any) -> Study:
    plain = {"rounds": 2, "steps_per_round": 5, "expected_batch": 8, "optimizer": {"lr": 0.2}}
    return studies.study(
        {"name": model, "hidden": 8}, DATA[model], training={**plain, **training}, privacy=privacy or OPEN
    )


def records(model: str = "mlp", patients: int = 40, seed: int = 0) -> ArrayDataset:
    draw = np.random.default_rng(seed)
    shape = {"mlp": (4,), "small-cnn": (1, 12, 12), "gru": (4, 3), "lstm": (4, 3)}[model]
    inputs = draw.random((patients, *shape), dtype=np.float32)
    return dataset(
        inputs=inputs,
        statics=draw.random((patients, 1), dtype=np.float32) if model in ("gru", "lstm") else None,
        labels=(inputs.reshape(patients, -1)[:, 0] > 0.5).astype(np.int64),
        patients=np.arange(patients),
        patient_count=patients,
        train=np.ones(patients, dtype=bool),
    )


def tensors(data: ArrayDataset, count: int) -> list[torch.Tensor]:
    return [torch.from_numpy(array[:count]) for array in data.inputs]


def plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "sampling_rate": 0.2,
        "clipping_norm": 0.5,
        "noise_multiplier": 1.0,
        "steps_per_round": 5,
        "rounds": 2,
        "delta": 1e-3,
        "epsilon": 3.0,
    }
    return PrivacyPlan(**{**values, **changes})


def run(
    given: Study,
    data: ArrayDataset,
    how: PrivacyPlan | None = None,
    round: int = 1,
    site: str = "north",
    seed: bytes | None = None,
) -> TrainResult:
    start, spec = pack(to_vector(build(given)), given), given.training
    plan = NonPrivatePlan(steps_per_round=spec.steps_per_round, rounds=spec.rounds) if how is None else how
    return train(start, given, data, plan, round=round, site=site, device=CPU, seed=seed)


def with_owners(data: ArrayDataset, counts: list[int]) -> ArrayDataset:
    """The same records, so many of them to each patient."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return dataclasses.replace(data, patients=owners, patient_count=len(counts), train=np.ones(len(counts), dtype=bool))


def flat_gradient(model: torch.nn.Module) -> npt.NDArray[np.float32]:
    """The gradients of all parameters, in their order, as one vector; each has one."""
    found = [parameter.grad for parameter in model.parameters()]
    return np.concatenate([grad.numpy().ravel() for grad in found if grad is not None])
