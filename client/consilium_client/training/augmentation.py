"""Light augmentation of images: each sample is turned and shifted a little, independently of the others. Never
mirrored: left and right matter in a radiograph."""

from __future__ import annotations

import numpy as np
import torch

TURN = np.deg2rad(8.0)
SHIFT = 0.06
"""Largest turn in radians, and largest shift in each direction as a part of the edge."""


def light(images: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Images ``[B, 1, S, S]``, each moved by its own draw; what comes in from outside repeats the border."""
    count = len(images)
    if not count:
        return images
    angle = generator.uniform(-TURN, TURN, count)
    shift = generator.uniform(-2 * SHIFT, 2 * SHIFT, (count, 2))  # the grid's coordinates span -1 … 1
    cosine, sine = np.cos(angle), np.sin(angle)
    rows = [np.stack([cosine, -sine, shift[:, 0]], axis=1), np.stack([sine, cosine, shift[:, 1]], axis=1)]
    transform = torch.from_numpy(np.stack(rows, axis=1)).to(images)
    grid = torch.nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
