"""The server's step, against values worked out by hand from the papers' formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from consilium_server.study.optimizer import ServerOptimizer
from consilium_shared import study, task
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError

CASES = [
    ({"name": "fedavg"}, 1.0),
    ({"name": "fedavg", "lr": 10.0}, 10.0),
    ({"name": "fedavgm"}, 10.0),
    ({"name": "fedavgm", "momentum": 0.5, "lr": 2.0}, 4.0),
    ({"name": "fedadam", "lr": 0.1, "step_limit": 2.0}, 2.0),
    ({"name": "fedadam", "lr": 0.1, "tau": 1e-6, "step_limit": 2.0}, 2.0),
    ({"name": "fedyogi", "lr": 0.1, "step_limit": 0.5}, 0.5),
]
"""Optimizers, and what the stated influence of a site is, in shares of the norm bound."""
NAMES = ["fedavg", "fedavgm", "fedadam", "fedyogi"]


def optimizer(name: Any, **values: Any) -> ServerOptimizer:
    return ServerOptimizer.from_study(study.ServerOptimizer(name=name, **values))


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def update(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_fedavg_with_rate_one_takes_the_mean_of_the_local_models() -> None:
    assert optimizer("fedavg").step(vector(1, 2), update(0.5, -1)).tolist() == [1.5, 1.0]
    assert optimizer("fedavg", lr=0.5).step(vector(1, 2), update(0.5, -1)).tolist() == [1.25, 1.5]


def test_fedavgm_adds_up_velocity() -> None:
    server = optimizer("fedavgm", lr=1.0, momentum=0.5)
    model = server.step(vector(0), update(1))  # velocity 1
    assert model.tolist() == [1.0]
    model = server.step(model, update(1))  # velocity 1.5
    assert model.tolist() == [2.5]
    assert server.step(model, update(-1)).tolist() == [2.25]  # velocity -0.25


def test_fedadam_two_steps_by_hand() -> None:
    server = optimizer("fedadam", lr=1.0, beta1=0.5, beta2=0.75, tau=0.5)
    # v starts at τ² = .25.  Δ = 1: m = .5, v = .75 × .25 + .25 × 1 = .4375
    first = 0.5 / (np.sqrt(0.4375) + 0.5)
    model = server.step(vector(0), update(1))
    assert model[0] == np.float32(first)
    # Δ = -2: m = .25 - 1 = -.75, v = .75 × .4375 + .25 × 4 = 1.328125
    expected = np.float32(np.float64(model[0]) - 0.75 / (np.sqrt(1.328125) + 0.5))
    assert server.step(model, update(-2))[0] == expected


def test_fedyogi_two_steps_by_hand() -> None:
    server = optimizer("fedyogi", lr=1.0, beta1=0.5, beta2=0.75, tau=0.5)
    # Δ = 1: v - Δ² = -.75 < 0, so v = .25 + .25 × 1 = .5
    model = server.step(vector(0), update(1))
    assert model[0] == np.float32(0.5 / (np.sqrt(0.5) + 0.5))
    # Δ = .5: v - Δ² = .25 > 0, so v = .5 - .25 × .25 = .4375; m = .25 + .25 = .5
    expected = np.float32(np.float64(model[0]) + 0.5 / (np.sqrt(0.4375) + 0.5))
    assert server.step(model, update(0.5))[0] == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str) -> None:
    draw = np.random.default_rng(0)
    updates = draw.standard_normal((5, 40))
    whole, model = optimizer(name, lr=0.1), np.zeros(40, np.float32)
    for one in updates[:3]:
        model = whole.step(model, one)
    resumed = optimizer(name, lr=0.1)
    resumed.restore({key: part.copy() for key, part in whole.state().items()})
    straight, again = model, model
    for one in updates[3:]:
        straight, again = whole.step(straight, one), resumed.step(again, one)
    assert straight.tobytes() == again.tobytes()
    assert straight.dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_its_state_in_place_and_none_of_its_arguments(name: str) -> None:
    server, model, change = optimizer(name), vector(1, 2), update(0.5, 0.25)
    server.step(model, change)
    state = server.state()
    server.step(model, change)
    assert model.tolist() == [1, 2]
    assert change.tolist() == [0.5, 0.25]
    assert all(part is server.state()[key] for key, part in state.items())


def test_what_does_not_fit_is_refused_and_leaves_the_state() -> None:
    server = optimizer("fedadam")
    model = server.step(vector(0, 0), update(1, 1))
    before = {key: part.copy() for key, part in server.state().items()}
    with pytest.raises(ValueError, match="update"):
        server.step(model, update(1))
    with pytest.raises(ConfigurationError, match="finite"):
        server.step(model, update(np.nan, 0))
    with pytest.raises(ValueError, match="another size"):
        server.step(vector(0), update(1))
    assert all(np.array_equal(before[key], part) for key, part in server.state().items())
    with pytest.raises(ValueError, match="not a state of fedavgm"):
        optimizer("fedavgm").restore(before)
    with pytest.raises(ValueError, match="float64"):
        optimizer("fedavgm").restore({"velocity": vector(1)})
    with pytest.raises(ValueError, match="length"):
        optimizer("fedadam").restore({"first": update(1), "second": update(1, 2)})


def moves(spec: dict[str, Any], updates: list[np.ndarray]) -> list[np.ndarray]:
    server, model, steps = optimizer(**spec), np.zeros(len(updates[0]), np.float32), []
    for one in updates:
        after = server.step(model, one.astype(np.float32))
        steps.append(after.astype(np.float64) - model)
        model = after
    return steps


@pytest.mark.parametrize(("spec", "factor"), CASES)
def test_a_site_whose_neighbours_send_nothing_moves_the_model_by_no_more_than_its_share_of_the_bound_allows(
    spec: dict[str, Any], factor: float
) -> None:
    """One of ten at norm bound 1, in many directions, all at once or coordinate by coordinate."""
    draw, size, share = np.random.default_rng(0), 5000, 0.1
    spread = np.full(size, share / np.sqrt(size))
    single = [np.eye(1, size, place)[0] * share for place in draw.integers(0, size, 30)]
    anything = [share * each / np.linalg.norm(each) for each in draw.standard_normal((30, size))]
    for updates in ([spread] * 60, single, anything, [spread, -spread] * 10):
        assert max(np.linalg.norm(step) for step in moves(spec, updates)) <= share * factor * (1 + 1e-5)


@pytest.mark.parametrize(("spec", "factor"), CASES)
def test_no_step_is_longer_than_the_stated_factor_of_the_longest_update(spec: dict[str, Any], factor: float) -> None:
    draw = np.random.default_rng(1)
    updates = [
        scale * each for scale, each in zip(np.geomspace(1e-4, 1, 40), draw.standard_normal((40, 500)), strict=True)
    ]
    longest = 0.0
    for one, step in zip(updates, moves(spec, updates), strict=True):
        longest = max(longest, float(np.linalg.norm(one)))
        assert np.linalg.norm(step) <= factor * longest * (1 + 1e-5)


def test_a_step_within_the_limit_is_not_touched_and_a_longer_one_keeps_its_direction() -> None:
    free = {"name": "fedadam", "lr": 0.1}
    updates = list(np.random.default_rng(2).standard_normal((5, 60)))
    unbounded, loose, tight = (
        moves({**free, **more}, updates) for more in ({}, {"step_limit": 50.0}, {"step_limit": 0.1})
    )
    assert all(np.array_equal(a, b) for a, b in zip(unbounded, loose, strict=True))
    for step, held in zip(unbounded, tight, strict=True):
        cosine = step @ held / np.linalg.norm(step) / np.linalg.norm(held)
        assert cosine == pytest.approx(1.0, abs=1e-5)
        assert np.linalg.norm(held) < 0.5 * np.linalg.norm(step)


def test_a_contract_of_schema_1_has_no_limit_and_a_new_study_has_one() -> None:
    assert study.ServerOptimizer(name="fedadam").step_limit is None
    sample = task.studies()["demo-vitals"] / "study.yaml"
    assert load_yaml(sample, study.Study).aggregation.optimizer.step_limit == 2.0
