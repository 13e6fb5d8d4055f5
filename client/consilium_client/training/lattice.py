"""The numbers that a private sum may take: whole multiples of a step that depends on no data.

**The attack.** Textbook noise in floating point leaves gaps and unequal spacings that depend on what the noise was
added to, and so gives the sum away exactly (Mironov, CCS 2012); and adding floating-point numbers in another order, or
one more of them, can move the sum of all the others by far more than the sensitivity of the sum of real numbers
(Casacuberta, Shoemate, Vadhan & Wagaman, CCS 2022).

**What is done.** With g = ``Lattice.step``, a power of two: each patient's clipped gradient is rounded, alone, to whole
multiples of g; so is each coordinate of the noise σ·C·Z; all are added as whole numbers below 2^53 in float64, which is
exact in any order. For whole K, K + round(x) = round(K + x), but for exact halves, whose probability is 0. So what is
released, g · (K + round(σ·C·Z / g)), is a rounding of g·K + σ·C·Z: post-processing of the Gaussian mechanism on a sum
g·K whose L2 sensitivity is the largest norm of one patient's rounded gradient. Rounding moves each of d coordinates by
at most g / 2, so gradients are clipped to ``Lattice.row_bound`` = (C - g·√d / 2) / (1 + 10^-6) before, and the
sensitivity is at most C. This is the way of "Secure Noise Generation" (Google 2020), as for the discrete Gaussian of
Canonne, Kamath & Steinke (NeurIPS 2020), with a rounded Gaussian in place of a discrete one: drawn without loops that
depend on what was drawn, and accounted as the continuous Gaussian that it is made of. Opacus's alternative, four
deviates added for each one (Holohan & Braghin, ESORICS 2021), costs four times as much, makes an attack on the noise
harder rather than impossible, and leaves the sum as it is.

**Why 2^-32.** g = 2^-32 · max(1, σ)·C, rounded up to a power of two: 2^20 patients of 2^32 steps each stay below 2^53;
for 11 million parameters clipping gives up 10^-6·max(1, σ) of C; and a step is still 2^20 float64 numbers wide where
the deviates have size 1.

**Covered:** the released numbers and their spacing, the order and splitting of the sum, the rounding of norms, factors
and products (10^-6 is above d · 2^-52 for any d < 2^32).
**Not covered:** (1) the probabilities are those of Box & Muller in float64, whose logarithm, cosine and sine err in the
last bits: that moves the probability of one step by about 2^-20 of itself, and nobody has proved how such errors add up
over d. (2) That a patient's gradient, before it is clipped, is the same whoever else is drawn: ``rows`` makes it so on
the CPUs where that was tested; GPU kernels were not. (3) How long a step takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from consilium_shared.errors import ConfigurationError

PATIENTS = 2**20
"""Most patients in one sum; a contract's expected batch is at most a million."""

_SLACK = 1.0 + 1e-6
_SMALLEST, _LARGEST = 2.0**-300, 2.0**300


@dataclass(frozen=True)
class Lattice:
    """Where one mechanism's sums lie.

    Attributes:
        step: g, a power of two.
        row_bound: L2 norm to which a gradient is clipped so that it has norm at most C once rounded.
    """

    step: float
    row_bound: float

    @classmethod
    def of(cls, clipping_norm: float, noise_multiplier: float, parameters: int) -> Lattice:
        """For C, σ (0 is taken too) and d numbers in a gradient.

        Raises:
            ConfigurationError: C or σ so far from 1 that rounding would take more than a hundredth of C.
        """
        largest = max(1.0, noise_multiplier) * clipping_norm
        if not _SMALLEST < clipping_norm <= largest < _LARGEST:
            raise ConfigurationError(f"clipping_norm {clipping_norm:g}, noise {noise_multiplier:g}: too far from 1")
        step = 2.0 ** (math.ceil(math.log2(largest)) - 32)
        lost = step * math.sqrt(parameters) / 2
        if lost > clipping_norm / 100:
            raise ConfigurationError(f"noise multiplier {noise_multiplier:g} is too large for {parameters} parameters")
        return cls(step=step, row_bound=(clipping_norm - lost) / _SLACK)
