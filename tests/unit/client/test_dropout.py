"""What a layer drops of a record follows from the round's seed, the step and the record, not from who is beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.training import DP, OPEN, plan, records, run, study
from torch import nn

from consilium_client.training import steps
from consilium_client.training.neighbours import dependence
from consilium_shared.errors import ConfigurationError
from consilium_tasks.networks import MLP
from dpsgd.engines import BookKeeping
from dpsgd.row_randomness import RowRandomness, seeds_of

CPU = torch.device("cpu")


@pytest.fixture
def dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of tables drops half of its hidden units in training."""
    made, plain = MLP.__init__, MLP.forward

    def init(self: MLP, *sizes: int) -> None:
        made(self, *sizes)
        self.drop = nn.Dropout(0.5)

    def forward(self: MLP, inputs: torch.Tensor) -> torch.Tensor:
        return plain(self, self.get_submodule("drop")(inputs))

    monkeypatch.setattr(MLP, "__init__", init)
    monkeypatch.setattr(MLP, "forward", forward)


def test_a_records_seed_is_its_own_in_a_microbatch_of_any_size() -> None:
    numbers = np.array([4, 4, 4, 9, 2, 2], dtype=np.int64)
    whole = seeds_of(numbers, 77, 8).tolist()
    assert len(set(whole[:6])) == 6
    assert whole[6:] == [0, 0]
    assert seeds_of(numbers[3:], 77, 4).tolist()[:3] == whole[3:6]
    assert not set(seeds_of(numbers, 78, 8).tolist()[:6]) & set(whole[:6])


def test_as_many_are_kept_as_the_probability_says_and_rows_differ() -> None:
    kept = RowRandomness(torch.arange(40)).kept((500,), 0.3, CPU)
    assert abs(float(kept.double().mean()) - 0.3) < 0.02
    assert float((kept[0] == kept[1]).double().mean()) < 0.7
    again = RowRandomness(torch.arange(40))
    assert torch.equal(again.kept((500,), 0.3, CPU), kept)
    assert not torch.equal(again.kept((500,), 0.3, CPU), kept)


@pytest.mark.parametrize("privacy", [DP, OPEN])
def test_a_round_that_drops_is_the_same_again_from_the_same_seed(dropping: None, privacy: dict[str, Any]) -> None:
    private = plan() if privacy is DP else None
    found = [run(study("mlp", privacy), records(), private, seed=bytes([s] * 32)).update for s in (1, 1, 2)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_step_drops_the_same_one_patient_after_the_other(dropping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given, how = study("mlp", DP), plan(noise_multiplier=1e-9)
    whole = run(given, records(), how, seed=bytes(32)).update
    backward = BookKeeping.backward

    def breaks(self: BookKeeping, losses: torch.Tensor) -> None:
        if self.tape.owners.rows > 1:
            raise RuntimeError("too many at once")
        backward(self, losses)

    monkeypatch.setattr(BookKeeping, "backward", breaks)
    alone = run(given, records(), how, seed=bytes(32)).update
    assert np.abs(whole).max() > 0.005
    assert np.abs(alone - whole).max() < 1e-6
    monkeypatch.setattr(steps, "seeds_of", lambda numbers, step, rows: torch.arange(rows))  # by place, as torch has it
    assert np.abs(run(given, records(), how, seed=bytes(32)).update - whole).max() > 1e-4


def test_the_neighbour_test_passes_a_model_that_drops_and_opacus_refuses_it(dropping: None) -> None:
    assert dependence(study("mlp", DP), CPU, "book-keeping", 32) == ""
    with pytest.raises(ConfigurationError, match="opacus draws the dropout of drop"):
        dependence(study("mlp", DP), CPU, "opacus", 32)
