"""The noise generator: standard normal, fresh every time, with the whole tail."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from consilium_client.training import noise


def test_is_standard_normal() -> None:
    draws = noise.standard_normal(400_000)
    assert draws.dtype == np.float64
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(draws[:200_000], draws[200_000:])[0, 1]) < 0.02  # the two halves of a pair


def test_two_draws_differ_and_every_length_is_given() -> None:
    for count in (0, 1, 2, 7, noise._PIECE + 3):
        assert noise.standard_normal(count).shape == (count,)
    assert not np.array_equal(noise.standard_normal(8), noise.standard_normal(8))


def test_no_generator_that_a_program_can_seed_has_a_part_in_it() -> None:
    import torch

    found = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        found.append(noise.standard_normal(4))
    assert not np.array_equal(*found)


@pytest.mark.parametrize(("words", "radius"), [(b"\x00" * 8, 9.419), (b"\xff" * 8, 0.0)])
def test_the_extreme_words_give_finite_deviates(monkeypatch: pytest.MonkeyPatch, words: bytes, radius: float) -> None:
    monkeypatch.setattr(noise, "_key_stream", lambda count: words * (count // 16) + b"\x00" * (count // 2))
    assert noise.standard_normal(2)[0] == pytest.approx(radius, abs=1e-3)
