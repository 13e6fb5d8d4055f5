"""Several augmented copies of each drawn record: what they change of a step, and what they do not."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.training import CPU, DP, OPEN, flat_gradient, plan, records, run, study, with_owners

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training import canaries
from consilium_client.training.microbatches import Batch, Microbatch
from consilium_client.training.steps import accumulate
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.models.vector import to_vector
from consilium_shared.privacy.plan import plan_of
from consilium_shared.study import Study
from consilium_tasks import augmentation
from dpsgd import engines
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer

COUNTS = [1, 3, 1, 2]


def with_copies(copies: int, **changes: Any) -> Study:
    return study("small-cnn", augment="light", augment_multiplicity=copies, **changes)


def data() -> ArrayDataset:
    return with_owners(records("small-cnn", patients=sum(COUNTS)), COUNTS)


def microbatches(given: Study, whole: ArrayDataset, size: int) -> list[Microbatch]:
    draw = Draw(np.arange(len(whole)), whole.patients)
    return list(Batch(given, whole, draw, CPU, np.random.default_rng(0)).padded_microbatches(size))


@pytest.mark.parametrize("size", [1, 4, 32])
def test_a_record_is_so_many_rows_of_its_patient_each_moved_otherwise_in_one_piece(size: int) -> None:
    whole = data()
    found = microbatches(with_copies(3), whole, size)
    assert np.concatenate([p.records for p in found]).tolist() == np.arange(len(whole)).repeat(3).tolist()
    assert [n for p in found for n in np.bincount(p.owners).tolist()] == [3 * count for count in COUNTS]
    for piece in found:
        rows = len(piece.records)
        assert np.array_equal(piece.targets[0][:rows], whole.labels[0][piece.records])
        assert len({image.numpy().tobytes() for image in piece.inputs[0][:rows]}) == rows


def test_a_patient_gives_the_mean_gradient_of_all_its_copies_clipped_once() -> None:
    given, whole, bound = with_copies(3), data(), 0.05
    found = microbatches(given, whole, 32)
    loss = task.of(given).loss(given, CPU)
    expected: Any = 0.0
    for piece in found:
        for owner in range(int(piece.owners[-1]) + 1):
            own, plain = torch.nonzero(piece.owners == owner).flatten(), build(given)
            loss(plain(piece.inputs[0][own]), piece.targets[0][own]).mean().backward()
            gradient = flat_gradient(plain)
            assert np.linalg.norm(gradient) > bound  # clipping is at work
            expected = expected + gradient * bound / np.linalg.norm(gradient)
    model = build(given)
    wrapped = engines.wrap(model, "book-keeping")
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), 1.0),
        wrapped.tape,
        clipping_norm=bound,
        noise_multiplier=0.0,
        expected_batch=1,
        noise=Noise(bytes(32)),
    )
    start = to_vector(model)
    accumulate(wrapped, optimizer, loss, found)
    optimizer.finish()
    assert start - to_vector(model) == pytest.approx(expected, abs=1e-6, rel=2e-5)


@pytest.mark.parametrize("how", [OPEN, DP], ids=["without privacy", "with privacy"])
def test_copies_that_are_alike_weigh_no_more_than_one(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    monkeypatch.setattr(augmentation, "moved", lambda images, *_: images)
    quiet = plan(sampling_rate=1.0, noise_multiplier=1e-9) if how is DP else None
    one, three = (
        run(with_copies(copies, privacy=how, expected_batch=len(COUNTS)), data(), quiet, seed=bytes(32)).update
        for copies in (1, 3)
    )
    assert three == pytest.approx(one, abs=1e-5)
    assert np.abs(one).max() > 1e-3


def test_the_same_seed_gives_the_same_copies_again() -> None:
    given, whole = with_copies(3, privacy=DP), data()
    one, again = (run(given, whole, plan(sampling_rate=1.0), seed=bytes(32)).update for _ in range(2))
    assert one.tobytes() == again.tobytes()


def test_copies_change_nothing_of_what_is_charged() -> None:
    one, many = (plan_of(with_copies(copies, privacy=DP), 100) for copies in (1, 16))
    assert one == many


def test_a_canary_is_clipped_to_the_same_sum_in_copies_as_alone() -> None:
    """An audit plants its gradient in every row of a record."""
    sums = []
    for copies in (1, 3):
        given, model = with_copies(copies), build(study("small-cnn"))
        parameters, start = list(model.parameters()), to_vector(model)
        run_of_one = canaries._Run(plan(), 1, len(start), 1, np.arange(sum(COUNTS)) // sum(COUNTS))
        wrapped = engines.wrap(model, "book-keeping")
        optimizer = PrivateOptimizer(
            torch.optim.SGD(parameters, 1.0),
            wrapped.tape,
            clipping_norm=0.5,
            noise_multiplier=0.0,
            expected_batch=1,
            noise=Noise(bytes(32)),
        )
        accumulate(
            wrapped,
            optimizer,
            task.of(given).loss(given, CPU),
            microbatches(given, data(), 32),
            partial(run_of_one.plant, optimizer),
        )
        optimizer.finish()
        sums.append(start - to_vector(model))
    assert sums[1] == pytest.approx(sums[0], abs=1e-6)
    assert abs(sums[0][0]) == pytest.approx(0.5 * len(COUNTS), rel=1e-3)  # every patient is one, of the bound's norm


def test_one_copy_is_what_it_was_before_there_were_copies() -> None:
    assert with_copies(1).digest == study("small-cnn", augment="light").digest


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"augment_multiplicity": 0}, "greater than or equal to 1"),
        ({"augment_multiplicity": 17}, "less than or equal to 16"),
        ({"augment_multiplicity": 2, "augment": "none"}, "copies that are alike"),
        ({"augment_multiplicity": 4, "records_per_patient": 65}, "in memory together"),
    ],
)
def test_a_contract_refuses_copies_that_mean_nothing_or_do_not_fit(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        study("small-cnn", **{"augment": "light", **changes})
