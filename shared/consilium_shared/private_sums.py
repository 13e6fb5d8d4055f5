"""Plan in which every opened sum is one private step of all sites together: its part of the contract, and its numbers.

In a round each site draws its patients with the contract's probability q, clips each one's gradient to C, adds them up,
rounds to the grid and adds its own whole noise of σ·C, as integers; nothing of the site's comes after the noise. What
is opened is the sum of the clipped gradients of all drawn patients of all sites, and noise. The rest is the
coordinator's: the mean over the expected number of patients, the step against it, momentum or Adam. So

    update = - lr · g · (sum of the sites' integers) / expected_batch

with ``training.optimizer.lr`` and ``training.expected_batch``, of all sites together. q and σ are the same at every
site and follow from no number of patients, so none is released.

**The grid.** g is a power of two, near C · 2^-e. The more numbers a gradient has, the finer: rounding takes a
two-hundredth of C from the bound to which gradients are clipped (``dpsgd/lattice.py``). The sum of twice as many
patients as a step expects, all with the same gradient, takes half of the ring of 2^32; the noise has the other half.
Beyond that numbers wrap around: that is computed on what is noised already, so it can cost accuracy and no privacy.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from consilium_shared.config import Strict
from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import SITES
from consilium_shared.shared_noise import LEAST_DEVIATION

if TYPE_CHECKING:
    from consilium_shared.study import Study

BITS = 32
"""Width of the integers."""
MOST_EMPTY = 2**16
"""Most empty coordinates of a sum."""
_LOST = 200.0
"""Rounding takes C over this from the clipping bound."""
LEAST_EMPTY = 256
"""Fewest empty coordinates of a study whose sites share the noise: a missing share is to be seen."""
_TAIL, _SITES = 12.0, 64
"""Deviations of the noise of so many sites that have room in the ring."""

Integers = npt.NDArray[np.uint32]


class PrivateSums(Strict):
    """The key ``privacy.sums``: every opened sum is one private step of all sites together."""

    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability with which each patient of each site is in a step, independently."""
    honest_sites: Annotated[int, Field(ge=1, le=SITES)] = 1
    """Number of honest sites whose noise together is the whole: 1, each site's own is the whole. Of m, each adds σ/√m,
    and no sum is opened with fewer than m beside all ``aggregation.corrupt_sites``."""
    empty_coordinates: Annotated[int, Field(ge=0, le=MOST_EMPTY)] = 0
    """Coordinates of each sum that no patient touches: opened they are noise alone, and measure it
    (``privacy/measured_noise.py``)."""


@dataclass(frozen=True)
class Grid:
    """Integers of a site's summand.

    Attributes:
        step: g, a power of two.
        limit: largest absolute coordinate of a site's sum before the noise, in steps; a larger one is cut off.
        per_step: what a step of the grid, summed, moves the model by: lr · g / expected_batch.
    """

    step: float
    limit: int
    per_step: float

    @classmethod
    def of(cls, study: Study, parameters: int) -> Grid:
        """The grid of a study with ``privacy.sums`` that trains so many numbers.

        Raises:
            ConfigurationError: the ring is too narrow for so many patients and numbers.
        """
        training, norm = study.training, study.privacy.clipping_norm
        if study.privacy.sums is None or norm is None:
            raise ConfigurationError(f"study {study.study} has no privacy.sums")
        wanted = math.ceil(math.log2(_LOST * math.sqrt(parameters)))
        room = math.floor(math.log2(2.0 ** (BITS - 2) / (2.0 * training.expected_batch)))
        exponent = min(wanted, room)
        if 2.0**-exponent * math.sqrt(parameters) > 1 / 50:
            raise ConfigurationError(
                f"{training.expected_batch} patients in a step and {parameters} trained numbers are too many for sums "
                "of 32 bits: take a smaller privacy.sums.sampling_rate with its expected_batch, or train a part of the "
                "model (model.trainable)"
            )
        step = 2.0 ** (math.ceil(math.log2(norm)) - exponent)
        per_step = training.optimizer.lr * step / training.expected_batch
        if per_step < sys.float_info.min or study.aggregation.coordinate_bound / per_step == math.inf:
            raise ConfigurationError(f"a step of lr {training.optimizer.lr:g} moves no model: take a larger one")
        limit = min(2 ** (BITS - 1) - 1, math.floor(study.aggregation.coordinate_bound / per_step))
        return cls(step=step, limit=max(1, limit), per_step=per_step)

    def check_noise(self, deviation: float, honest_sites: int = 1) -> None:
        """Raises ConfigurationError where noise of that standard deviation at each site has no room in the ring, or is
        too fine a share for a sum of rounded numbers to be the Gaussian that is accounted."""
        if honest_sites > 1 and deviation < LEAST_DEVIATION * self.step:
            raise ConfigurationError(
                f"a share of {deviation:g} is too small beside the grid's step {self.step:g}: take fewer honest_sites"
            )
        if _TAIL * math.sqrt(_SITES) * deviation / self.step > 2.0 ** (BITS - 2):
            raise ConfigurationError(
                f"noise of {deviation:g} is too large for sums of 32 bits: take fewer rounds, a larger ε, or train a "
                "part of the model (model.trainable)"
            )

    def update(self, total: Integers, out: npt.NDArray[np.float32]) -> None:
        """The model's update from opened integers uint32 ``[t]`` modulo 2^32, into float32 ``[t]``; may share memory.

        >>> grid, found = Grid(step=0.5, limit=9, per_step=0.25), np.zeros(3, np.float32)
        >>> grid.update(np.array([2, 0, 2**32 - 1], np.uint32), found)
        >>> found.tolist()
        [-0.5, 0.0, 0.25]
        """
        np.multiply(total.view(np.int32), -self.per_step, out=out, casting="unsafe")
        out += np.float32(0.0)  # no negative zero


def check(study: Study) -> None:
    """Raises ValueError for a contract with ``privacy.sums`` and something that has no place beside it."""
    training, privacy, rules = study.training, study.privacy, study.aggregation
    if privacy.sums is None:
        return
    own = training.optimizer
    wrong: list[tuple[Any, str]] = [
        (privacy.mode != "dp", "privacy.sums is for studies with privacy"),
        (training.steps_per_round != 1, "privacy.sums takes steps_per_round: 1, a step a sum"),
        (
            (own.name, own.momentum, own.weight_decay, training.proximal, own.l1, own.schedule)
            != ("sgd", 0.0, 0.0, 0.0, 0.0, None),
            "privacy.sums takes optimizer: {name: sgd, lr: …} with nothing else and no proximal, for nothing "
            "of a site's comes after its noise; aggregation.optimizer has momentum and Adam",
        ),
        (
            training.class_sampling,
            "privacy.sums takes no class_sampling: its step is as long as everybody's rate makes it",
        ),
        (training.adaptive_clipping, "privacy.sums takes no adaptive_clipping: all sites have one clipping norm"),
        (rules.weighting != "patients", "privacy.sums takes weighting: patients, each counts the same everywhere"),
        (rules.ring_bits != BITS, f"privacy.sums takes ring_bits: {BITS}"),
    ]
    for found, why in wrong:
        if found:
            raise ValueError(why)
    if privacy.sums.honest_sites > 1:
        _check_shared(study, privacy.sums)


def _check_shared(study: Study, sums: PrivateSums) -> None:
    """Raises ValueError for a contract with shared noise in which a sum could hold less of it than is charged."""
    rules, honest, liars = study.aggregation, sums.honest_sites, study.aggregation.corrupt_sites
    if rules.threat_model != "malicious-server":
        raise ValueError(
            "privacy.sums.honest_sites takes threat_model: malicious-server, for a sum that is opened twice with other "
            "sites has other noise than is charged"
        )
    if not isinstance(liars, int) or liars < 1:
        raise ValueError(
            "privacy.sums.honest_sites takes a number as aggregation.corrupt_sites, at least 1: every other hospital "
            "knows its own share of the noise"
        )
    if rules.min_sites != honest + liars:
        raise ValueError(
            f"aggregation.min_sites is {rules.min_sites}, and with {honest} honest_sites beside {liars} corrupt_sites "
            f"it is {honest + liars}: so many are in every sum, and the noise of the honest ones is the whole"
        )
    if sums.empty_coordinates < LEAST_EMPTY:
        raise ValueError(
            f"privacy.sums.honest_sites takes empty_coordinates, {LEAST_EMPTY} at least: they show whether a share is "
            "missing"
        )


def check_contract(study: Study) -> None:
    """Raises ValueError for a received contract with shared noise that leaves how much to each site."""
    sums = study.privacy.sums
    if sums is not None and sums.honest_sites > 1 and study.privacy.noise_multiplier == "auto":
        raise ValueError("shared noise protects the other sites' patients: its noise_multiplier stands in the contract")
