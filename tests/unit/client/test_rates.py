"""Local optimizers with schedules, decoupled decay and L1, and the focal loss: each does what its formula says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from consilium_client.agent.estimates import make_plan
from consilium_client.training import invented
from consilium_client.training.trainer import _sampler, check_independence, train
from consilium_shared import study_file, task
from consilium_shared.learning_rate import Schedule
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.norm_bound import derived_norm_bound
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

CPU, SEED = torch.device("cpu"), bytes(range(32))
START = np.float32(0.3)


def study(private: bool, training: dict[str, Any] | None = None, **optimizer: Any) -> Study:
    """The table's sample, a step a round."""
    contract = study_file.read(task.get("tabular-classification").sample).contract
    own = {**contract["training"], "steps_per_round": 1, "rounds": 8, **(training or {})}
    own["optimizer"] = {"name": "sgd", "lr": 0.1, **optimizer}
    changes: dict[str, Any] = {"training": own}
    if not private:
        changes |= {"privacy": {"mode": "none"}, "evaluation": {"metrics": ["auroc"]}}
    del contract["aggregation"]
    return Study.model_validate({**contract, **changes})


def update(of: Study, number: int = 1) -> NDArray[np.float32]:
    """A site's update, from weights that are all ``START``."""
    data = invented.records(of, [1] * 60)
    start = np.full_like(to_vector(build(of)), START)
    plan = make_plan(of, 60)
    return train(pack(start, of), of, data, plan, round=number, site="a", device=CPU, seed=SEED).update


@pytest.mark.parametrize("private", [True, False], ids=["with privacy", "without"])
def test_each_step_has_its_rate_from_the_first_round_to_the_last(private: bool) -> None:
    plain, warm = study(private), study(private, schedule={"warmup": 4})
    assert np.allclose(update(warm, 1), update(plain, 1) / 4, atol=1e-7)
    assert np.allclose(update(warm, 4), update(plain, 4), atol=1e-7)
    falling = study(private, schedule={"decay": "step", "every": 2, "factor": 0.5})
    assert np.allclose(update(falling, 5), update(plain, 5) / 4, atol=1e-7)


@pytest.mark.parametrize("private", [True, False], ids=["with privacy", "without"])
def test_l1_comes_after_the_step_and_its_noise(private: bool) -> None:
    moved = START + update(study(private))
    expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.1 * 2.0, 0)
    assert np.allclose(START + update(study(private, l1=2.0)), expected, atol=1e-6)
    assert (START + update(study(private, l1=100.0)) == 0).all()


def test_adamw_takes_its_decay_off_the_weights() -> None:
    plain, decayed = (update(study(False, name="adamw", weight_decay=w)) for w in (0.0, 0.5))
    assert np.allclose(decayed - plain, -0.1 * 0.5 * START, atol=1e-6)
    assert np.allclose(plain, update(study(False, name="adam")), atol=1e-6)


def test_a_cosine_ends_at_its_least_rate_and_never_rises() -> None:
    rates = [Schedule(decay="cosine", warmup=5, least=0.1).fraction(step, 5, 10) for step in range(51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert rates[50] == pytest.approx(0.1)


def test_the_focal_loss_is_the_cross_entropy_of_what_the_model_does_not_know_yet() -> None:
    of = study(True, {"focal": 2.0})
    logits, classes = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), torch.tensor([0, 0])
    found = task.of(of).loss(of, CPU)(logits, classes)
    true = torch.softmax(logits, 1)[:, 0]
    assert torch.allclose(found, -((1 - true) ** 2) * true.log())
    check_independence(of)


@pytest.mark.parametrize("largest", [0.3, 1.0])
def test_patients_of_each_class_are_drawn_at_their_own_rate_and_nobody_above_the_charged_one(largest: float) -> None:
    of = study(True, {"class_sampling": [1, 4, 2], "steps_per_round": 400, "rounds": 1})
    counts = [1 + number % 2 for number in range(90)]
    data = invented.records(of, counts)
    part, plan = data.part("train"), make_plan(of, 90)
    assert isinstance(plan, PrivacyPlan)
    draws = list(_sampler(of, data, part, replace(plan, sampling_rate=largest), SEED))
    times = np.zeros(90)
    for draw in draws:
        np.add.at(times, np.unique(part.patients[draw.records]), 1)
    classes = data.targets(np.arange(len(data)))[0]
    for patient in range(90):
        expected = largest * max([1, 4, 2][each] for each in classes[data.patients == patient]) / 4
        assert abs(times[patient] / 400 - expected) < 5 * np.sqrt(0.25 / 400)
        assert times[patient] == 400 or expected < 1


def test_no_patients_class_decides_after_the_charge_whether_a_round_fails() -> None:
    of = study(True, {"class_sampling": [1e-300, 1e300, 1e300]})  # their ratio is 0 in float64
    start, plan = pack(to_vector(build(of)), of), make_plan(of, 60)
    for classes in ([1] * 60, [0] + [1] * 59, [0] * 60):
        data = invented.records(of, [1] * 60)
        data.labels[0][:] = classes
        found = train(start, of, data, plan, round=1, site="a", device=CPU, seed=SEED)
        assert (found.steps, found.update.shape) == (1, to_vector(build(of)).shape)


def test_rates_of_classes_change_nothing_of_what_is_charged() -> None:
    plain, drawn = study(True), study(True, {"class_sampling": [1, 4, 2]})
    assert make_plan(plain, 60) == make_plan(drawn, 60)


def test_bounds_of_the_update_hold_what_l1_moves() -> None:
    assert derived_norm_bound(study(True, l1=1.0)) > derived_norm_bound(study(True))
    assert np.linalg.norm(update(study(True, l1=1.0))) < derived_norm_bound(study(True, l1=1.0))


def test_what_came_with_schema_2_is_refused_in_a_contract_of_schema_1() -> None:
    contract = study(False).contract
    old = {**contract, "schema_version": 1}
    old["training"] = {**contract["training"], "optimizer": {"name": "adamw", "lr": 0.1}}
    with pytest.raises(ValueError, match="schema"):
        Study.model_validate(old)


def test_only_classifiers_take_a_focal_loss_or_rates_of_classes() -> None:
    contract = study_file.read(task.get("survival").sample).contract
    for key, value in {"focal": 2.0, "class_sampling": [1, 2]}.items():
        with pytest.raises(ValueError, match=key):
            Study.model_validate({**contract, "training": {**contract["training"], key: value}})
