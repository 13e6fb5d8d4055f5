"""Averages over areas have the same bits however they are worked out, and no side takes a machine's memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from consilium_shared.preparation import resample
from consilium_shared.preparation.foreign import Unusable


@pytest.mark.parametrize(("old", "new"), [(1, 7), (31, 24), (2500, 224), (24, 31)])
def test_parts_of_a_table_of_shares_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, old: int, new: int) -> None:
    whole = resample._shares(old, new)
    edges, pixel = np.linspace(0, old, new + 1), np.arange(old)[None, :]
    overlap = np.clip(np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel), 0.0, None)
    np.testing.assert_array_equal(whole, np.float32(overlap / overlap.sum(axis=1, keepdims=True)))
    monkeypatch.setattr(resample, "_NUMBERS", 3 * old)
    np.testing.assert_array_equal(resample._shares(old, new), whole)


def test_a_picture_of_one_endless_row_is_refused_and_the_longest_takes_little() -> None:
    with pytest.raises(Unusable, match="a side of more than 65535 pixels"):
        resample.resize(np.zeros((1, 100_000_000), dtype=np.float32), 224)
    tracemalloc.start()
    try:
        resample.resize(np.zeros((1, 65_535), dtype=np.float32), 64)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()
    assert resample._kept.cache_info().maxsize == 64
