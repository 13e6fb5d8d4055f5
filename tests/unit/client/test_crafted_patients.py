"""Patients whose records are crafted to be loud where a norm comes from Gram matrices, through a round as it is.

An audit's canaries have their gradients put on the tape. Here nothing is: records and model are such that the gradient
is thousands of times the bound, nearly all of it at weights whose norm is never taken from the gradient itself, and its
steps add up. Then the released sum, without its noise, is held against the same without the patient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support import studies
from tests.support.records import dataset

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training.trainer import train
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from dpsgd import layer_records
from dpsgd.layer_records import LayerRecord, OuterProduct
from dpsgd.noise import Noise
from dpsgd.patches import ConvolutionRecord
from dpsgd.private_optimizer import PrivateOptimizer

BOUND, OTHERS, STEPS, LOUD = 0.5, 7, 6, 1e4
SEED = bytes(range(32))
SERIES = {"variables": [{"name": "a"}, {"name": "b"}], "bins": STEPS, "step_minutes": 60}
DATA: dict[str, dict[str, Any]] = {
    "gru": {"series": SERIES},
    "lstm": {"series": SERIES},
    "small-cnn": {"image": {"size": 12}},
}


def study(model: str) -> Study:
    return studies.study(
        {"name": model, "hidden": 32},
        DATA[model],
        training={"expected_batch": OTHERS + 1, "records_per_patient": 3},
        privacy={"epsilon": 3.0, "delta": 1e-3, "clipping_norm": BOUND},
    )


def plan(records: int) -> PrivacyPlan:
    """Everybody in the one step."""
    return PrivacyPlan(
        sampling_rate=1.0,
        clipping_norm=BOUND,
        noise_multiplier=1.0,
        steps_per_round=1,
        rounds=1,
        delta=1e-3,
        epsilon=3.0,
        records_per_patient=records,
    )


def crafted(given: Study) -> bytes:
    """A model that does not look at what is loud, so that no gate closes and nothing is normalised: only gradients have
    it. A convolution's input is loud for every patient, a series for the crafted one."""
    model = build(given)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_ih_l0") or name == "convolutions.3.weight":
                parameter[:, 0] = 0.0
            if name == "norms.2.bias":
                parameter[0] = LOUD
    return pack(to_vector(model), given)


def patients(model: str, crafted_records: int) -> ArrayDataset:
    """Ordinary patients, and where there are any crafted records their patient, the last."""
    draw = np.random.default_rng(0)
    shape = (1, 12, 12) if model == "small-cnn" else (STEPS, 6)
    ordinary = draw.random((OTHERS, *shape), dtype=np.float32)
    loud = draw.random((3, *shape), dtype=np.float32)[:crafted_records]
    if model != "small-cnn":
        loud[:, :, 0] = LOUD
    numbers = np.concatenate([np.arange(OTHERS), np.full(crafted_records, OTHERS)])
    count = OTHERS + (crafted_records > 0)
    return dataset(
        inputs=np.concatenate([ordinary, loud]),
        statics=None,
        labels=np.concatenate([draw.integers(0, 2, OTHERS), np.zeros(3, np.int64)])[: len(numbers)],
        patients=numbers,
        patient_count=count,
        train=np.ones(count, dtype=bool),
    )


class Watching:
    """A ``steps.Probe`` that plants nothing."""

    def __init__(self) -> None:
        self.norm = self.by_gram = 0.0
        """Of the last patient's gradient before clipping: the whole, and of weights whose norms are Gram sums."""
        self.sum: npt.NDArray[np.float64] = np.zeros(0)

    def plant(self, optimizer: PrivateOptimizer, records: npt.NDArray[np.int64]) -> None:
        if OTHERS in records:  # it is the last
            found = [(entry, float(entry.squares()[0][-1].detach())) for entry in optimizer.tape._records]
            grams = [square for entry, square in found if _by_gram(entry)]
            self.norm, self.by_gram = math.sqrt(sum(square for _, square in found)), math.sqrt(sum(grams))

    def observe(self, optimizer: PrivateOptimizer) -> None:
        flat = torch.cat([p.grad.flatten() for p in optimizer.params if p.grad is not None])
        self.sum = flat.double().numpy() * (OTHERS + 1)


def _by_gram(entry: LayerRecord) -> bool:
    """Whether its norm is a Gram sum: of more than one application of the weight."""
    return isinstance(entry, ConvolutionRecord) or (isinstance(entry, OuterProduct) and entry.inputs.shape[1] > 1)


def released(model: str, crafted_records: int, records: int) -> Watching:
    given, watching = study(model), Watching()
    data = patients(model, crafted_records)
    about: dict[str, Any] = {"round": 1, "site": "s", "device": torch.device("cpu"), "seed": SEED}
    train(crafted(given), given, data, plan(records), **about, probe=watching)
    return watching


def moved(model: str, records: int) -> tuple[float, Watching]:
    """By how much the crafted patient, of so many records, moves the released sum; and what was seen of it."""
    with_it, without = released(model, records, records), released(model, 0, records)
    return float(np.linalg.norm(with_it.sum - without.sum)), with_it


@pytest.fixture(autouse=True)
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "add_to", lambda self, total, deviation: None)


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("model", DATA)
def test_a_crafted_patient_moves_the_released_sum_by_at_most_the_bound(model: str, records: int) -> None:
    by, seen = moved(model, records)
    assert seen.norm > 100 * BOUND
    assert seen.by_gram > 0.9 * seen.norm
    assert 0.999 * BOUND < by <= BOUND


def diagonal_alone(
    product: OuterProduct, grams: torch.Tensor, others: torch.Tensor, terms: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As if the steps' gradients did not add up."""
    found = (grams.diagonal(dim1=1, dim2=2) * others.diagonal(dim1=1, dim2=2)).sum(1)[: product.owners.patients]
    return found, found


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("model", DATA)
def test_a_gram_sum_that_forgets_what_is_off_its_diagonal_is_seen(
    model: str, records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_records.OuterProduct, "_squares", diagonal_alone)
    assert moved(model, records)[0] > 1.2 * BOUND
