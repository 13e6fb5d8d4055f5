"""The audit's run: a faithful plan is not contradicted, what leaks is, and nobody's data is needed for either."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import studies

from consilium_client.agent.estimates import make_plan
from consilium_client.data.patients import PatientSampler
from consilium_client.training import canaries, steps, trainer
from consilium_client.training.canaries import audit
from consilium_shared.errors import ConfigurationError
from consilium_shared.models import build
from consilium_shared.privacy.canaries import Outcome, compare, contradiction, lower_bound
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from dpsgd.engines import Engine
from dpsgd.layer_records import PerSampleGrad
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

CPU = torch.device("cpu")
SEED = bytes(range(32))
SERIES = {"variables": [{"name": "a"}, {"name": "b"}], "bins": 4, "step_minutes": 60, "statics": [{"name": "age"}]}
DATA: dict[str, dict[str, Any]] = {
    "mlp": {"features": [{"name": n} for n in "abcdefgh"]},
    "logistic": {"features": [{"name": n} for n in "abcd"]},
    "small-cnn": {"image": {"size": 12}},
    "gru": {"series": SERIES},
    "lstm": {"series": SERIES},
}
Defect = Callable[[pytest.MonkeyPatch], None]


def study(model: str = "gru", epsilon: float = 1.0, layers: int = 1, **training: Any) -> Study:
    plain = {"rounds": 2, "steps_per_round": 10, "expected_batch": 32, "optimizer": {"lr": 0.1}}
    return studies.study(
        {"name": model, "hidden": 32, "layers": layers},
        DATA[model],
        training={**plain, **training},
        privacy={"epsilon": epsilon, "delta": 1e-4, "clipping_norm": 0.5},
    )


def run(given: Study, number: int = 1000, **changes: Any) -> tuple[Outcome, PrivacyPlan]:
    plan = dataclasses.replace(make_plan(given, 200), **changes)
    assert isinstance(plan, PrivacyPlan)
    return audit(given, plan, CPU, canaries=number, seed=SEED), plan


@pytest.mark.parametrize("engine", ["book-keeping", "opacus"])
def test_both_ways_to_gradients_are_audited_alike(engine: Engine) -> None:
    given = study("gru")
    plan = make_plan(given, 200)
    assert isinstance(plan, PrivacyPlan)
    found = audit(given, plan, CPU, canaries=500, seed=SEED, engine=engine)
    assert found == audit(given, plan, CPU, canaries=500, seed=SEED)
    assert found.correct > found.guesses / 2


def contradicted(given: Study, **changes: Any) -> bool:
    outcome, plan = run(given, **changes)
    return contradiction(compare(outcome, [plan.event(plan.rounds)], plan.delta)) is not None


def without_clipping(patch: pytest.MonkeyPatch) -> None:
    whole = Tape.ratios
    patch.setattr(Tape, "ratios", lambda self, bound: torch.ones_like(whole(self, bound)))


def clipping_each_tensor(patch: pytest.MonkeyPatch) -> None:
    whole = Tape.ratios

    def each(self: Tape, bound: float) -> torch.Tensor:
        for entry in [*self._records, *self._chosen]:
            norms = entry.squares()[0].sqrt().clamp(min=1e-30)
            assert isinstance(entry, PerSampleGrad)
            entry.values.mul_((bound / norms).clamp(max=1.0)[:, None])
        return torch.ones_like(whole(self, bound))

    patch.setattr(Tape, "materializes", lambda *_: True)
    patch.setattr(Tape, "ratios", each)


def clipping_each_record(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "RowOwners", lambda owners, *about: RowOwners(torch.arange(len(owners)), *about))


def without_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Noise, "add_to", lambda self, total, deviation: None)


def a_tenth_of_the_noise(patch: pytest.MonkeyPatch) -> None:
    whole = Noise.add_to
    patch.setattr(Noise, "add_to", lambda self, total, deviation: whole(self, total, deviation / 10))


def the_same_noise_in_every_step(patch: pytest.MonkeyPatch) -> None:
    whole = Noise.add_to

    def again(self: Noise, total: torch.Tensor, deviation: float) -> None:
        whole(Noise(SEED), total, deviation)

    patch.setattr(Noise, "add_to", again)


def everybody_in_every_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatientSampler, "_drawn", lambda self: np.arange(len(self._counts)))


def the_same_batch_in_every_step(patch: pytest.MonkeyPatch) -> None:
    whole = PatientSampler._drawn
    kept: dict[int, Any] = {}

    def first(self: PatientSampler) -> Any:
        number = len(self._counts)
        return kept.setdefault(number, whole(self))

    patch.setattr(PatientSampler, "_drawn", first)


def noise_for_the_first_norm_in_every_step(patch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def draw(self: PrivateOptimizer) -> None:
        norms.append(self.clipping_norm)
        self._drawn.zero_()
        self._noise.add_to(self._drawn, self.noise_multiplier * norms[0] / self.lattice.step)

    patch.setattr(PrivateOptimizer, "_draw", draw)


@pytest.mark.parametrize("adaptive", [None, {}])
@pytest.mark.parametrize(("model", "epsilon"), [("gru", 1.0), ("gru", 8.0), ("small-cnn", 8.0)])
def test_a_faithful_run_is_not_contradicted(model: str, epsilon: float, adaptive: dict[str, Any] | None) -> None:
    assert not contradicted(study(model, epsilon, adaptive_clipping=adaptive))


def test_noise_that_stays_behind_a_growing_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    noise_for_the_first_norm_in_every_step(monkeypatch)
    assert contradicted(study(rounds=4, adaptive_clipping={"rate": 1.0}))  # loud canaries make it grow


def test_an_audit_has_power_so_weak_noise_shows_more_than_strong() -> None:
    weak, strong = (run(study("gru", epsilon))[0] for epsilon in (8.0, 0.3))
    assert lower_bound(weak, 1e-4) > 1.0
    assert lower_bound(strong, 1e-4) < 0.3


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_without_noise_the_leak_shows(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    without_noise(monkeypatch)
    outcome, plan = run(study("gru", epsilon))
    found = contradiction(compare(outcome, [plan.event(plan.rounds)], plan.delta))
    assert found is not None
    assert found.measured > 3.0


@pytest.mark.parametrize(
    "defect", [without_clipping, a_tenth_of_the_noise, the_same_noise_in_every_step, everybody_in_every_step]
)
def test_a_gross_defect_is_caught(defect: Defect, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    assert contradicted(study())


def test_clipping_each_record_instead_of_each_patient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    clipping_each_record(monkeypatch)
    assert contradicted(study(), number=500, records_per_patient=4)


def test_the_same_batch_in_every_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    given = study(expected_batch=16)
    assert not contradicted(given, number=2000)
    the_same_batch_in_every_step(monkeypatch)
    assert contradicted(given, number=2000)


def test_clipping_each_tensor_instead_of_each_patient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 tensors, with a third of the noise's effect: (Σ √dₚ)² / Σ dₚ is 3.1²."""
    given = study("lstm", layers=4, rounds=2, steps_per_round=4)
    assert not contradicted(given, number=2000)
    clipping_each_tensor(monkeypatch)
    assert contradicted(given, number=2000)


def test_a_model_of_few_numbers_shares_its_canaries_out_among_runs_of_the_whole_plan() -> None:
    given = study("logistic", rounds=2, steps_per_round=3)
    plan = make_plan(given, 200)
    assert isinstance(plan, PrivacyPlan)
    told: list[tuple[int, int]] = []
    outcome = audit(given, plan, CPU, canaries=25, seed=SEED, on_progress=lambda *done: told.append(done))
    assert outcome.canaries == 25
    assert told == [(i, 3 * 2 * 3) for i in range(1, 19)]  # 10 numbers, so three runs of ten, ten and five


@pytest.mark.parametrize("number", [9, 100_001])
def test_too_few_or_too_many_canaries_are_refused(number: int) -> None:
    with pytest.raises(ConfigurationError, match="canaries"):
        run(study(), number)


def probe(given: Study, plan: PrivacyPlan, stride: int, owners: list[int]) -> Any:
    return canaries._Run(plan, given.training.expected_batch, stride, stride, np.array(owners))


def test_canaries_gradients_are_orthogonal_and_louder_than_the_bound_and_leave_others_rows_alone() -> None:
    given = study()
    plan = make_plan(given, 200)
    assert isinstance(plan, PrivacyPlan)
    parameters = list(build(given).parameters())
    found = recorded(parameters, torch.full((4, 1), 7.0))
    probe(given, plan, 50, [-1, 0, 49, 20]).plant(stepping(plan, parameters, found), np.array([3, 0, 1, 2]))
    gradients = found.gradients()
    rows = torch.cat([gradients[p] for p in parameters], dim=1)  # of canary 20, of nobody, of 0, of 49
    assert (rows[1] == 7.0).all()
    products = rows[[0, 2, 3]] @ rows[[0, 2, 3]].T
    torch.testing.assert_close(
        products, torch.eye(3).double() * (canaries.LOUD * plan.clipping_norm) ** 2, rtol=1e-4, atol=1e-2
    )
    assert all((gradients[p][0] != 0).any() for p in parameters if p.numel() >= 50)


def stepping(plan: PrivacyPlan, parameters: list[torch.nn.Parameter], tape: Tape) -> Any:
    """What a probe looks at of an optimizer."""
    norm = plan.clipping_norm
    return SimpleNamespace(params=parameters, tape=tape, clipping_norm=norm, longest=norm)


def recorded(parameters: list[torch.nn.Parameter], values: torch.Tensor) -> Tape:
    """Gradients of as many patients, each all the same number."""
    found = Tape()
    found.open(RowOwners(torch.arange(len(values)), CPU))
    for parameter in parameters:
        found.record_gradients(parameter, values.repeat(1, parameter.numel()))
    return found


def test_a_drawn_canary_scores_one_a_step_and_what_stays_the_same_cancels() -> None:
    given = study()
    plan = make_plan(given, 200)
    assert isinstance(plan, PrivacyPlan)
    parameters = list(build(given).parameters())
    run_ = probe(given, plan, 50, [7])
    size = sum(p.numel() for p in parameters)
    for number in range(2):
        run_.begin(number)
        for _ in range(3):
            found = recorded(parameters, torch.zeros(1, 1))
            run_.plant(stepping(plan, parameters, found), np.array([0]))
            for parameter, rows in found.gradients().items():
                clipped = rows[0].view_as(parameter).float() / canaries.LOUD
                parameter.grad = (clipped + 0.25 * np.sqrt(50 / size)) / given.training.expected_batch
            run_.observe(stepping(plan, parameters, found))
    assert run_.sum[7] == pytest.approx(6.0, rel=1e-3)
    assert np.abs(np.delete(run_.sum, 7)).max() < 1e-3
    assert run_.likelihood.argmax() == 7


def test_no_round_of_a_study_has_a_probe() -> None:
    """Only the audit's own run may change a gradient."""
    callers = [
        file.name for file in Path(trainer.__file__).parents[1].rglob("*.py") if "probe=" in file.read_text("utf-8")
    ]
    assert callers == ["canaries.py"]
