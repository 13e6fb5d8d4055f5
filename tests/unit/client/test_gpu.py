"""On a GPU: the same rounds as on the CPU, the same bits every time, and nobody waited for.

These tests run where torch sees a CUDA device; everywhere else they are skipped, and then nothing here is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.properties import test_rows as rows
from tests.support.training import CPU, DP, KINDS, OPEN, plan, records, study, with_owners

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training import evaluation, trainer
from consilium_client.training.microbatches import Batch, Batches
from consilium_client.training.steps import accumulate
from consilium_client.training.trainer import train
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import NonPrivatePlan, Plan
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.device import exact_arithmetic
from dpsgd.engines import BookKeeping
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
GPU = torch.device("cuda", 0)

TOLERANCE = 1e-4
"""Of an update's norm: some steps of float32, whose products a GPU adds up in another order."""

Vector = npt.NDArray[np.float32]
NAMES = {**{kind: kind for kind in KINDS}, "logistic": "mlp", "resnet18-gn": "small-cnn"}


def named(name: str, privacy: dict[str, Any] | None = None, **training: Any) -> Study:
    given = study(NAMES[name], privacy, **training)
    return given.model_copy(update={"model": given.model.model_copy(update={"name": name})})


def update(given: Study, data: ArrayDataset, how: Plan, where: torch.device) -> Vector:
    start = pack(to_vector(build(given)), given)
    return train(start, given, data, how, round=1, site="north", device=where, seed=bytes(32)).update


def assert_close(found: Vector, expected: Vector) -> None:
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.fixture(autouse=True)
def nothing_is_left_in_its_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


# The same as on the CPU


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("name", NAMES)
def test_a_private_round_is_that_of_the_cpu(name: str, optimizer: str) -> None:
    """With the noise: it comes from the same words. Adam divides by what may be small, so it starts from more of it."""
    given = named(name, DP, optimizer={"lr": 0.01, "name": optimizer}, expected_batch=40)
    counts = [1, 3, 1, 2, 1] * 10
    data = with_owners(records(NAMES[name], sum(counts)), counts)
    how = plan(sampling_rate=0.8, records_per_patient=2)
    assert_close(update(given, data, how, GPU), update(given, data, how, CPU))


@pytest.mark.parametrize("name", NAMES)
def test_a_round_without_privacy_is_that_of_the_cpu(name: str) -> None:
    given, data = named(name, OPEN, expected_batch=40), records(NAMES[name], 80)
    how = NonPrivatePlan(steps_per_round=5, rounds=2)
    assert_close(update(given, data, how, GPU), update(given, data, how, CPU))


def test_noise_is_that_of_the_cpu_but_for_the_last_bits() -> None:
    total = {where: torch.zeros(300_001, dtype=torch.float64, device=where) for where in (CPU, GPU)}
    for found in total.values():
        Noise(bytes(32)).add_to(found, 2.0**32)
    apart = (total[CPU] - total[GPU].cpu()).abs()
    assert float(apart.max()) <= 1
    assert float(apart.mean()) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_are_those_of_the_cpu(name: str) -> None:
    given, data = named(name), records(NAMES[name], 70)
    model = pack(to_vector(build(given)), given)
    found, expected = (evaluation.measured(model, given, data, where) for where in (GPU, CPU))
    assert np.abs(found - expected).max() < 1e-5


# The same every time


@pytest.mark.parametrize("privacy", [DP, OPEN])
@pytest.mark.parametrize("name", NAMES)
def test_a_round_is_the_same_bit_for_bit(name: str, privacy: dict[str, Any]) -> None:
    given, data = named(name, privacy, expected_batch=40), records(NAMES[name], 80)
    how = plan(sampling_rate=0.5) if privacy is DP else NonPrivatePlan(steps_per_round=5, rounds=2)
    assert len({update(given, data, how, GPU).tobytes() for _ in range(3)}) == 1


def test_the_sum_is_the_same_prepared_ahead_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    given, data = study("small-cnn", DP, augment="light", expected_batch=80), records("small-cnn", 160)
    prefetched = update(given, data, plan(sampling_rate=0.5), GPU)
    monkeypatch.setattr(trainer, "Batches", partial(Batches, prefetch=False))
    assert update(given, data, plan(sampling_rate=0.5), GPU).tobytes() == prefetched.tobytes()


def test_in_bfloat16_a_private_round_runs_and_repeats() -> None:
    given, data = study("small-cnn", DP, precision="bfloat16"), records("small-cnn", 80)
    one, other = (update(given, data, plan(sampling_rate=0.5), GPU) for _ in range(2))
    assert one.tobytes() == other.tobytes()


def test_when_memory_runs_out_the_same_step_is_made_one_record_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given, data, how = study("small-cnn", DP), records("small-cnn"), plan(steps_per_round=4, sampling_rate=0.5)
    whole = BookKeeping.backward

    def short(self: BookKeeping, losses: torch.Tensor) -> None:
        whole(self, losses)
        if len(losses) > 1 and losses.is_cuda:
            torch.empty(2**50, dtype=torch.uint8, device=losses.device)  # more than any device has

    monkeypatch.setattr(trainer, "private_rows", lambda *_: 1)
    alone = update(given, data, how, GPU)
    monkeypatch.setattr(trainer, "private_rows", lambda *_: 32)
    monkeypatch.setattr(BookKeeping, "backward", short)
    assert np.array_equal(update(given, data, how, GPU), alone)


# Nobody is waited for


@pytest.mark.parametrize("name", NAMES)
def test_a_private_step_never_waits_for_the_device(name: str) -> None:
    """By torch's own watch, which ``test_no_waiting`` stands in for elsewhere."""
    given, data = named(name), records(NAMES[name], 70)
    model = build(given).to(GPU)
    wrapped = engines.wrap(model, "book-keeping")
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        wrapped.tape,
        clipping_norm=0.5,
        noise_multiplier=1.0,
        expected_batch=70,
        noise=Noise(bytes(32)),
    )
    draw, loss = Draw(np.arange(70), np.arange(70)), task.of(given).loss(given, GPU)

    def step() -> None:
        optimizer.begin()
        batch = Batch(given, data, draw, GPU, np.random.default_rng(0))
        accumulate(wrapped, optimizer, loss, batch.padded_microbatches(32))
        optimizer.finish()

    with exact_arithmetic():
        step()  # libraries set themselves up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# What a patient's row gives depends on nobody else: what rows.py asks, and has not seen on a GPU


@pytest.mark.parametrize(("name", "width"), rows.CASES)
def test_a_records_gradient_depends_on_neither_its_place_nor_its_neighbours(name: str, width: int) -> None:
    rows.check_gradients(name, width, GPU)


@pytest.mark.parametrize("size", [1, 32, 64])
@pytest.mark.parametrize("name", rows.MODELS)
def test_where_all_logits_are_rounding_alone_one_patient_still_moves_the_sum_by_at_most_the_bound(
    name: str, size: int
) -> None:
    draw, given = np.random.default_rng(1), rows.a_study(name)
    data = rows.records(given, [1] * 34, draw, alike=True)
    step = rows.Step(given, rows.crafted(given, data.inputs[0][0], draw), size, where=GPU)
    for count in (1, 7, 15, 31, 32, 33):
        without, one_more = (step(data, list(range(n)))[1] for n in (count, count + 1))
        assert step.within_the_bound(one_more - without)


@pytest.mark.parametrize(("name", "width"), rows.CASES)
def test_a_records_probabilities_depend_on_neither_its_place_nor_its_neighbours(name: str, width: int) -> None:
    draw, given = np.random.default_rng(3), rows.a_study(name, width)
    data = rows.records(given, [1] * 70, draw)
    model = pack(rows.crafted(given, data.inputs[0][0], draw), given)
    whole = evaluation.measured(model, given, data, GPU)
    for size in (1, 15, 33, 70):
        some = draw.permutation(70)[:size]
        inputs, labels = data.take(some)
        part = dataclasses.replace(data, inputs=inputs, labels=labels, patients=data.patients[some])
        assert np.array_equal(evaluation.measured(model, given, part, GPU), whole[some])
