"""Situations in which clipping is easily undone, or training stops: here it holds.

Each test runs one on our engine behind Opacus's interface. A clipped sum is read from a step without noise.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from tests.support.clipped import ALONE, BOUND, Criterion, Private, assert_near, by_hand
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from consilium_client.data.patients import PatientSampler
from consilium_shared.errors import ConfigurationError
from consilium_tasks.losses import dice, masked_cross_entropy
from dpsgd.independence import check
from dpsgd.noise import Noise, normal_pairs
from dpsgd.opacus_mode import BookKeepingEngine, PhysicalBatches
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape, materializing_is_cheaper

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus's, of sampling that is off and the like

CLASSES = 3


def dense() -> nn.Module:
    """A class for each pixel."""
    return seeded(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    )


def flat() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Float64, so that what differs is not rounding."""
    torch.manual_seed(0)
    return build().double()


def pixels(batch: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 3 * torch.randn(batch, 1, 6, 6, dtype=torch.float64), torch.randint(CLASSES, (batch, 6, 6))


def unlike() -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and targets of three samples unlike each other, for ``check``."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((3, 6), generator=generator)], [torch.arange(3) % CLASSES]


def rows(batch: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return 3 * torch.randn(batch, 6, dtype=torch.float64), torch.randint(CLASSES, (batch,))


def batch_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 − Dice of all pixels of the batch together."""
    overlap, sizes = overlaps(logits, labels)
    return 1.0 - 2.0 * overlap.sum() / (sizes.sum() + 1.0)


def overlaps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probability, truth = torch.softmax(logits, 1)[:, 1].flatten(1), (labels == 1).flatten(1).double()
    return (probability * truth).sum(1), probability.sum(1) + truth.sum(1)


# losses that couple the samples of a batch

WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 20.0, 0.1], dtype=torch.float64), reduction="none")
MASKED = partial(masked_cross_entropy, masked=2)


def cox(logits: Tensor, times: Tensor) -> Tensor:
    """Minus the logarithm of each patient's term in Cox's partial likelihood: its own score among all at risk."""
    risk = logits[:, 0]
    at_risk = (times[None, :] >= times[:, None]).double()
    return torch.log((at_risk * torch.exp(risk)[None, :]).sum(1)) - risk


@pytest.mark.parametrize("criterion", [ALONE, WEIGHTED, MASKED, dice], ids=["plain", "weighted", "masked", "dice"])
def test_removing_one_sample_moves_the_sum_by_at_most_the_bound(criterion: Criterion) -> None:
    inputs, labels = pixels()
    private = Private(dense(), criterion)
    everyone = private.clipped_sum(inputs, labels)
    for gone in range(len(inputs)):
        rest = torch.arange(len(inputs)) != gone
        moved = torch.linalg.vector_norm(everyone - private.clipped_sum(inputs[rest], labels[rest]))
        assert moved <= BOUND * (1 + 1e-9)


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=WEIGHTED.weight),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(reduction="sum"),
        batch_dice,
    ],
    ids=["mean", "weighted", "masked", "sum", "dice"],
)
def test_a_loss_that_is_one_number_for_the_batch_is_refused(criterion: Criterion) -> None:
    private = Private(dense(), criterion)
    with pytest.raises(ConfigurationError, match="give one for each"):
        private.clipped_sum(*pixels())


@pytest.mark.parametrize(
    "coupled",
    [
        lambda logits, labels: ALONE(logits, labels) / len(labels),
        lambda logits, labels: ALONE(logits, labels) * (1.0 + (labels == 0).double().mean()),
        lambda logits, labels: ALONE(logits - logits.mean(0), labels),
        cox,
    ],
    ids=["divided by the batch", "weighted by the batch", "centred by the batch", "cox"],
)
def test_a_vector_of_losses_in_which_samples_are_coupled_is_noticed_at_the_start(coupled: Criterion) -> None:
    with pytest.raises(ConfigurationError, match="depends on others in its batch"):
        check(flat(), coupled, *unlike())
    check(flat(), ALONE, *unlike())


def test_a_sample_counts_with_the_mean_over_its_own_places_that_are_not_masked() -> None:
    logits, labels = (
        torch.randn(3, CLASSES, 4, dtype=torch.float64),
        torch.tensor([[0, 2, 2, 1], [2] * 4, [1, 1, 0, 0]]),
    )
    found = masked_cross_entropy(logits, labels, masked=2)
    own = nn.functional.cross_entropy(logits[0][:, [0, 3]].t(), labels[0, [0, 3]])
    assert found[0] == pytest.approx(float(own))
    assert found[1] == 0.0
    assert found[2] == pytest.approx(float(nn.functional.cross_entropy(logits[2].t(), labels[2])))


def test_dice_is_0_where_all_is_found_and_rises_with_what_is_missed() -> None:
    labels = torch.tensor([[0, 1, 1, 2]])
    sure = 40.0 * nn.functional.one_hot(labels, CLASSES).transpose(1, 2).double()
    half = sure.clone()
    half[..., 1] = half[..., 0]
    assert float(dice(sure, labels)) == pytest.approx(0.0, abs=1e-6)
    assert 0.1 < float(dice(half, labels)) < float(dice(sure.roll(1, dims=1), labels)) < 1.0


# layers that mix samples without having weights


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_is_refused_with_and_without_weights(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Conv2d(4, 3, 1))
    with pytest.raises(ConfigurationError, match=r"layer 1 \(BatchNorm2d\).*use nn.GroupNorm"):
        Private(model)


def test_a_layer_with_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.raises(ConfigurationError, match="layer 1 "):
        Private(model)


# parameters unfrozen later


def test_parameters_unfrozen_after_the_start_are_in_the_norm() -> None:
    model = flat()
    for parameter in model.get_submodule("0").parameters():
        parameter.requires_grad_(False)
    inputs, labels = rows()
    private = Private(model)
    private.clipped_sum(inputs, labels)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    found = private.clipped_sum(inputs, labels)
    assert found[: 6 * 8].abs().max() > 0
    assert_near(found, by_hand(flat(), ALONE, inputs, labels, BOUND))


def test_parameters_frozen_after_the_start_are_not() -> None:
    model = flat()
    private = Private(model, max_grad_norm=1e-3)
    private.clipped_sum(*rows())
    for parameter in model.get_submodule("0").parameters():
        parameter.requires_grad_(False)
    found = private.clipped_sum(*(each[:1] for each in rows()))
    assert found[: 6 * 8 + 8].abs().max() == 0
    assert_near(torch.linalg.vector_norm(found), torch.tensor(1e-3))


# layers that one forward pass skips, or uses twice


class Branches(nn.Module):
    """Skips its second layer when told so, and uses it ``times`` times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.times = 1

    def forward(self, inputs: Tensor) -> Tensor:
        found = torch.tanh(self.first(inputs))
        for _ in range(self.times):
            found = torch.tanh(self.second(found))
        return self.head(found)


def test_a_layer_that_a_pass_skips_keeps_nothing_of_the_batch_before() -> None:
    model = seeded(Branches)
    private = Private(model)
    inputs, labels = rows()
    vars(model)["times"] = 0
    fresh = private.clipped_sum(inputs, labels)
    vars(model)["times"] = 1
    private.clipped_sum(100.0 * inputs.flip(0), labels)
    vars(model)["times"] = 0
    assert torch.equal(private.clipped_sum(inputs, labels), fresh)


def test_a_layer_used_several_times_counts_with_the_sum_of_its_gradients() -> None:
    model = seeded(Branches)
    vars(model)["times"] = 3
    expected = by_hand(model, ALONE, *rows(), BOUND)
    assert_near(Private(model).clipped_sum(*rows()), expected)


def test_gradients_of_a_batch_that_no_step_used_are_not_mixed_into_the_next() -> None:
    private = Private(flat())
    inputs, labels = rows()
    private.criterion(private.module(inputs), labels).backward()
    with pytest.raises(RuntimeError, match="step\\(\\) or zero_grad\\(\\)"):
        private.module(inputs)
    private.optimizer.zero_grad()
    assert_near(private.clipped_sum(inputs, labels), by_hand(flat(), ALONE, inputs, labels, BOUND))


def test_a_parameter_that_gets_its_gradient_outside_of_a_layer_stops_the_step() -> None:
    model = flat()
    private = Private(model)
    inputs, labels = rows()
    loss = private.criterion(private.module(inputs), labels) + model.get_parameter("0.weight").square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="outside of its layer"):
        private.optimizer.step()


# one bound for all physical batches of a step


def test_clipping_that_changes_between_physical_batches_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="clips the whole gradient"):
        Private(flat(), clipping="adaptive")


def test_physical_batches_add_up_to_the_whole_batch() -> None:
    inputs, labels = rows()
    private = Private(flat())
    whole = private.clipped_sum(inputs, labels)
    for parts in (1, 3, 8):
        physical(private, inputs, labels, parts)
        assert_near(private.released() * 8, whole)


def test_opacus_own_split_of_batches_gives_the_same_model() -> None:
    found = []
    for most in (8, 3):
        model = flat()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        module, optimizer, criterion, loader = BookKeepingEngine().make_private(
            module=model, optimizer=optimizer, criterion=ALONE, data_loader=DataLoader(TensorDataset(*rows(16)), 8),
            noise_multiplier=0.0, max_grad_norm=BOUND, poisson_sampling=False,
        )  # fmt: skip
        with PhysicalBatches(data_loader=loader, max_physical_batch_size=most, optimizer=optimizer) as parts:
            for inputs, labels in parts:
                optimizer.zero_grad()
                criterion(module(inputs), labels).backward()
                optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_near(*found)


# samples that are not finite


@pytest.mark.parametrize("planted", [math.nan, math.inf, -math.inf, 1e300])
def test_a_sample_without_a_finite_gradient_is_as_if_it_were_not_there(planted: float) -> None:
    for make, samples in ((flat, rows), (dense, pixels)):
        inputs, labels = samples()
        private = Private(make())
        rest = torch.arange(len(inputs)) != 2
        clean = private.clipped_sum(inputs[rest], labels[rest])
        inputs.view(len(inputs), -1)[2, 1] = planted
        found = private.clipped_sum(inputs, labels)
        if math.isfinite(planted):
            assert torch.linalg.vector_norm(found - clean) <= BOUND * (1 + 1e-9)
        else:
            assert_near(found, clean)


# noise and draws


def test_noise_that_nobody_can_predict_needs_no_other_package() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        total = torch.zeros(16, dtype=torch.float64)
        Noise(secrets.token_bytes(32)).add_to(total, 2.0**32)
        found.append(total)
    assert not torch.equal(*found)


def test_opacus_noise_is_added_once_to_every_number_of_a_sum_and_no_two_are_the_same() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 250)
    model, optimizer, criterion, _ = BookKeepingEngine().make_private(
        module=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.0),
        criterion=nn.CrossEntropyLoss(reduction="none"),
        data_loader=DataLoader(TensorDataset(torch.zeros(8, 300), torch.zeros(8)), batch_size=4),
        noise_multiplier=3.0,
        max_grad_norm=0.5,
    )
    criterion(model(torch.zeros(4, 300)), torch.zeros(4, dtype=torch.int64)).backward()
    optimizer.step()
    assert layer.weight.grad is not None
    noise = layer.weight.grad.flatten() * optimizer.expected_batch_size
    assert float(noise.std()) == pytest.approx(1.5, rel=0.02)
    assert abs(float(noise.mean())) < 5 * 1.5 / len(noise) ** 0.5
    assert len(noise.unique()) > 0.99 * len(noise)
    assert all(parameter.summed_grad is None for parameter in optimizer.params)


def test_noise_reaches_beyond_nine_standard_deviations() -> None:
    words = torch.tensor([0, 0], dtype=torch.int64)  # the radius's smallest word, and angle 0
    largest, _ = normal_pairs(words, 1.0, torch.empty((3, 1), dtype=torch.float64))
    assert largest.item() > 9.0


def test_who_is_drawn_does_not_follow_from_a_generator_that_a_program_can_seed() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        sampler = PatientSampler(np.arange(256), 256, 0.5, 1, secrets.token_bytes(32))
        found.append(next(iter(sampler)).records)
    assert not np.array_equal(found[0], found[1])


# norms in float32


def test_a_norm_is_not_underestimated_where_its_terms_cancel_to_a_ten_thousandth() -> None:
    """By no more than a millionth, and in the form that never has the gradient itself."""
    torch.manual_seed(0)
    assert not materializing_is_cheaper(1, 20, 200, 300)
    layer, half, weights = nn.Linear(300, 200, bias=False), torch.randn(4, 10, 300), torch.randn(4, 10, 200)
    inputs = torch.cat([half, half * (1 + 1e-4)], dim=1)
    weights = torch.cat([weights, -weights], dim=1)
    private = Private(layer, lambda outputs, weights: (outputs * weights).sum((1, 2)), max_grad_norm=1e-3)
    for one in range(4):
        gradient = torch.linalg.vector_norm(weights[one].double().t() @ inputs[one].double())
        reach = (weights[one].norm(dim=1) * inputs[one].norm(dim=1)).sum()
        assert 1e-3 < gradient < 1e-4 * reach  # so it is clipped, and most of it cancels
        clipped = private.clipped_sum(inputs[one : one + 1], weights[one : one + 1])
        assert torch.linalg.vector_norm(clipped.double()) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize(("steps", "outputs", "width"), [(1, 8, 8), (2, 64, 128), (40, 200, 300), (300, 4, 5)])
def test_a_clipped_gradient_ends_within_the_bound_and_near_it(steps: int, outputs: int, width: int) -> None:
    torch.manual_seed(steps)
    weight, tape = nn.Parameter(torch.zeros(outputs, width)), Tape()
    inputs, deltas = torch.randn(3, steps, width), torch.randn(3, steps, outputs)
    tape.open(RowOwners(torch.arange(3), torch.device("cpu")))
    tape.record_outer_product((weight,), inputs, deltas)
    factors = tape.factors(BOUND)
    norms = torch.linalg.vector_norm(torch.einsum("btp,btd->bpd", deltas.double(), inputs.double()), dim=(1, 2))
    ends = factors * norms / BOUND
    assert (ends <= 1 + 1e-6).all()
    assert (ends >= 1 - 1e-5).all()


# nobody drawn


@pytest.mark.parametrize("make", [flat, dense])
def test_an_empty_batch_is_a_step_of_noise_alone(make: Callable[[], nn.Module]) -> None:
    inputs, labels = (each[:0] for each in (rows() if make is flat else pixels()))
    private = Private(make(), noise_multiplier=1.0)
    found = private.clipped_sum(inputs, labels) / BOUND
    assert (found != 0).all()
    assert 0.6 < float(found.std()) < 1.4  # of 80 or more deviates of N(0, 1)
    assert torch.equal(Private(make()).clipped_sum(inputs, labels), torch.zeros_like(found))


# the sampling rate that was asked for


def test_a_rate_that_does_not_divide_the_patients_is_kept() -> None:
    steps = 400
    drawn = [len(draw.records) for draw in PatientSampler(np.arange(1000), 1000, 0.3, steps, bytes(32))]
    assert len(drawn) == steps
    deviation = math.sqrt(1000 * 0.3 * 0.7 / steps)
    assert abs(np.mean(drawn) - 300) < 5 * deviation


# shapes and activations that stop Opacus


def test_a_linear_layer_takes_inputs_of_any_dimension() -> None:
    torch.manual_seed(2)
    inputs, labels = torch.randn(8, 2, 3, 6, dtype=torch.float64), torch.randint(CLASSES, (8, 2, 3))
    lifted = of_last_dimension(ALONE)
    assert_near(Private(flat(), lifted).clipped_sum(inputs, labels), by_hand(flat(), lifted, inputs, labels, BOUND))


def of_last_dimension(criterion: Criterion) -> Criterion:
    return lambda logits, labels: criterion(logits.movedim(-1, 1), labels)


def test_a_loss_of_every_pixel_counts_with_its_mean_over_the_sample() -> None:
    assert_near(Private(dense()).clipped_sum(*pixels()), by_hand(dense(), ALONE, *pixels(), BOUND))


def test_activations_may_work_in_place() -> None:
    def in_place() -> nn.Module:
        head = [nn.Flatten(), nn.Linear(144, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)]
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), *head)

    inputs, labels = pixels()
    labels = labels[:, 0, 0]
    expected = by_hand(seeded(in_place), ALONE, inputs, labels, BOUND)
    assert_near(Private(seeded(in_place)).clipped_sum(inputs, labels), expected)


# leaving a loop over physical batches early


def physical(private: Private, inputs: Tensor, labels: Tensor, parts: int, stop_after: int | None = None) -> None:
    """One logical batch in parts of two, left after so many."""
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=len(inputs))
    with PhysicalBatches(data_loader=loader, max_physical_batch_size=parts, optimizer=private.optimizer) as split:
        for number, (some, classes) in enumerate(split):
            if number == stop_after:
                break
            private.optimizer.zero_grad()
            private.criterion(private.module(some), classes).backward()
            private.optimizer.step()


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_batch_that_was_left_half_way_is_not_in_the_next_one(stop_after: int) -> None:
    inputs, labels = rows()
    expected = Private(flat()).clipped_sum(inputs, labels)
    private = Private(flat())
    physical(private, inputs, labels, 2, stop_after)
    assert_near(private.clipped_sum(inputs, labels), expected)
    physical(private, inputs, labels, 2, stop_after)
    physical(private, inputs, labels, 2)
    assert_near(private.released() * private.optimizer.expected_batch_size, expected)


def test_opacus_own_split_of_batches_is_refused_since_leaving_it_early_would_go_unseen() -> None:
    private, (inputs, labels) = Private(flat()), rows()
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=len(inputs))
    with (
        pytest.raises(RuntimeError, match="PhysicalBatches"),
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=private.optimizer) as split,
    ):
        next(iter(split))


def test_a_sum_that_was_released_is_in_no_later_one_however_gradients_are_forgotten() -> None:
    private, (inputs, labels) = Private(flat()), rows()
    expected = private.clipped_sum(inputs, labels)
    for forget in (private.module.zero_grad, private.optimizer.original_optimizer.zero_grad):
        forget(set_to_none=True)
        private.criterion(private.module(inputs), labels).backward()
        private.optimizer.step()
        assert_near(private.released() * private.optimizer.expected_batch_size, expected)


def test_a_second_forward_pass_before_a_step_is_refused() -> None:
    private, (inputs, _) = Private(flat()), rows()
    private.module(inputs)
    with pytest.raises(RuntimeError, match="were not used"):
        private.module(inputs)


class Folded(nn.Module):
    """Gives five rows of each sample to its layer as if they were samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.repeat_interleave(5, dim=0)).view(len(inputs), 5, CLASSES).mean(1)


class Positions(nn.Module):
    """One embedding for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer = nn.Embedding(12, 6), nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs + self.places(torch.arange(12)).mean(0))


@pytest.mark.parametrize("build", [Folded, Positions])
def test_a_layer_whose_first_dimension_is_not_the_batch_is_refused(build: Callable[[], nn.Module]) -> None:
    private, (inputs, labels) = Private(seeded(build)), rows()
    with pytest.raises(RuntimeError, match="must be the batch"):
        private.clipped_sum(inputs, labels)
    with pytest.raises(ConfigurationError):
        check(seeded(build), ALONE, *unlike())


def test_a_batchs_mean_in_a_vector_is_refused() -> None:
    private = Private(flat(), lambda outputs, labels: ALONE(outputs, labels).mean().reshape(1))
    with pytest.raises(ConfigurationError, match="1 numbers for 8 samples"):
        private.clipped_sum(*rows())


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_that_changes_by_which_words_occur_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="which words occur"):
        Private(nn.Sequential(nn.Embedding(5, 3, **option), nn.Flatten(), nn.Linear(6, CLASSES)))


def test_a_transposed_convolution_that_pads_its_output_by_its_stride_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"layer 0 .*smaller output_padding"):
        Private(nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=1, dilation=2, output_padding=1)))


def test_a_trainable_parameter_that_no_step_changes_is_refused() -> None:
    model = flat()
    with pytest.raises(ConfigurationError, match="the optimizer has it not"):
        BookKeepingEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.get_submodule("0").parameters(), lr=0.1),
            criterion=ALONE,
            data_loader=DataLoader(TensorDataset(torch.zeros(8, 1)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_a_bound_below_what_float32_can_measure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="go down to"):
        Private(flat(), max_grad_norm=1e-12)


def test_a_loop_over_physical_batches_that_begins_again_begins_a_batch_of_its_own() -> None:
    private, (inputs, labels) = Private(flat()), rows()
    expected = Private(flat()).clipped_sum(inputs, labels)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=len(inputs))
    with PhysicalBatches(data_loader=loader, max_physical_batch_size=2, optimizer=private.optimizer) as parts:
        for stop_after in (1, 3, None):
            for number, (some, classes) in enumerate(parts):
                if number == stop_after:
                    break
                private.optimizer.zero_grad()
                private.criterion(private.module(some), classes).backward()
                private.optimizer.step()
    assert_near(private.released() * private.optimizer.expected_batch_size, expected)


def test_in_evaluation_the_loss_is_an_ordinary_one() -> None:
    private, (inputs, labels) = Private(flat()), rows()
    expected = ALONE(private.module._module.eval()(inputs), labels).sum()
    private.module.eval()
    assert float(private.criterion(private.module(inputs), labels)) == pytest.approx(float(expected))
    private.module.train()
    private.clipped_sum(inputs, labels)


def test_samples_that_are_mixed_below_a_layer_of_zeros_are_noticed() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.head = nn.Linear(6, 4), nn.Linear(4, CLASSES)
            nn.init.zeros_(self.head.weight)

        def forward(self, inputs: Tensor) -> Tensor:
            found = self.below(inputs)
            return self.head(found - found.mean(0))

    with pytest.raises(ConfigurationError, match="depends on others in its batch"):
        check(Mixed(), ALONE, *unlike())
