"""Random numbers of a row's own: they follow from the row's seed, whatever its place and its neighbours.

Words come from SplitMix64 (Steele, Lea & Flood 2014) on whole numbers, so they are the same bits on every machine. They
need not be secret: whatever is dropped, one patient's clipped gradient moves the sum by at most the bound.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpsgd.device import onto

_STEP, _FIRST, _SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class RowRandomness:
    """Streams of random words, one for each row; every call takes new ones."""

    def __init__(self, seeds: Tensor) -> None:
        """``seeds``: int64 ``[B]``, one for each row; equal seeds give equal words."""
        self._seeds = seeds.cpu().numpy().view(np.uint64)
        self._calls = 0

    def kept(self, shape: tuple[int, ...], probability: float, device: torch.device) -> Tensor:
        """Bool ``[B, *shape]``, each True with this probability."""
        self._calls += 1
        numbers = int(np.prod(shape, dtype=np.int64))
        streams = _mixed(self._seeds + np.uint64(self._calls * int(_STEP) % 2**64))
        words = _mixed(streams[:, None] + np.arange(1, numbers + 1, dtype=np.uint64) * _STEP)
        kept = words < np.uint64(min(int(probability * 2.0**64), 2**64 - 1))
        return onto(torch.from_numpy(kept.reshape(-1, *shape)), device)


def seeds_of(records: npt.NDArray[np.int64], step: int, rows: int) -> Tensor:
    """Seeds int64 ``[rows]`` of the rows of a step that show these records; 0 for what is padding below them.

    A row's seed follows from its record's number, from how many rows of the same record stand right above it, and from
    the step alone: it is the same in a microbatch of any size, beside anybody.

    Args:
        records: int64 ``[n]``, the number of the record that each row shows.
        step: a word of the round's key stream, another for each step.
        rows: at least n.
    """
    first = np.flatnonzero(np.diff(records, prepend=-1) != 0)
    copies = np.arange(len(records)) - np.repeat(first, np.diff(np.append(first, len(records))))
    words = _mixed(np.uint64(step) + (records.astype(np.uint64) + np.uint64(1)) * _STEP)
    seeds = np.zeros(rows, dtype=np.uint64)
    seeds[: len(records)] = _mixed(words + copies.astype(np.uint64) * _STEP)
    return torch.from_numpy(seeds.view(np.int64))


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
