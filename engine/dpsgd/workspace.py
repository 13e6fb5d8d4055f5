"""Reusable scratch buffers for per-sample gradients."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2**21
"""Bytes of a large page (of a small one it is 4096)."""


class Workspace:
    """Pool of buffers: after ``reset`` the same buffers are handed out again, in the same order.

    What the allocator of a CPU has from the system it gives back; to have it again takes longer than to fill it, for
    the system clears it, one small page after the other. A GPU's allocator keeps what it has.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._given = 0

    def reset(self) -> None:
        """Take all buffers back: nobody reads them any more."""
        self._given = 0

    def take(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of this shape, of ``like``'s type and on its device, that holds anything."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        numbers, place = torch.Size(shape).numel(), self._given
        self._given += 1
        if place == len(self._kept):
            self._kept.append(like.new_empty(0))
        if self._kept[place].dtype != like.dtype or self._kept[place].numel() < numbers:
            self._kept[place] = like.new_empty(0)  # before the larger one is there
            self._kept[place] = _in_large_pages(numbers, like.dtype)
        return self._kept[place][:numbers].view(shape)


def _in_large_pages(numbers: int, dtype: torch.dtype) -> Tensor:
    """Flat tensor backed by huge pages (fewer TLB misses), if the system supports them and it is at least 2 MiB."""
    size = numbers * dtype.itemsize
    if size < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numbers, dtype=dtype)
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that does not know them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + size].view(dtype)
