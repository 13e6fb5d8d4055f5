"""Light augmentation of images: each sample is turned and shifted a little, independently of the others. Never
mirrored: left and right matter in a radiograph."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

TURN = np.deg2rad(8.0)
SHIFT = 0.06
"""Largest turn in radians, and largest shift in each direction as a part of the edge."""


class Moves(NamedTuple):
    """Moves of images.

    Attributes:
        angles: float64 ``[B]``, radians.
        shifts: float64 ``[B, 2]``, where the image spans -1 … 1.
    """

    angles: NDArray[np.float64]
    shifts: NDArray[np.float64]

    def part(self, start: int, end: int, rows: int) -> Moves:
        """Those from ``start`` to ``end``, and none at all for the others of ``rows``."""
        pad = (0, rows - (end - start))
        return Moves(np.pad(self.angles[start:end], pad), np.pad(self.shifts[start:end], (pad, (0, 0))))


def draw(count: int, generator: np.random.Generator) -> Moves:
    """Moves of so many images, each by its own draw."""
    return Moves(generator.uniform(-TURN, TURN, count), generator.uniform(-2 * SHIFT, 2 * SHIFT, (count, 2)))


def light(images: torch.Tensor, moves: Moves) -> torch.Tensor:
    """Images ``[B, 1, S, S]``, moved; what comes in from outside repeats the border."""
    angle, shift = moves
    cosine, sine = np.cos(angle), np.sin(angle)
    rows = [np.stack([cosine, -sine, shift[:, 0]], axis=1), np.stack([sine, cosine, shift[:, 1]], axis=1)]
    transform = torch.from_numpy(np.stack(rows, axis=1)).to(images)
    grid = torch.nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
