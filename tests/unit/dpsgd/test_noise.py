"""The noise of finished private steps: Gaussian, of the stated scale, independent, on the lattice, unpredictable.

Each test statistic has a known distribution if the noise is right; planted noise that is not right must be seen by the
same statistics. Seeds are fixed, so nothing here flakes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import fft, stats
from tests.support.training import flat_gradient

from consilium_shared.errors import ConfigurationError
from dpsgd import noise
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.tape import Tape

SEED = bytes(range(32))
STEPS, INPUTS, OUTPUTS = 8, 500, 249
SIGMA, BOUND, BATCH = 1.3, 0.7, 16


def released(source: Noise, steps: int = STEPS, batch: int = BATCH) -> np.ndarray:
    """The private gradients of so many steps without patients: float64 ``[steps, d]``, d = 124,749."""
    model = torch.nn.Linear(INPUTS, OUTPUTS)
    found: list[np.ndarray] = []
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        Tape(),
        clipping_norm=BOUND,
        noise_multiplier=SIGMA,
        expected_batch=batch,
        noise=source,
        after=lambda: found.append(flat_gradient(model)),
    )
    for _ in range(steps):
        optimizer.finish()
    return np.array(found, dtype=np.float64)


def failed(gradients: np.ndarray) -> set[str]:
    """Which properties of independent N(0, (σC/B)²) the gradients lack, each at 1 in a million."""
    deviates = gradients.ravel() / (SIGMA * BOUND / BATCH)
    count, squares = deviates.size, float((deviates**2).sum())
    tests = {
        "mean": 2 * stats.norm.sf(abs(deviates.sum()) / np.sqrt(count)),
        "deviation": 2 * min(stats.chi2.sf(squares, count), stats.chi2.cdf(squares, count)),
        "shape": stats.kstest(deviates, "norm").pvalue,
        "alike": _alike(deviates),
        "equally large": _alike(deviates**2),
    }
    for far in (3.0, 4.0):
        outside = int((np.abs(deviates) > far).sum())
        tests[f"beyond {far:g}"] = stats.binomtest(outside, count, 2 * stats.norm.sf(far)).pvalue
    return {name for name, pvalue in tests.items() if not pvalue >= 1e-6}


def _alike(values: np.ndarray) -> float:
    """Does any two values' correlation depend on how far apart they stand, over all distances, within and across steps?

    The circular autocorrelation (Wiener & Khinchin) at each lag is about N(0, 1 / count) of independent values.
    """
    centred = values - values.mean()
    if not centred.any():
        return 0.0
    power = np.abs(fft.rfft(centred)) ** 2
    correlation = fft.irfft(power, len(values))[1:] / power.mean()
    return float(min(1.0, 2 * stats.norm.sf(np.abs(correlation).max() * np.sqrt(len(values))) * len(values)))


class Planted(Noise):
    """Noise made by ``make(count, draw)`` in place of the generator."""

    def __init__(self, make: Callable[[int, np.random.Generator], np.ndarray]) -> None:
        self.make, self.draw = make, np.random.default_rng(0)

    def add_to(self, total: torch.Tensor, deviation: float) -> None:
        total += torch.from_numpy(np.rint(deviation * self.make(len(total), self.draw)))


class Repeated(Noise):
    """The same stream in each step."""

    def add_to(self, total: torch.Tensor, deviation: float) -> None:
        Noise(SEED).add_to(total, deviation)


def test_the_noise_of_private_steps_is_independent_gaussian_noise_of_the_stated_scale() -> None:
    assert failed(released(Noise(SEED))) == set()


def test_a_planted_generator_that_is_right_passes_too() -> None:
    assert failed(released(Planted(lambda n, draw: draw.standard_normal(n)))) == set()


@pytest.mark.parametrize(
    ("make", "lacks"),
    [
        (lambda n, draw: draw.standard_normal(n) * 2 / 3, "deviation"),
        (lambda n, draw: draw.standard_normal(n) * 3 / 2, "deviation"),
        (lambda n, draw: draw.standard_normal(n) * 1.01, "deviation"),
        (lambda n, draw: draw.standard_normal(n) + 0.01, "mean"),
        (lambda n, draw: np.zeros(n), "deviation"),
        (lambda n, draw: np.ones(n), "mean"),
        (lambda n, draw: draw.uniform(-(3**0.5), 3**0.5, n), "shape"),
        (lambda n, draw: draw.laplace(0, 0.5**0.5, n), "shape"),
        (lambda n, draw: np.clip(draw.standard_normal(n), -3.5, 3.5), "beyond 4"),
        (lambda n, draw: draw.standard_t(12, n) * (10 / 12) ** 0.5, "beyond 4"),
        (lambda n, draw: np.repeat(draw.standard_normal(n // 2 + 1), 2)[:n], "alike"),
        (lambda n, draw: np.tile(draw.standard_normal(n // 3 + 1), 3)[:n], "alike"),
        (lambda n, draw: np.repeat(draw.standard_normal(n // 2 + 1), 2)[:n] * draw.choice([-1, 1], n), "equally large"),
    ],
)
def test_noise_that_is_not_right_is_noticed(make: Callable[..., np.ndarray], lacks: str) -> None:
    assert lacks in failed(released(Planted(make)))


def test_the_same_noise_in_two_steps_is_noticed() -> None:
    assert "alike" in failed(released(Repeated(SEED)))


def test_what_is_released_is_a_whole_multiple_of_the_lattices_step() -> None:
    step = 2.0**-32  # σ·C = 0.91, rounded up to 1
    gradients = released(Noise(SEED), steps=1, batch=1) / step
    assert np.array_equal(gradients, np.rint(gradients))
    assert np.any(gradients % 2 == 1)  # and of nothing coarser


def test_a_clipping_norm_or_noise_beyond_all_measure_is_refused() -> None:
    model = torch.nn.Linear(INPUTS, OUTPUTS)
    for bound, sigma in ((1e-200, 1.0), (1e200, 1.0), (1.0, 1e9), (1.0, 1e300)):
        with pytest.raises(ConfigurationError):
            PrivateOptimizer(
                torch.optim.SGD(model.parameters(), 0.1),
                Tape(),
                clipping_norm=bound,
                noise_multiplier=sigma,
                expected_batch=1,
                noise=Noise(SEED),
            )


# The generator


def drawn(source: Noise, count: int) -> np.ndarray:
    total = torch.zeros(count, dtype=torch.float64)
    source.add_to(total, 2.0**32)
    return total.numpy()


def test_every_count_is_given_and_added_to_what_was_there() -> None:
    for count in (0, 1, 2, 7, noise._PIECE + 3):
        total = torch.full((count,), 2.0**50, dtype=torch.float64)
        Noise(SEED).add_to(total, 2.0**32)
        assert np.array_equal(total.numpy() - 2.0**50, drawn(Noise(SEED), count))
        assert np.all(drawn(Noise(SEED), count) != 0)


def test_a_seed_gives_the_same_noise_again_and_a_neighbouring_seed_another() -> None:
    first, second, other = (Noise(bytes([*bytes(31), last])) for last in (0, 0, 1))
    for count in (3, 8, 1):
        one = drawn(first, count)
        assert np.array_equal(one, drawn(second, count))
        assert not np.isin(one, drawn(other, count)).any()


def test_no_generator_that_a_program_can_seed_has_a_part_in_it() -> None:
    found = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        found.append(drawn(Noise(secrets.token_bytes(32)), 4))
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize(("word", "radius"), [(0, 9.419), (1, 9.346), (-1, 9.346), (-(2**63), 0.0), (2**63 - 1, 0.0)])
def test_the_extreme_words_give_finite_deviates(word: int, radius: float) -> None:
    cosine, sine = noise.normal_pairs(torch.tensor([word, 0]), 1.0, torch.empty((3, 1), dtype=torch.float64))
    assert (cosine.item(), sine.item()) == pytest.approx((radius, 0.0), abs=1e-3)


def test_the_angle_goes_once_around() -> None:
    """The radius of the word 2^62 is √(2 log 2); the angles -π, -π/2, 0, π/2."""
    angles = torch.tensor([-(2**63), -(2**62), 0, 2**62])
    words, work = torch.cat([torch.full((4,), 2**62), angles]), torch.empty((3, 4), dtype=torch.float64)
    cosine, sine = noise.normal_pairs(words, 10.0, work)
    radius = 10 * (2 * np.log(2)) ** 0.5
    assert cosine.tolist() == pytest.approx([-radius, 0, radius, 0], abs=1e-12)
    assert sine.tolist() == pytest.approx([0, -radius, 0, radius], abs=1e-12)
