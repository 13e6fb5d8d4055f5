"""Lattice of a private sum: the whole multiples of a step that depends on no data.

**The attack.** Textbook noise in floating point leaves gaps and unequal spacings that depend on what the noise was
added to, and so gives the sum away exactly (Mironov, CCS 2012); and adding floating-point numbers in another order, or
one more of them, can move the sum of all the others by far more than the sensitivity of the sum of real numbers
(Casacuberta, Shoemate, Vadhan & Wagaman, CCS 2022).

**What is done.** With g = ``Lattice.step``, a power of two: the sum of the patients' clipped gradients is rounded to
whole multiples of g, and so is each coordinate of the noise σ·C·Z; the two are added as whole numbers below 2^53 in
float64, which is exact. For whole K, K + round(x) = round(K + x), but for exact halves, whose probability is 0. So what
is released, g · (K + round(σ·C·Z / g)), is a rounding of g·K + σ·C·Z: post-processing of the Gaussian mechanism on a
sum g·K whose L2 sensitivity is the most that one patient can move it. That is the norm of its own clipped gradient;
what it does to the rounding of everybody else's, at most ``tape.ERROR`` · C for each of up to ``Lattice.patients`` in
the sum; and g·√d, since rounding to the lattice moves each of d coordinates of either sum by at most g / 2. So
gradients are clipped to ``Lattice.row_bound`` = C - patients · ERROR · C - g·√d, and the sensitivity is at most C. This
is the way of "Secure Noise Generation" (Google 2020), as for the discrete Gaussian of Canonne, Kamath & Steinke
(NeurIPS 2020), with a rounded Gaussian in place of a discrete one: drawn without loops that depend on what was drawn,
and accounted as the continuous Gaussian that it is made of. Opacus's alternative, four deviates added for each one
(Holohan & Braghin, ESORICS 2021), costs four times as much, makes an attack on the noise harder rather than impossible,
and leaves the sum as it is.

**Why 2^-32.** g = 2^-32 · max(1, σ)·C, rounded up to a power of two: 2^20 patients of 2^32 steps each stay below 2^53;
for 11 million parameters clipping gives up 2·10^-6·max(1, σ) of C; and a step is still 2^20 float64 numbers wide where
the deviates have size 1.

**A given grid.** ``Lattice.on_grid`` takes g from a study whose sums are added up over several sites as whole numbers.
There g is coarser, 2^-14 of C or so, and the noise many steps wide all the same. K, the clipped gradients' rounded sum,
is cut off at a bound first: a projection, which brings no two sums further apart. The rest holds word for word.

**More patients than that.** The number of patients of a plan has noise, and ``Lattice.patients`` takes in ten of its
deviations: by chance a step never draws more. Where a hospital's patients have become many times more since the
approval, it may; the sum goes on all the same, since whether it fails would be for one patient to decide. Each patient
beyond moves what the others come to by ``tape.ERROR`` · C more, 10^-8 of the clipping norm.

**Covered:** the released numbers and their spacing, the order and splitting of the sum, the rounding of norms, factors
and products.
**Not covered:** (1) the probabilities are those of Box & Muller in float64, whose logarithm, cosine and sine err in the
last bits: that moves the probability of one step by about 2^-20 of itself, and nobody has proved how such errors add up
over d. (2) That a patient's gradient, before it is clipped, is the same whoever else is drawn: so ``isolation`` has it,
as far as the machine's test goes (``neighbours``); and where passes break off in the middle of a round, what follows is
computed in smaller pieces (``steps``; that a patient of many records brings this about is ruled out before the charge,
``rehearsal``). (3) How long a step takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from consilium_shared.errors import ConfigurationError
from dpsgd.tape import ERROR

PATIENTS = 2**20
"""Most patients that a sum is made for; a contract's expected batch is at most a million."""

SMALLEST, _LARGEST = 2.0**-20, 2.0**300
"""Between them a clipping norm lies: what float32 has no room for when a norm's numbers are squared is far below."""


@dataclass(frozen=True)
class Lattice:
    """Lattice on which one mechanism's sums lie.

    Attributes:
        step: g, a power of two.
        row_bound: L2 norm to which gradients are clipped so that one patient moves the rounded sum by at most C.
        patients: most that one sum is made for.
    """

    step: float
    row_bound: float
    patients: int

    @classmethod
    def of(cls, clipping_norm: float, noise_multiplier: float, parameters: int, expected: float) -> Lattice:
        """For C, σ (0 is taken too), d numbers in a gradient and the patients that a step expects at most
        (``PrivacyPlan.expected``). With Poisson sampling a step draws twice as many and a thousand more with a
        probability below 10^-100; where that is beyond ``PATIENTS``, it draws so many with one below 10^-20.

        Whether it is refused depends on C no further than that C lies between the bounds: what adaptive clipping makes
        of a norm in the middle of a round is never refused if the first was not.

        Raises:
            ConfigurationError: C, σ or the batch so large that rounding would take more than a fiftieth of C.
        """
        largest = max(1.0, noise_multiplier) * clipping_norm
        if not SMALLEST < clipping_norm <= largest < _LARGEST:
            raise ConfigurationError(f"clipping_norm {clipping_norm:g}, noise {noise_multiplier:g}: too far from 1")
        if expected + 10.0 * math.sqrt(expected) > PATIENTS:
            raise ConfigurationError(f"a step of {expected:g} patients: the sum of more than {PATIENTS} is too coarse")
        step = 2.0 ** (math.ceil(math.log2(largest)) - 32)
        patients = _made_for(expected)
        widest = 2.0**-31 * max(1.0, noise_multiplier)  # of the step in units of C, whichever C is
        if patients * ERROR + widest * math.sqrt(parameters) > 1 / 50:
            raise ConfigurationError(f"noise multiplier {noise_multiplier:g} is too large for {parameters} parameters")
        return cls(step, _row_bound(clipping_norm, step, parameters, patients), patients)

    @classmethod
    def on_grid(cls, step: float, clipping_norm: float, parameters: int, expected: float) -> Lattice:
        """The lattice of a given step g, a power of two; the rest as of ``of``. The noise may be of any size: coarse
        or fine, it is rounded to whole steps, and what is lost to rounding is taken off the bound of the gradients.

        Raises:
            ConfigurationError: a step that is no power of two, or with which rounding takes more than a fiftieth of C.
        """
        if math.frexp(step)[0] != 0.5 or not SMALLEST < clipping_norm < _LARGEST:
            raise ConfigurationError(f"a grid of {step:g} for clipping_norm {clipping_norm:g}: no power of two, or far")
        patients = _made_for(expected)
        bound = _row_bound(clipping_norm, step, parameters, patients)
        if bound < clipping_norm * (1 - 1 / 50):
            raise ConfigurationError(f"a grid of {step:g} is too coarse for {parameters} parameters")
        return cls(step, bound, patients)


def _made_for(expected: float) -> int:
    return min(PATIENTS, math.ceil(2.0 * expected) + 1024)


def _row_bound(clipping_norm: float, step: float, parameters: int, patients: int) -> float:
    return clipping_norm - (patients * ERROR * clipping_norm + step * math.sqrt(parameters))
