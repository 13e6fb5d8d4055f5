"""Light augmentation of images: each sample is turned and shifted a little, independently of the others. Never
mirrored: left and right matter in a radiograph."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

TURN = np.deg2rad(8.0)
SHIFT = 0.06
"""Largest turn in radians, and largest shift in each direction as a part of the edge."""


class Light:
    """Small turns and shifts of the first input, images ``[B, C, S, S]``; the other inputs and the targets stay."""

    def draw(self, count: int, generator: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
        """Moves of so many images, each by its own draw: angles in radians ``[count]``, and shifts ``[count, 2]`` where
        the image spans -1 … 1."""
        return generator.uniform(-TURN, TURN, count), generator.uniform(-2 * SHIFT, 2 * SHIFT, (count, 2))

    def apply(
        self,
        inputs: tuple[torch.Tensor, ...],
        targets: tuple[torch.Tensor, ...],
        moves: tuple[NDArray[np.float64], ...],
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Inputs and targets after the moves."""
        return (moved(inputs[0], *moves), *inputs[1:]), targets


def moved(images: torch.Tensor, angle: NDArray[np.float64], shift: NDArray[np.float64]) -> torch.Tensor:
    """Images ``[B, C, S, S]`` after moves as ``Light`` draws them; what comes in from outside repeats the border."""
    cosine, sine = np.cos(angle), np.sin(angle)
    rows = [np.stack([cosine, -sine, shift[:, 0]], axis=1), np.stack([sine, cosine, shift[:, 1]], axis=1)]
    transform = torch.from_numpy(np.stack(rows, axis=1)).to(images)
    grid = torch.nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
