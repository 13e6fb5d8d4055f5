"""The noise generator: standard normal, fixed by its seed alone, with the whole tail."""

from __future__ import annotations

import secrets

import numpy as np
import pytest
from scipy import stats

from consilium_client.training import noise


def fresh() -> noise.Noise:
    return noise.Noise(secrets.token_bytes(32))


def test_is_standard_normal() -> None:
    draws = fresh().standard_normal(400_000)
    assert draws.dtype == np.float64
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(draws[:200_000], draws[200_000:])[0, 1]) < 0.02  # the two halves of a pair


def test_two_draws_differ_and_every_length_is_given() -> None:
    source = fresh()
    for count in (0, 1, 2, 7, noise._PIECE + 3):
        assert source.standard_normal(count).shape == (count,)
    assert not np.array_equal(source.standard_normal(8), source.standard_normal(8))
    assert not np.array_equal(fresh().standard_normal(8), fresh().standard_normal(8))


def test_a_seed_gives_the_same_noise_again_and_a_neighbouring_seed_another() -> None:
    first, second, other = (noise.Noise(bytes([*bytes(31), last])) for last in (0, 0, 1))
    for count in (3, 8, 1):
        drawn = first.standard_normal(count)
        assert np.array_equal(drawn, second.standard_normal(count))
        assert not np.isin(drawn, other.standard_normal(count)).any()


def test_no_generator_that_a_program_can_seed_has_a_part_in_it() -> None:
    import torch

    found = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        found.append(fresh().standard_normal(4))
    assert not np.array_equal(*found)


@pytest.mark.parametrize(("words", "radius"), [(b"\x00" * 8, 9.419), (b"\xff" * 8, 0.0)])
def test_the_extreme_words_give_finite_deviates(monkeypatch: pytest.MonkeyPatch, words: bytes, radius: float) -> None:
    monkeypatch.setattr(noise, "_key_stream", lambda key, count: words * (count // 16) + b"\x00" * (count // 2))
    assert fresh().standard_normal(2)[0] == pytest.approx(radius, abs=1e-3)
