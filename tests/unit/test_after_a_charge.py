"""After a charge nothing a patient did decides whether a round fails: with and without any one patient it answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from consilium_client.data.records import Records
from consilium_client.training.clipping import PrivateOptimizer
from consilium_client.training.lattice import Lattice
from consilium_client.training.noise import Noise
from consilium_client.training.owners import Owners
from consilium_client.training.tape import ERROR, Tape
from consilium_client.training.trainer import TrainResult, check_mechanism, train
from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import LEAST_CLIPPING_NORM, MOST_CLIPPING_NORM, MOST_NOISE, PARAMETERS
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

CPU = torch.device("cpu")


def a_study(batch: int = 4, records: int = 1, **training: Any) -> Study:
    return Study.model_validate(
        {
            "study": "test",
            "task": "tabular-classification",
            "model": {"name": "mlp", "hidden": 4},
            "data": {
                "asset": "a",
                "label": {"column": "y", "classes": ["0", "1"]},
                "features": [{"name": f"f{i}"} for i in range(3)],
            },
            "training": {
                "rounds": 1,
                "steps_per_round": 2,
                "expected_batch": batch,
                "records_per_patient": records,
                "optimizer": {"lr": 0.1},
                **training,
            },
            "privacy": {"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0},
        }
    )


def a_plan(study: Study, rate: float = 1.0, sigma: float = 1.0, **more: Any) -> PrivacyPlan:
    return PrivacyPlan(
        sampling_rate=rate,
        clipping_norm=1.0,
        noise_multiplier=sigma,
        steps_per_round=study.training.steps_per_round,
        rounds=1,
        delta=1e-4,
        epsilon=2.0,
        records_per_patient=study.training.records_per_patient,
        **more,
    )


def records(counts: list[int]) -> Records:
    """So many records of each patient."""
    total, draw = sum(counts), np.random.default_rng(0)
    return Records(
        inputs=draw.standard_normal((total, 3)).astype(np.float32),
        statics=None,
        labels=draw.integers(0, 2, total),
        patients=np.repeat(np.arange(len(counts)), counts),
        patient_count=len(counts),
        train=np.ones(len(counts), dtype=bool),
    )


def a_round(study: Study, plan: PrivacyPlan, data: Records, **more: Any) -> TrainResult:
    model = pack(to_vector(build(study)), study)
    return train(model, study, data, plan, round=1, site="north", device=CPU, seed=bytes(32), **more)


def left(result: TrainResult) -> tuple[Any, ...]:
    """All that the coordinator sees of an update but its numbers."""
    assert np.isfinite(result.update).all()
    return result.update.shape, result.update.dtype, result.steps


# -- how many patients are drawn


def test_a_step_is_made_for_more_patients_than_the_noised_number_can_hide() -> None:
    study = a_study(1024)
    for noise in (0.1, 10.0, 10_000.0):
        plan = a_plan(study, rate=1024 / 1100, patients=1100, count_noise=noise)
        most = Lattice.of(1.0, 1.0, 1, plan.expected(1024)).patients
        assert most >= 2 * plan.sampling_rate * (1100 + 10 * noise) + 1000
    assert a_plan(study).expected(1024) == 1024  # a plan of which no number is released


@pytest.mark.parametrize("surplus", [0, 1])
def test_a_noised_number_far_below_the_true_one_lets_the_round_run_with_and_without_one_patient(surplus: int) -> None:
    study = a_study(8)
    plan = a_plan(study, patients=8, count_noise=1.0)  # so every step draws all there are
    cap = Lattice.of(1.0, 1.0, 1, plan.expected(8)).patients
    assert left(a_round(study, plan, records([1] * (cap + surplus)))) == ((26,), np.float32, 2)


def test_the_sum_of_more_patients_than_a_step_is_made_for_still_moves_by_the_bound() -> None:
    parameter, sums = nn.Parameter(torch.zeros(5)), []
    gradients = 9.0 * torch.randn((2001, 5), generator=torch.Generator().manual_seed(0))
    for patients in (2000, 2001):
        optimizer = PrivateOptimizer(
            torch.optim.SGD([parameter], 0.0),
            Tape(),
            clipping_norm=1.0,
            noise_multiplier=0.0,
            expected_batch=1,
            noise=Noise(bytes(32)),
        )
        assert optimizer.lattice.patients < patients
        optimizer.tape.open(Owners(torch.arange(patients), CPU))
        optimizer.tape.rows(parameter, gradients[:patients])
        optimizer.accumulate()
        sums.append(optimizer._sum * optimizer.lattice.step)
        optimizer.finish()
    assert 0.99 < float(torch.linalg.vector_norm(sums[1] - sums[0])) <= 1.0 + 2001 * ERROR


def test_a_batch_whose_sum_would_be_too_coarse_is_refused_before_the_charge() -> None:
    study = a_study(1_000_000)
    check_mechanism(study, a_plan(study, rate=0.5, patients=2_000_000, count_noise=10.0), "book-keeping")
    far = a_plan(study, rate=1.0, patients=1_000_000, count_noise=10_000.0)
    with pytest.raises(ConfigurationError, match="too coarse"):
        check_mechanism(study, far, "book-keeping")


@pytest.mark.parametrize("sigma", [0.0, 1.0, MOST_NOISE / 3, MOST_NOISE])
@pytest.mark.parametrize("parameters", [1, 10**6, 10**8, PARAMETERS])
def test_a_norm_that_moves_in_the_middle_of_a_round_is_refused_nowhere_or_before_it_began(
    sigma: float, parameters: int
) -> None:
    refused = []
    for norm in np.geomspace(LEAST_CLIPPING_NORM, MOST_CLIPPING_NORM, 97):
        try:
            lattice = Lattice.of(float(norm), sigma, parameters, 64)
            assert lattice.row_bound >= 0.98 * norm
            assert lattice.step * 2**32 >= max(1.0, sigma) * norm * (1 - 1e-12) > 0
            refused.append(False)
        except ConfigurationError:
            refused.append(True)
    assert len(set(refused)) == 1
    assert refused[0] == (2.0**-31 * max(1.0, sigma) * math.sqrt(parameters) + 1152 * ERROR > 1 / 50)
