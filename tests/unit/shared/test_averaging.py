"""The average of the models over rounds, by hand, over a checkpoint, and what its decay may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from consilium_server.state.checkpoint import Checkpoint, CheckpointFile
from consilium_shared import averaging, study
from consilium_shared.averaging import averaged


def models(rounds: int, size: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((rounds, size)).astype(np.float32))


def after(rounds: list[np.ndarray], decay: float) -> np.ndarray:
    found = None
    for number, model in enumerate(rounds, start=1):
        found = averaged(found, model, decay, number)
    assert found is not None
    return found


def test_after_two_rounds_by_hand() -> None:
    # decay ½: the first model weighs ½, the second 1: (½ × 3 + 6) / 1.5
    assert after([np.array([3], np.float32), np.array([6], np.float32)], 0.5).tolist() == [5.0]


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_all_models_so_far_without_the_initial_one(decay: float) -> None:
    found = models(7)
    weights = decay ** np.arange(6, -1, -1.0)
    assert after(found, decay) == pytest.approx(weights @ np.array(found) / weights.sum(), abs=1e-12)


def test_models_that_do_not_move_are_their_own_average() -> None:
    assert np.array_equal(after([models(1)[0]] * 5, 0.8), models(1)[0].astype(np.float64))


def test_neither_the_model_nor_the_average_before_is_changed_and_pieces_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = models(2)
    before = averaged(None, one, 0.5, 1)
    kept = [two.copy(), before.copy()]
    whole = averaged(before, two, 0.5, 2)
    monkeypatch.setattr(averaging, "PIECE", 2)
    assert np.array_equal(averaged(before, two, 0.5, 2), whole)
    assert np.array_equal(two, kept[0]) and np.array_equal(before, kept[1])


@pytest.mark.parametrize(("before", "number"), [(None, 2), (np.zeros(3), 1), (np.zeros(4), 2)])
def test_an_average_that_is_not_of_the_rounds_before_is_refused(before: np.ndarray | None, number: int) -> None:
    with pytest.raises(ValueError, match=f"round {number}"):
        averaged(before, models(1)[0], 0.5, number)


def test_a_checkpoint_keeps_the_average_beside_the_optimizers_state(tmp_path: Path) -> None:
    file, average = CheckpointFile(tmp_path), np.arange(3.0)
    file.write(Checkpoint("s" * 64, 1, models(1)[0], {"velocity": np.ones(3)}, {}, average))
    found = file.read("s" * 64)
    assert found is not None and found.average is not None
    assert found.average.dtype == np.float64
    assert found.average.tolist() == average.tolist()
    assert list(found.optimizer) == ["velocity"]


def test_by_default_no_average_is_made_and_a_decay_of_one_would_never_move() -> None:
    assert study.Aggregation().weight_average == 0
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="weight_average"):
            study.Aggregation(weight_average=decay)
