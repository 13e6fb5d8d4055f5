"""After a charge nothing a patient did decides whether a round fails: with and without any one patient it answers."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import studies
from tests.support.records import dataset
from torch import nn

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training import evaluation, fit, steps, trainer
from consilium_client.training.fit import fitting
from consilium_client.training.microbatches import Batch, Batches
from consilium_client.training.rehearsal import largest
from consilium_client.training.steps import PrivateSteps
from consilium_client.training.trainer import TrainResult, check_mechanism, train
from consilium_shared import task
from consilium_shared.errors import ConfigurationError, MachineError
from consilium_shared.limits import LEAST_CLIPPING_NORM, MOST_CLIPPING_NORM, MOST_NOISE, PARAMETERS
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.protocol.messages import Update
from consilium_shared.study import Study
from dpsgd.lattice import Lattice
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import ERROR, Tape

CPU = torch.device("cpu")


def a_study(batch: int = 4, records: int = 1, **training: Any) -> Study:
    return studies.study(
        {"name": "mlp", "hidden": 4},
        {"features": [{"name": f"f{i}"} for i in range(3)]},
        training={"steps_per_round": 2, "expected_batch": batch, "records_per_patient": records, **training},
        privacy={"epsilon": 2.0, "delta": 1e-4, "clipping_norm": 1.0},
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


def records(counts: list[int]) -> ArrayDataset:
    """So many records of each patient."""
    total, draw = sum(counts), np.random.default_rng(0)
    return dataset(
        inputs=draw.standard_normal((total, 3)).astype(np.float32),
        statics=None,
        labels=draw.integers(0, 2, total),
        patients=np.repeat(np.arange(len(counts)), counts),
        patient_count=len(counts),
        train=np.ones(len(counts), dtype=bool),
    )


def a_round(study: Study, plan: PrivacyPlan, data: ArrayDataset, **more: Any) -> TrainResult:
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
        made = PrivateSteps(build(study), study, plan, task.of(study).loss(study, CPU), Noise(bytes(32)), 32)
        assert made.optimizer.lattice.patients == most
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
        optimizer.tape.open(RowOwners(torch.arange(patients), CPU))
        optimizer.tape.record_gradients(parameter, gradients[:patients])
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


# -- what a patient's records do to the passes


class BadPatient:
    """Passes that break off wherever a certain record is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[Exception] = RuntimeError) -> None:
        self.pieces: list[int] = []
        """Patients of each that was begun."""
        whole, error_of = RowOwners, error

        def owners(of: torch.Tensor, *about: Any) -> RowOwners:
            self.pieces.append(len(torch.bincount(of)))
            return whole(of, *about)

        forward = torch.nn.functional.cross_entropy

        def broken(logits: torch.Tensor, *about: Any, **more: Any) -> torch.Tensor:
            if self.is_there(logits):
                raise error_of("this quotes a patient: P17")
            return forward(logits, *about, **more)

        monkeypatch.setattr(steps, "RowOwners", owners)
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)

    @staticmethod
    def is_there(logits: torch.Tensor) -> bool:
        return bool(logits.detach().isnan().any())


def with_bad(counts: list[int], patient: int) -> ArrayDataset:
    found = records(counts)
    found.inputs[0][found.patients == patient] = np.nan
    return found


def without(data: ArrayDataset, patient: int) -> ArrayDataset:
    kept = data.patients != patient
    return dataclasses.replace(
        data,
        inputs=(data.inputs[0][kept],),
        labels=(data.labels[0][kept],),
        patients=data.patients[kept] - (data.patients[kept] > patient),
        patient_count=data.patient_count - 1,
        train=data.train[1:],
    )


@pytest.mark.parametrize("engine", ["book-keeping", "opacus"])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("bad", [0, 20, 39])
def test_a_patient_with_whom_the_passes_break_off_counts_as_one_that_was_not_drawn(
    bad: int, error: type[Exception], engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study, data = a_study(40, 3), with_bad([1, 2, 3, 1] * 10, bad)
    plan = a_plan(study, sigma=1e-3)
    fine = a_round(study, plan, without(data, bad), engine=engine).update
    BadPatient(monkeypatch, error)
    found = a_round(study, plan, data, engine=engine)
    assert left(found) == ((26,), np.float32, 2)
    assert np.abs(found.update - fine).max() < 0.01 * np.abs(fine).max()
    assert "P17" not in caplog.text


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("bad", [0, 20, 39])
def test_a_patient_whose_records_cannot_be_prepared_takes_nobody_along(
    bad: int, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, data = a_study(40, 3), with_bad([1, 2, 3, 1] * 10, bad)
    plan = a_plan(study, sigma=1e-3)
    fine = a_round(study, plan, without(data, bad)).update
    whole = Batch._microbatch

    def broken(self: Batch, place: Any) -> Any:
        found = whole(self, place)
        if found.inputs[0][0].isnan().any():
            raise MemoryError("P17")
        return found

    monkeypatch.setattr(Batch, "_microbatch", broken)
    monkeypatch.setattr(trainer, "Batches", partial(Batches, prefetch=prefetch))
    assert np.abs(a_round(study, plan, data).update - fine).max() < 0.01 * np.abs(fine).max()


def test_where_every_pass_breaks_off_the_round_is_the_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(8)
    plan = a_plan(study, patients=8, count_noise=1.0)
    alone = a_round(study, plan, records([]))
    assert left(alone) == ((26,), np.float32, 2)
    monkeypatch.setattr(BadPatient, "is_there", staticmethod(lambda _: True))
    BadPatient(monkeypatch)
    for engine in ("book-keeping", "opacus"):
        found = a_round(study, plan, records([1] * 9), engine=engine)
        assert left(found) == left(alone)
        assert np.array_equal(found.update, alone.update)


def test_a_weight_that_overflows_leaves_an_update_of_zero() -> None:
    study = a_study(8)
    optimizer = study.training.optimizer.model_copy(update={"lr": 1e30})
    wild = study.model_copy(update={"training": study.training.model_copy(update={"optimizer": optimizer})})
    found = a_round(wild, a_plan(study), records([1] * 9))
    assert left(found) == ((26,), np.float32, 2)
    assert found.diverged
    assert not found.update.any()


HEAVY = [1] * 8 + [64]
OVERFLOWING = records(HEAVY)
OVERFLOWING.inputs[0][-30:] = 3e38
UNKNOWN = records(HEAVY)
UNKNOWN.inputs[0][-64:] = np.nan


@pytest.mark.parametrize("adaptive", [None, {}])
@pytest.mark.parametrize("engine", ["book-keeping", "opacus"])
def test_neighbours_send_the_same_kind_of_thing_after_the_same_kind_of_work(
    engine: Any, adaptive: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one patient, with one of 1, of 64 records, of numbers beyond float32, and of none at all: each piece goes
    through the whole pass and through clipping, and each step gets its noise."""
    study, done = a_study(8, 64, adaptive_clipping=adaptive), []
    whole, noised = PrivateOptimizer.accumulate, PrivateOptimizer.add_noise

    def accumulate(self: PrivateOptimizer) -> None:
        done.append("piece")
        whole(self)

    def add_noise(self: PrivateOptimizer) -> None:
        done.append("noise")
        noised(self)

    monkeypatch.setattr(PrivateOptimizer, "accumulate", accumulate)
    monkeypatch.setattr(PrivateOptimizer, "add_noise", add_noise)
    seen = []
    for data in (records([1] * 8), records([1] * 9), records(HEAVY), OVERFLOWING, UNKNOWN):
        done.clear()
        seen.append((left(a_round(study, a_plan(study), data, engine=engine)), done.count("noise")))
        assert done.count("piece") == 2 * (2 if len(data) > 9 else 1)  # a patient of more than a piece has its own
    assert len(set(seen)) == 1


# -- before the charge


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("most", [1, 2, 16, 40, 85])
@pytest.mark.parametrize("rows", [1, 32, 64])
def test_no_piece_that_a_data_set_gives_is_larger_than_those_that_were_tried(rows: int, most: int, copies: int) -> None:
    def size(counts: list[int]) -> tuple[int, int]:
        """Rows, and room for as many rows of each patient as one has."""
        total = copies * sum(counts)
        return max(rows, 1 << (total - 1).bit_length()), len(counts) * max(counts) * copies

    tried, draw = [size(counts) for counts in largest(rows, most, copies)], np.random.default_rng(0)
    for _ in range(500):
        counts: list[int] = []
        while not counts or copies * sum(counts) < rows:
            counts.append(int(draw.integers(1, most + 1)) if draw.random() < 0.3 else 1)
        while len(counts) > 1 and copies * sum(counts) > rows:
            counts.pop(0)
        assert all(size(counts)[part] <= max(each[part] for each in tried) for part in (0, 1))


def test_pieces_that_memory_does_not_take_are_refused_or_made_smaller_before_anything_is_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study, whole = a_study(8, 64), PrivateSteps._one_after_the_other
    plan, allowed = a_plan(study), [64]

    def short(self: PrivateSteps, pieces: Any) -> None:
        for piece in pieces:
            if len(piece.targets[0]) > allowed[0]:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            whole(self, [piece])

    monkeypatch.setattr(PrivateSteps, "_one_after_the_other", short)
    assert fitting(study, plan, "cpu", "book-keeping")[:2] == (CPU, 32)
    assert fitting(a_study(), a_plan(a_study()), "cpu", "book-keeping")[:2] == (CPU, 32)
    allowed[0] = 31
    assert fitting(a_study(), a_plan(a_study()), "cpu", "book-keeping")[:2] == (CPU, 1)
    with pytest.raises(MachineError, match=r"64 records of 3 numbers .*allocate"):
        fitting(study, plan, "cpu", "book-keeping")


def test_the_coordinator_reads_a_fixed_sentence_and_the_sites_people_the_whole_reason(
    site: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    c = site.coordinator
    site.approve()

    def short(*_: Any) -> None:
        raise MemoryError("of 3 GiB")

    monkeypatch.setattr(fit, "rehearse", short)
    refusal = site.ask(c.train(), c.model)
    assert (refusal.reason, refusal.detail) == (
        "internal",
        "the site's machine cannot compute the study with privacy; its log says why",
    )
    assert "MemoryError: of 3 GiB" in caplog.text
    assert site.charges() == 0
    monkeypatch.undo()
    assert isinstance(site.ask(c.train(), c.model), Update)


def test_a_record_with_which_an_evaluation_breaks_off_counts_as_one_that_the_model_knows_nothing_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = a_study()
    data = dataclasses.replace(records([1] * 70), train=np.zeros(70, dtype=bool))
    model = pack(to_vector(build(study)), study)
    whole = evaluation.measured(model, study, data, CPU)
    data.inputs[0][40] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        forward = torch.nn.Linear.forward

        def broken(self: nn.Linear, given: torch.Tensor) -> torch.Tensor:
            if given.isnan().any():
                raise RuntimeError("P40")
            return forward(self, given)

        patch.setattr(torch.nn.Linear, "forward", broken)
        with pytest.raises(RuntimeError, match="P40"):
            evaluation.measured(model, study, data, CPU)
        found = evaluation.measured(model, study, data, CPU, forgiving=True)
        assert evaluation.noised_counts(model, study, data, CPU, noise_multiplier=1.0, seed=bytes(32)).size > 0
    others = np.arange(70) != 40
    assert np.array_equal(found[others], whole[others])
    assert np.isnan(found[40]).all()
