"""One round of local training: what one patient can change, what noise is added, what is repeated exactly."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.training import CPU, DP, KINDS, OPEN, flat_gradient, plan, records, run, study, tensors, with_owners

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training import steps, trainer
from consilium_client.training.microbatches import Batch
from consilium_client.training.steps import accumulate
from consilium_client.training.trainer import train
from consilium_shared import task
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.models import build
from consilium_shared.models.vector import load_vector, pack, to_vector
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.independence import check
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
COUNTS = [3, 1, 5, 2, 1, 4]
"""Records of each patient."""
SAMPLES = (torch.rand(3, 4, generator=torch.Generator().manual_seed(0)),), (torch.arange(3) % 2,)
"""Inputs and classes for the independence check."""


def private_sum(given: Study, data: ArrayDataset, chosen: list[int], bound: float, noise: float = 0.0, size: int = 32):
    """The private gradient's sum for the chosen records: one step of rate 1 from the initial weights."""
    model = build(given)
    wrapped = engines.wrap(model, "book-keeping")
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), 1.0),
        wrapped.tape,
        clipping_norm=bound,
        noise_multiplier=noise,
        expected_batch=1,
        noise=Noise(secrets.token_bytes(32)),
    )
    before = to_vector(model)
    indices = np.array(chosen, dtype=np.int64)
    owners = np.cumsum(np.diff(data.patients[indices], prepend=-1) != 0) - 1
    batch = Batch(given, data, Draw(indices, owners), CPU, np.random.default_rng(0))
    accumulate(wrapped, optimizer, task.of(given).loss(given, CPU), batch.padded_microbatches(size))
    optimizer.finish()
    return before.astype(np.float64) - to_vector(model)


# Clipping


@pytest.mark.parametrize("model", KINDS)
def test_removing_one_patient_changes_the_sum_by_at_most_the_bound(model: str) -> None:
    given, data = study(model, class_weights=[1.0, 30.0]), records(model)
    everyone, bound = list(range(10)), 0.05
    whole = private_sum(given, data, everyone, bound)
    without = [private_sum(given, data, everyone[:i] + everyone[i + 1 :], bound) for i in range(10)]
    differences = [np.linalg.norm(whole - part) for part in without]
    assert max(differences) <= bound * (1 + 1e-4)
    assert max(differences) > bound * 0.99  # so clipping was at work


@pytest.mark.parametrize("model", KINDS)
def test_below_the_bound_the_sum_is_the_plain_gradient(model: str) -> None:
    given, data = study(model), records(model)
    found = private_sum(given, data, list(range(6)), bound=100.0)
    plain = build(given)
    task.of(given).loss(given, CPU)(plain(*tensors(data, 6)), torch.from_numpy(data.labels[0][:6])).sum().backward()
    expected = flat_gradient(plain)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", KINDS)
def test_several_physical_batches_are_one_batch(model: str) -> None:
    given, data = study(model), records(model)
    one = private_sum(given, data, list(range(11)), 0.05)
    assert private_sum(given, data, list(range(11)), 0.05, size=4) == pytest.approx(one, abs=1e-6)
    assert private_sum(given, data, list(range(11)), 0.05, size=1) == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_record_without_a_finite_gradient_is_dropped_exactly(model: str, bad: float) -> None:
    given, data = study(model), records(model)
    spoilt = data.inputs[0].copy()
    spoilt[4] = bad
    found = private_sum(given, dataclasses.replace(data, inputs=(spoilt, *data.inputs[1:])), [0, 1, 4, 2, 3], 0.05)
    assert np.isfinite(found).all()
    if not np.isfinite(bad) or model in ("mlp", "small-cnn"):
        assert found == pytest.approx(private_sum(given, data, [0, 1, 2, 3], 0.05), abs=1e-6)


def test_a_record_without_a_finite_loss_is_dropped_without_privacy_too() -> None:
    given, data = study(seed=1, expected_batch=40), records()
    spoilt = data.inputs[0].copy()
    spoilt[4] = np.nan
    assert np.isfinite(run(given, dataclasses.replace(data, inputs=(spoilt, *data.inputs[1:]))).update).all()


# Patients with many records


@pytest.mark.parametrize("model", KINDS)
def test_a_patient_gives_the_mean_gradient_of_its_records_clipped_once(model: str) -> None:
    given, bound = study(model), 0.05
    data = with_owners(records(model, patients=sum(COUNTS)), COUNTS)
    loss = task.of(given).loss(given, CPU)
    expected: Any = 0.0
    for patient in range(len(COUNTS)):
        plain, own = build(given), torch.from_numpy(data.patients == patient)
        inputs = [tensor[own] for tensor in tensors(data, len(data))]
        loss(plain(*inputs), torch.from_numpy(data.labels[0])[own]).mean().backward()
        gradient = flat_gradient(plain)
        expected = expected + gradient * min(1.0, bound / float(np.linalg.norm(gradient)))
    for size in (32, 4, 1):
        found = private_sum(given, data, list(range(len(data))), bound, size=size)
        assert found == pytest.approx(expected, abs=1e-6, rel=2e-5)  # the bound is that much below the norm


def test_a_patient_with_one_record_that_is_not_finite_is_dropped_whole() -> None:
    data = with_owners(records(patients=sum(COUNTS)), COUNTS)
    spoilt = data.inputs[0].copy()
    spoilt[5] = np.nan  # the second of patient 2's, records 4 … 8
    found = private_sum(study(), dataclasses.replace(data, inputs=(spoilt,)), list(range(len(data))), 0.05)
    others = [i for i in range(len(data)) if not 4 <= i < 9]
    assert found == pytest.approx(private_sum(study(), data, others, 0.05), abs=1e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 100])
def test_a_physical_batch_never_splits_a_patient(size: int) -> None:
    given, data = study(), with_owners(records(patients=sum(COUNTS)), COUNTS)
    draw = Draw(np.arange(len(data)), data.patients)
    pieces = list(Batch(given, data, draw, CPU, np.random.default_rng(0)).microbatches(size))
    assert np.array_equal(np.concatenate([piece.targets[0] for piece in pieces]), data.labels[0])
    counts = [np.bincount(piece.owners.numpy()).tolist() for piece in pieces]
    assert [number for part in counts for number in part] == COUNTS
    assert all(sum(part) <= size or len(part) == 1 for part in counts)
    assert all(sum(one) + other[0] > size for one, other in itertools.pairwise(counts))  # none too small


@pytest.mark.parametrize("private", [False, True])
def test_a_patient_seen_several_times_over_counts_as_one_seen_once(private: bool) -> None:
    given = study(privacy=DP if private else OPEN, records_per_patient=3, expected_batch=40)
    how = plan(sampling_rate=1.0, noise_multiplier=1e-9, records_per_patient=3) if private else None
    data = records()
    thrice = dataclasses.replace(
        data,
        inputs=(data.inputs[0].repeat(3, axis=0),),
        labels=(data.labels[0].repeat(3),),
        patients=data.patients.repeat(3),
    )
    assert run(given, thrice, how).update == pytest.approx(run(given, data, how).update, abs=1e-6)


@pytest.mark.parametrize("most", [1, 3])
def test_with_and_without_privacy_the_same_seed_draws_the_same_and_means_the_same(most: int) -> None:
    """Without noise and with a bound that nothing reaches, a private round is a plain one."""
    data = with_owners(records(patients=80), [1, 2, 3, 2] * 10)
    quiet = plan(noise_multiplier=1e-9, clipping_norm=100.0, records_per_patient=most)
    seed = bytes(32)
    private = run(study(privacy=DP), data, quiet, seed=seed).update
    plain = run(study(records_per_patient=most), data, seed=seed).update
    assert private == pytest.approx(plain, abs=1e-6)
    assert np.abs(plain).max() > 1e-3


# Noise


def noise_std(step_noise: float, multiplier: float, bound: float) -> float:
    """Observed over stated standard deviation of the noise on an empty step."""
    given = study("small-cnn")
    found = private_sum(given, records("small-cnn"), [], bound, noise=multiplier * step_noise)
    return float(found.std() / (multiplier * bound))


def acceptable(ratio: float) -> bool:
    return abs(ratio - 1) < 0.1  # about 1,600 coordinates: the standard error is 0.018


def test_an_empty_step_is_noise_of_the_stated_scale() -> None:
    assert acceptable(noise_std(1.0, 1.7, 0.5))


@pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
def test_noise_of_another_scale_would_be_noticed(wrong: float) -> None:
    assert not acceptable(noise_std(wrong, 1.7, 0.5))


def test_noise_is_added_once_however_many_physical_batches() -> None:
    given, data = study("small-cnn"), records("small-cnn")
    chosen = list(range(12))
    clean = private_sum(given, data, chosen, 0.01)
    noisy = private_sum(given, data, chosen, 0.01, noise=2.0, size=1)
    assert acceptable(float((noisy - clean).std() / 0.02))


def test_without_patients_drawn_a_private_round_is_noise_alone_and_still_takes_all_its_steps() -> None:
    given = study("small-cnn", DP)
    result = run(given, records("small-cnn"), plan(sampling_rate=1e-12, noise_multiplier=3.0))
    expected = 0.2 * 3.0 * 0.5 / 8 * np.sqrt(5)  # lr × σ × C / expected batch × √steps
    assert result.steps == 5
    assert acceptable(float(result.update.std() / expected))


def test_private_rounds_never_repeat() -> None:
    given, data = study(privacy=DP), records()
    assert not np.array_equal(run(given, data, plan()).update, run(given, data, plan()).update)


def test_the_same_secret_seed_is_the_same_private_round_again_and_another_is_another() -> None:
    given, data = study("small-cnn", DP, augment="light"), records("small-cnn")
    one, again, other = (run(given, data, plan(), seed=bytes([n] * 32)).update.tobytes() for n in (1, 1, 2))
    assert one == again
    assert one != other


def test_with_privacy_no_seed_of_a_study_is_taken() -> None:
    with pytest.raises(ValueError, match=r"training\.seed"):
        study(privacy=DP, seed=7)
    given = study(privacy=DP)  # nor past the contract
    forced = given.model_copy(update={"training": given.training.model_copy(update={"seed": 7})})
    for seed in (None, bytes(32)):
        with pytest.raises(ConfigurationError, match=r"training\.seed"):
            run(forced, records(), plan(), seed=seed)


# The plan


def test_the_plan_says_how_many_records_of_a_patient_are_used_whatever_the_study_says() -> None:
    data = with_owners(records(patients=80), [2] * 40)
    quiet = {"noise_multiplier": 1e-9, "sampling_rate": 1.0}
    seed = bytes(32)
    asked = [study(privacy=DP, records_per_patient=n) for n in (1, 2)]
    one, two = (run(given, data, plan(**quiet, records_per_patient=2), seed=seed).update for given in asked)
    other = run(asked[1], data, plan(**quiet, records_per_patient=1), seed=seed).update
    assert np.array_equal(one, two)
    assert np.abs(one - other).max() > 1e-4


def test_exactly_the_plans_steps_are_run_and_reported() -> None:
    told: list[tuple[int, int]] = []
    given = study(privacy=DP)
    start = pack(to_vector(build(given)), given)
    result = train(
        start,
        given,
        records(),
        plan(steps_per_round=7),
        round=1,
        site="a",
        device=CPU,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert result.steps == 7
    assert told == [(i, 7) for i in range(1, 8)]
    assert result.patients == 40


def test_a_study_with_privacy_is_never_trained_without_a_private_plan() -> None:
    given = study(privacy=DP)
    with pytest.raises(ConfigurationError, match="privacy mode"):
        run(given, records())
    with pytest.raises(ConfigurationError, match="privacy mode"):
        run(study(), records(), plan())


def test_patients_held_back_are_not_trained_on() -> None:
    given, data = study(seed=1), records()
    train_flags = np.arange(40) % 2 == 0
    marked = dataclasses.replace(data, train=train_flags)
    spoilt = data.inputs[0].copy()
    spoilt[~train_flags] = 77.0
    other = dataclasses.replace(marked, inputs=(spoilt, *data.inputs[1:]))
    assert np.array_equal(run(given, marked).update, run(given, other).update)
    assert run(given, marked).patients == 20
    with pytest.raises(DataError, match="no patient"):
        run(given, dataclasses.replace(data, train=np.zeros(40, dtype=bool)))


# Repeatability and the global model


@pytest.mark.parametrize("model", KINDS)
def test_a_seeded_round_is_the_same_bit_for_bit(model: str) -> None:
    augment = "light" if model == "small-cnn" else "none"
    given = study(model, seed=7, augment=augment, optimizer={"lr": 0.1, "name": "adam"})
    data = records(model)
    first = run(given, data, round=3).update
    torch.manual_seed(99)
    np.random.seed(99)
    assert run(given, data, round=3).update.tobytes() == first.tobytes()
    assert run(given, data, round=4).update.tobytes() != first.tobytes()
    assert run(given, data, round=3, site="south").update.tobytes() != first.tobytes()


def test_training_leaves_torchs_global_state_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(study("small-cnn", DP), records("small-cnn"), plan())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("model", KINDS)
def test_parameters_have_the_same_names_and_order_with_and_without_privacy(model: str) -> None:
    given = study(model, DP)
    plain, private = build(given), build(given)
    names = [name for name, _ in plain.named_parameters()]
    for engine in ("book-keeping", "opacus"):
        engines.wrap(private, engine)
        assert [name for name, _ in private.named_parameters()] == names
        assert to_vector(plain).tobytes() == to_vector(private).tobytes()


def test_the_proximal_term_pulls_towards_the_global_model() -> None:
    data = records()
    free, tied = (np.linalg.norm(run(study(seed=1, steps_per_round=40, proximal=mu), data).update) for mu in (0.0, 3.0))
    assert tied < 0.5 * free


def test_the_proximal_term_acts_with_privacy_too() -> None:
    quiet = plan(noise_multiplier=1e-6, steps_per_round=60, sampling_rate=1.0)
    free, tied = (
        np.linalg.norm(run(study(privacy=DP, expected_batch=40, proximal=mu), records(), quiet).update)
        for mu in (0.0, 3.0)
    )
    assert tied < 0.5 * free


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("private", [False, True])
def test_training_learns(model: str, private: bool) -> None:
    longer = {"steps_per_round": 60, "expected_batch": 40, "optimizer": {"lr": 0.05, "name": "adam"}}
    given, data = study(model, DP if private else OPEN, **longer), records(model)
    quiet = plan(noise_multiplier=0.01, clipping_norm=1.0, steps_per_round=60, sampling_rate=1.0)
    result = run(given, data, quiet if private else None)
    model_before, model_after = build(given), build(given)
    load_vector(model_after, to_vector(model_before) + result.update)
    inputs, labels, loss = tensors(data, len(data)), torch.from_numpy(data.labels[0]), task.of(given).loss(given, CPU)
    before, after = (loss(m(*inputs), labels).mean().item() for m in (model_before, model_after))
    assert after < 0.8 * before


def test_a_run_that_diverges_says_so() -> None:
    given = study(seed=1, steps_per_round=50)
    for rate in (1e6, 1e30):  # beyond what a contract may say, so that it diverges for certain
        optimizer = given.training.optimizer.model_copy(update={"lr": rate})
        training = given.training.model_copy(update={"optimizer": optimizer})
        with pytest.raises(DataError, match="learning rate"):
            run(given.model_copy(update={"training": training}), records())


# What clipping relies on


class _BatchMean(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs - inputs.mean(0))


class _Unknown(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.scale


def _batch_norm() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 2))


def _weighted_mean(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([1.0, 3.0], dtype=logits.dtype)[classes]
    losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
    return losses * weights / weights.mean()


@pytest.mark.parametrize("model", [*KINDS])
def test_every_model_passes_the_independence_check(model: str) -> None:
    trainer.check_independence(study(model, DP))


@pytest.mark.parametrize("model", ["resnet18-gn", "logistic"])
def test_the_other_models_pass_it_too(model: str) -> None:
    kind = "small-cnn" if model == "resnet18-gn" else "mlp"
    given = study(kind, DP)
    trainer.check_independence(given.model_copy(update={"model": given.model.model_copy(update={"name": model})}))


@pytest.mark.parametrize(("model", "match"), [(_BatchMean, "depends"), (_Unknown, "known"), (_batch_norm, "GroupNorm")])
def test_a_model_that_couples_patients_is_refused(model: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        check(model(), task.of(study()).loss(study(), CPU), *SAMPLES)


def test_a_loss_that_couples_patients_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="depends"):
        check(torch.nn.Linear(4, 2), _weighted_mean, *SAMPLES)


def test_a_gradient_is_never_used_twice() -> None:
    model = torch.nn.Linear(4, 2)
    wrapped = engines.wrap(model, "book-keeping")
    optimizer = an_optimizer(model, wrapped)
    wrapped.tape.open(RowOwners(torch.arange(3), CPU))
    losses = wrapped(torch.ones(3, 4)).sum(1)
    losses.sum().backward(retain_graph=True)
    optimizer.accumulate()
    assert wrapped.tape.empty
    with pytest.raises(RuntimeError, match="used already"):
        losses.sum().backward()


def test_a_layer_that_a_step_does_not_use_gets_noise_alone() -> None:
    used, unused = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    model = torch.nn.ModuleList([used, unused])
    wrapped = engines.wrap(model, "book-keeping")
    optimizer, before = an_optimizer(model, wrapped), unused.weight.clone()
    wrapped.tape.open(RowOwners(torch.arange(3), CPU))
    wrapped.backward(used(torch.ones(3, 4)).sum(1))
    optimizer.accumulate()
    optimizer.finish()
    assert torch.equal(unused.weight, before)


def test_a_gradient_that_goes_around_the_tape_stops_the_step() -> None:
    model = torch.nn.Linear(4, 2)
    wrapped = engines.wrap(model, "book-keeping")
    optimizer = an_optimizer(model, wrapped)
    wrapped.tape.open(RowOwners(torch.arange(3), CPU))
    wrapped.backward((wrapped(torch.ones(3, 4)) * model.weight.sum()).sum(1))
    with pytest.raises(RuntimeError, match="outside of its layer"):
        optimizer.accumulate()


def an_optimizer(model: torch.nn.Module, wrapped: engines.PerSampleModel) -> PrivateOptimizer:
    return PrivateOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        wrapped.tape,
        clipping_norm=1.0,
        noise_multiplier=0.0,
        expected_batch=1,
        noise=Noise(secrets.token_bytes(32)),
    )


# Memory


def test_when_memory_runs_out_the_same_step_is_made_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given, data, how = study(privacy=DP), records(), plan(steps_per_round=4, sampling_rate=0.5)
    whole, asked = engines.BookKeeping.backward, []

    def short(self: engines.BookKeeping, losses: torch.Tensor) -> None:
        asked.append(len(losses))
        whole(self, losses)  # what it left is forgotten
        if len(losses) > 1:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(trainer, "private_rows", lambda *_: 1)
    alone = run(given, data, how, seed=bytes(32)).update
    monkeypatch.setattr(trainer, "private_rows", lambda *_: 32)
    monkeypatch.setattr(engines.BookKeeping, "backward", short)
    assert np.array_equal(run(given, data, how, seed=bytes(32)).update, alone)
    assert asked[0] == 32
    assert set(asked[1:]) == {1}


@pytest.mark.parametrize(("allowed", "copies"), [(1, 1), (3, 1), (2, 4)])
def test_a_step_is_told_how_many_rows_a_patient_may_have_and_not_how_many_somebody_has(
    allowed: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmented = {"augment": "light", "augment_multiplicity": copies} if copies > 1 else {}
    given, told = study("small-cnn", privacy=DP, **augmented), set()

    def note(*about: Any) -> RowOwners:
        told.add(about[-1])
        return RowOwners(*about)

    monkeypatch.setattr(steps, "RowOwners", note)
    run(given, records("small-cnn"), plan(records_per_patient=allowed))
    assert told == {allowed * copies}


def test_what_was_clipped_before_memory_ran_out_is_not_in_the_sum_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    given, data, how = study(privacy=DP), records(patients=80), plan(steps_per_round=2, sampling_rate=1.0)
    whole, asked = engines.BookKeeping.backward, []

    def short(self: engines.BookKeeping, losses: torch.Tensor) -> None:
        asked.append(len(losses))
        if len(losses) > 1 and len(asked) == 2:
            raise torch.OutOfMemoryError
        whole(self, losses)

    monkeypatch.setattr(trainer, "private_rows", lambda *_: 1)
    alone = run(given, data, how, seed=bytes(32)).update
    monkeypatch.setattr(trainer, "private_rows", lambda *_: 32)
    monkeypatch.setattr(engines.BookKeeping, "backward", short)
    assert np.array_equal(run(given, data, how, seed=bytes(32)).update, alone)
    assert asked == [32, 32, *[1] * 160]


def test_a_step_that_was_released_is_never_made_again_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    released = []

    def full(self: torch.optim.SGD, closure: Any = None) -> None:
        released.append(self.param_groups[0]["params"][0].grad.clone())
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.optim.SGD, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(study(privacy=DP), records(), plan(steps_per_round=4))
    assert len(released) == 1


# What is refused before it is charged


def test_what_this_site_cannot_compute_is_refused_before_a_round_begins() -> None:
    trainer.check_mechanism(study(privacy=DP), plan(), "opacus")
    low = study(privacy=DP, precision="bfloat16")
    trainer.check_mechanism(low, plan(), "book-keeping")
    with pytest.raises(ConfigurationError, match="set book-keeping"):
        trainer.check_mechanism(low, plan(), "opacus")
    with pytest.raises(ConfigurationError, match="too far from 1"):
        trainer.check_mechanism(study(privacy=DP), plan(clipping_norm=1e-7), "book-keeping")


def test_a_plain_step_notes_nothing_for_devices_that_are_not_there() -> None:
    before = len(torch.cuda._queued_calls)
    run(study("mlp", OPEN, steps_per_round=20), records("mlp"))
    assert len(torch.cuda._queued_calls) == before
