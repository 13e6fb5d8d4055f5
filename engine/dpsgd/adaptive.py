"""A clipping norm that follows the patients' gradients (Andrew, Thakkar, McMahan & Ramaswamy 2021, "Differentially
Private Learning with Adaptive Clipping").

After each step the norm C becomes C · exp(-η (b - γ)), b the noised fraction of patients whose gradient was shorter
than it, γ the fraction that should be (their equation 2, with steps of one site in place of rounds).

**What it costs: no more than the step.** The count is one coordinate more of the vector that a patient adds to the
step's sum, and gets the same noise. A patient's vector (clipped gradient, mark) has norm at most R = ``row_bound``:
the gradient is clipped to √(1 - ``SHARE``)·R, and a mark is at most √``SHARE``·R. So it is the same event, of norm C
and noise σ·C, and only the gradient gives up 0.8 % of its length (their section 2.2 has a second mechanism and more
noise on both, which comes to the same). C of a step follows from what earlier steps released: composition is adaptive,
and the event's cost does not depend on C.

**What the optimizer sees** is in units of C: the clipped mean gradient over C, which is post-processing. So the length
of a step, which noise fills, does not shrink and grow with C, and a learning rate that suits C = 1 suits; FedProx's
pull and weight decay are weighed against that.

**A mark is a ramp.** With u = bound / norm it is clamp((u - 1) / ``WIDTH``, -1, 1), minus the same for γ, in place of a
jump at u = 1: what rounding does to a norm (``tape.py``: where patients have several rows, the others can shift u by
2^-27 of itself) moves a mark by at most 1.13 · 2^-27 · √``SHARE`` / ``WIDTH`` · R = 1.13 · 2^-27 R, at a right angle to
what it does to the clipped gradient, 2^-27 R. Together that is 1.51 · 2^-27 R, which with the sum's own rounding stays
below ``tape.ERROR`` · R, which the lattice has in the sensitivity. A patient who is dropped has the mark 0, as one who
was not drawn.

**Why γ is taken off each mark**, not off their mean: at the right C the marks add up to 0 however many patients there
are, so nobody needs their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SHARE = 2.0**-6
"""Share of the square of a patient's vector that its mark may take."""

WIDTH = 2.0**-3
"""Half the width in u of the ramp that a mark is."""

GRADIENT, MARK = math.sqrt(1.0 - SHARE), math.sqrt(SHARE)
"""Parts of ``lattice.row_bound`` that a gradient's norm and a mark may take at most: their squares add up to 1."""

LEAST_NORM, MOST_NORM = 1e-6, 1e6
"""Range in which an adaptive clipping norm stays: float32 weights would hardly move below it, and overflow beyond."""


@dataclass(frozen=True)
class AdaptiveClipping:
    """Parameters of the rule.

    Attributes:
        quantile: γ, the fraction of the drawn patients whose gradient should be shorter than C, in (0, 1).
        rate: η, the step of log C, above 0.
    """

    quantile: float = 0.5
    rate: float = 0.2


def marks(ratios: torch.Tensor, spec: AdaptiveClipping) -> torch.Tensor:
    """Marks of patients, float64 ``[P]`` in [-1, 1]: positive where the clipping norm is too large for the patient.

    Args:
        ratios: each patient's bound / gradient norm, float64 ``[P]``; 0 for a dropped patient, infinite for a gradient
            of zero.
        spec: the rule.

    >>> marks(torch.tensor([0.5, 1.0, 2.0, 0.0]), AdaptiveClipping(quantile=0.5, rate=0.2)).tolist()
    [-1.0, 0.0, 1.0, 0.0]
    """
    target = 2.0 * spec.quantile - 1.0
    found = (((ratios - 1.0) / WIDTH).clamp(-1.0, 1.0) - target) / (1.0 + abs(target))
    return torch.where(ratios > 0, found, torch.zeros_like(found))


def following(norm: float, total: float, expected_batch: int, spec: AdaptiveClipping) -> float:
    """Clipping norm of the next step.

    Args:
        norm: C of this one.
        total: the noised sum of marks.
        expected_batch: patients that a step expects.

    >>> round(following(1.0, 4.0, 8, AdaptiveClipping(quantile=0.5, rate=0.2)), 3)  # half the batch is too far below
    0.951
    """
    target = 2.0 * spec.quantile - 1.0
    off = 0.5 * (1.0 + abs(target)) * total / expected_batch  # b - γ
    off = min(max(off, -spec.quantile), 1.0 - spec.quantile)  # a fraction, whatever the noise
    return min(max(norm * math.exp(-spec.rate * off), LEAST_NORM), MOST_NORM)
