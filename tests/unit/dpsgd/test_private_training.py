"""The library's own loop: each step is the event that an accountant charges, and what it cannot promise it refuses."""

from __future__ import annotations

import doctest
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dpsgd
import dpsgd.frozen
import dpsgd.layers.constant
import dpsgd.training
from consilium_shared.errors import ConfigurationError
from dpsgd.isolation import ROWS
from dpsgd.training import PrivateTraining

RECORDS = 200
INPUTS = torch.randn(RECORDS, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(RECORDS) % 3
LOSS = nn.CrossEntropyLoss(reduction="none")
EXAMPLE = (torch.rand(3, 6), torch.arange(3))


def take(drawn: Tensor) -> tuple[Tensor, Tensor]:
    return INPUTS[drawn], TARGETS[drawn]


def network(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *more, nn.Linear(8, 3))


def training(model: nn.Module, **changes: Any) -> PrivateTraining:
    about: dict[str, Any] = {
        "records": RECORDS,
        "expected_batch": 50,
        "clipping_norm": 0.3,
        "noise_multiplier": 0.0,
        "example": EXAMPLE,
        "seed": bytes(32),
    }
    loss = changes.pop("loss", LOSS)
    return PrivateTraining(model, torch.optim.SGD(model.parameters(), 1.0), loss, **{**about, **changes})


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def test_a_step_is_the_mean_of_the_clipped_gradients_of_those_who_were_drawn() -> None:
    model = network()
    drawn: list[int] = []
    gradients: list[Tensor] = []
    before = weights(model)
    for row in range(RECORDS):
        loss = LOSS(model(INPUTS[row : row + 1]), TARGETS[row : row + 1]).sum()
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
        gradients.append(found * (0.3 / found.norm()).clamp(max=1.0))

    def taken(numbers: Any) -> Any:
        drawn.extend(numbers.tolist())
        return take(numbers)

    training(model).step(taken)
    expected = torch.stack([gradients[row] for row in drawn]).sum(0) / 50
    assert 20 < len(drawn) == len(set(drawn)) < 90
    assert torch.linalg.vector_norm(before - weights(model) - expected) < 1e-4 * expected.norm()


def test_records_are_drawn_as_often_as_the_sampling_rate_says_and_at_most_so_many_at_a_time() -> None:
    made, counts = training(network()), np.zeros(RECORDS)
    sizes = []

    def counted(numbers: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(numbers))
        counts[numbers] += 1
        return take(numbers)

    for _ in range(50):
        made.step(counted)
    assert made.sampling_rate == 0.25
    assert made.steps == 50
    assert abs(counts.mean() / 50 - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 50 / RECORDS)
    assert counts.max() < 30
    assert max(sizes) == ROWS


def test_the_same_seed_gives_the_same_weights_and_no_seed_others() -> None:
    found = []
    for seed in (bytes(32), bytes(32), None):
        model = network(nn.Dropout(0.3))
        made = training(model, noise_multiplier=1.0, seed=seed)
        for _ in range(3):
            made.step(take)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_a_step_that_broke_off_leaves_nothing_in_the_next_ones_sum() -> None:
    """Else a record that both drew would move that sum by twice the clipping norm."""
    left, calls = [], 0

    def breaks_once(numbers: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("the disk")
        return take(numbers)

    for first in (breaks_once, None):
        model = network()
        made = training(model, expected_batch=RECORDS)
        if first is not None:
            with pytest.raises(OSError, match="the disk"):
                made.step(first)
        made.step(take)
        left.append(weights(model))
    torch.testing.assert_close(left[0], left[1])


def test_a_step_that_draws_nobody_is_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = weights(model)
    made = training(model, expected_batch=1, noise_multiplier=1.0)
    monkeypatch.setattr(made, "sampling_rate", 0.0)
    made.step(lambda numbers: pytest.fail(f"{len(numbers)} were drawn"))
    assert 0.5 < float((weights(model) - before).std()) / 0.3 < 2.0


class TakesMeans(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(0)


class OfRecordsBefore(nn.Module):
    """Adds what it has seen of the batches before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, inputs: Tensor) -> Tensor:
        seen = self.get_buffer("seen")
        found = inputs + seen
        if self.training:
            seen += inputs.detach().sum(0)
        return found


class Remembers(nn.Module):
    """Adds the mean of the batch before, which is kept where no buffer is taken back."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.by_data, self.mean = by_data, torch.zeros(8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, inputs: Tensor) -> Tensor:
        found = inputs + self.mean.to(inputs.dtype) + self.get_buffer("seen")
        if self.by_data:
            self.get_buffer("seen").data.copy_(inputs.detach().mean(0))
        else:
            self.mean = inputs.detach().mean(0)
        return found


@pytest.mark.parametrize(
    ("model", "changes", "match"),
    [
        (network(TakesMeans()), {}, "depends on others"),
        (network(Remembers(by_data=False)), {}, "or in the one before"),
        (network(Remembers(by_data=True)), {}, "or in the one before"),
        (network(nn.BatchNorm1d(8)), {}, "use nn.GroupNorm"),
        (network(nn.AlphaDropout()), {}, "draws at random for the whole batch"),
        (network(nn.Bilinear(8, 8, 8)), {}, "no known per-sample gradient"),
        (network(), {"loss": nn.CrossEntropyLoss()}, 'reduction="none"'),
        (network(), {"example": (torch.rand(2, 6), torch.arange(2))}, "at least 3"),
        (network(), {"expected_batch": 201}, "201 records of 200"),
        (network(), {"clipping_norm": 0.0}, "clipping_norm"),
    ],
    ids=[
        "a mean",
        "memory",
        "memory in a buffer",
        "batch norm",
        "torch's numbers",
        "unknown layer",
        "mean loss",
        "two",
        "too many",
        "no norm",
    ],
)
def test_what_privacy_cannot_be_promised_for_is_refused_before_the_first_step(
    model: nn.Module, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigurationError, match=match):
        training(model, **changes)


def test_a_parameter_that_the_optimizer_has_not_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigurationError, match=r"parameter 0\.bias is trainable"):
        PrivateTraining(
            model, torch.optim.SGD([model[0].weight], 1.0), LOSS, records=9, expected_batch=3,  # type: ignore[index]
            clipping_norm=1.0, noise_multiplier=1.0, example=EXAMPLE,
        )  # fmt: skip


def test_what_a_module_writes_into_its_buffers_is_taken_back() -> None:
    """Else one record's numbers were in the gradients of others, without noise."""
    model, plain = network(OfRecordsBefore()), network()
    for each in (model, plain):
        made = training(each)
        for _ in range(3):
            made.step(take)
    assert torch.equal(weights(model), weights(plain))


class WithOwn(nn.Module):
    """Parameters of its own: one is added to every record, one is put beside."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.token = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(1, 8))
        self.head = nn.Linear(16, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.cat([inputs + self.shift, self.token.expand(len(inputs), -1)], dim=1))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Parameter(torch.randn(1, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.mixed.mean(0)


def test_a_modules_own_parameter_of_one_row_has_a_gradient_for_each_record() -> None:
    model = network(WithOwn())
    before, made = weights(model), training(model, expected_batch=200, records=200)
    expected = torch.zeros(len(before), dtype=torch.float64)
    made.step(take)
    fresh = network(WithOwn())
    for row in range(RECORDS):
        loss = LOSS(fresh(INPUTS[row : row + 1]), TARGETS[row : row + 1]).sum()
        found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(fresh.parameters()))]).double()
        expected += found * (0.3 / found.norm()).clamp(max=1.0)
    assert torch.linalg.vector_norm(before - weights(model) - expected / 200) < 1e-4 * expected.norm() / 200


def test_a_modules_own_parameter_that_mixes_the_records_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="depends on others"):
        training(network(Mixing()))


@pytest.mark.parametrize("module", [dpsgd.training, dpsgd.frozen, dpsgd.layers.constant])
def test_examples_in_docstrings_run(module: Any) -> None:
    found = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert found.attempted > 0
    assert found.failed == 0


def test_the_package_does_not_import_torch_and_asks_mkl_for_its_mode_first() -> None:
    code = (
        "import sys, os, dpsgd; assert 'torch' not in sys.modules; assert 'STRICT' in os.environ['MKL_CBWR'];"
        "assert set(dpsgd.__all__) == {n for n in dpsgd.__all__ if getattr(dpsgd, n)}; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dpsgd.nothing  # noqa: B018


# Frozen batch norms


def published(*layers: nn.Module) -> nn.Module:
    """A model that has seen data, as its publisher leaves it."""
    torch.manual_seed(1)
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8) * 2 + 1)
    return model


def test_a_frozen_batch_norm_gives_what_the_published_model_gives() -> None:
    model = published(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(144, 5),
        nn.BatchNorm1d(5),
    )
    frozen, images = dpsgd.freeze_batch_norm(model), torch.randn(4, 3, 8, 8)
    kinds = [type(each).__name__ for each in frozen]  # type: ignore[attr-defined]
    assert kinds == ["ChannelAffine", "Conv2d", "Identity", "ReLU", "ChannelAffine", "Flatten", "Linear", "Identity"]
    torch.testing.assert_close(frozen.train()(images), model.eval()(images), rtol=1e-5, atol=1e-5)
    loss = nn.CrossEntropyLoss(reduction="none")
    example = torch.rand(3, 3, 8, 8), torch.arange(3)
    made = PrivateTraining(
        frozen, torch.optim.SGD(frozen.parameters(), 0.1), loss, records=16, expected_batch=8, clipping_norm=1.0,
        noise_multiplier=1.0, example=example,
    )  # fmt: skip
    made.step(lambda drawn: (torch.randn(16, 3, 8, 8)[drawn], (torch.arange(16) % 5)[drawn]))


def test_a_batch_norm_without_statistics_cannot_be_frozen() -> None:
    with pytest.raises(ConfigurationError, match="without statistics"):
        dpsgd.freeze_batch_norm(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
