"""Gaussian noise in whole numbers that nobody can predict.

torch's own generators can be predicted, and stop at 5.8 standard deviations in float32 on the CPU. Here 64-bit words of
a key stream become normal deviates in float64 (Box & Muller 1958): they reach 9.4 standard deviations, and what they
lack beyond has a probability of 2^-64 for each two. They are rounded to whole numbers, because what is released lies on
a lattice (``lattice.py``).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from dpsgd.device import onto, own_stream
from dpsgd.keystream import KeyStream

_PIECE = 1 << 17
"""Deviates made at a time: what is computed with stays in the processor's cache."""


class Noise:
    """Independent noise under one seed. The same seed gives the same noise in the same order of calls and sizes."""

    def __init__(self, seed: bytes) -> None:
        """``seed``: 32 secret bytes, used for one round and never again."""
        self._stream = KeyStream(seed, "noise")
        self._words = np.empty(_PIECE, dtype=np.uint64)

    def add_to(self, total: torch.Tensor, deviation: float) -> None:
        """Add to each number its own deviate of N(0, ``deviation``²), rounded to a whole number; in place.

        Args:
            total: contiguous float64 ``[N]`` on any device.
            deviation: standard deviation before rounding, finite and at least 0.
        """
        with own_stream(total.device):
            work = torch.empty((3, (min(len(total), _PIECE) + 1) // 2), dtype=torch.float64, device=total.device)
            for start in range(0, len(total), _PIECE):
                part = total[start : start + _PIECE]
                pairs = (len(part) + 1) // 2
                words = self._words[: 2 * pairs]
                self._stream.fill(words)
                uniform = onto(torch.from_numpy(words.view(np.int64)), total.device)
                cosine, sine = normal_pairs(uniform, deviation, work[:, :pairs])
                part[:pairs].add_(cosine.round_())
                part[pairs:].add_(sine.round_()[: len(part) - pairs])


def normal_pairs(words: torch.Tensor, deviation: float, work: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two times n independent deviates of N(0, ``deviation``²), float64 ``[n]``, from uniform int64 words ``[2 n]``.

    They stand in ``work``, float64 ``[3, n]``, whose content is lost: no memory is taken anew for each piece.

    The first n words give the radius: |word| · 2^-63 is uniform in (0, 1] and finest at 0, where the tail is. The
    others give the angle in [-π, π].
    """
    radius, angle, cosine = work
    pairs = len(radius)
    radius.copy_(words[:pairs]).abs_().clamp_(min=0.5).mul_(2.0**-63).log_().mul_(-2.0 * deviation**2).sqrt_()
    angle.copy_(words[pairs:]).mul_(math.pi * 2.0**-63)
    torch.cos(angle, out=cosine)
    return cosine.mul_(radius), angle.sin_().mul_(radius)
