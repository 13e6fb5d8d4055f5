"""Memory for what is formed anew in every physical batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Room:
    """Tensors that are given out again, in the same order, after each ``empty``.

    What the allocator of a CPU has from the system it gives back, and to have it again takes longer than to fill it:
    the system clears it page by page. A GPU's allocator keeps it by itself.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._given = 0

    def empty(self) -> None:
        """Nothing of what was given out is needed any more."""
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
            self._kept[place] = like.new_empty(numbers)
        return self._kept[place][:numbers].view(shape)
