"""Measurement of the noise in an opened sum, by coordinates that no patient touches.

In a study with ``privacy.sums.empty_coordinates`` each site's vector ends in so many numbers that are its noise and
nothing else. Opened, their mean square over what the contract says of so many survivors is χ² by its degrees: so the
sum itself shows whether every site's noise is in it, at no cost of ε. It finds faults: a site that adds none, or that
of another clipping norm. It does not find a site that adds noise to these coordinates alone.

    deviations = Σ r · (found / expected - 1) / √(2 Σ r)        over the sums so far, r coordinates each

One of ten sites without noise is 2 deviations off after one sum of 1024 coordinates, and 6 after eight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from consilium_shared.config import Strict
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.private_sums import MOST_EMPTY, Grid
from consilium_shared.study import Study

LIMIT = 5.5
"""Deviations at which a study stops: honest noise is off by so much once in 25 million looks, at the last one, two,
four and so on sums and at all."""

_ROUNDING = 1 / 12
"""Variance that rounding to whole numbers adds to each site's noise."""


class MeasuredNoise(Strict):
    """Noise that the empty coordinates of one opened sum show, in squared steps of the study's grid."""

    found: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Mean square of the empty coordinates."""
    expected: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Mean square that the contract's noise at every survivor gives."""
    coordinates: Annotated[int, Field(ge=1, le=MOST_EMPTY)]


def empty_coordinates(study: Study) -> int:
    """Number of empty coordinates at the end of a study's updates; 0 where it has none."""
    return 0 if study.privacy.sums is None else study.privacy.sums.empty_coordinates


def noise_in_steps(study: Study, grid: Grid) -> float:
    """Standard deviation of one site's noise in steps of the grid, of a study with ``privacy.sums``."""
    plan = plan_of(study, 0)
    assert isinstance(plan, PrivacyPlan)  # noqa: S101  (sums are for studies with privacy)
    return plan.own_noise_multiplier * plan.clipping_norm / grid.step


def expected_noise(study: Study, survivors: int, parameters: int) -> float:
    """Mean square of an empty coordinate over so many survivors, in squared steps of the grid of so many numbers."""
    return survivors * (noise_in_steps(study, Grid.of(study, parameters)) ** 2 + _ROUNDING)


def measured_noise(
    study: Study, survivors: int, total: npt.NDArray[np.unsignedinteger[Any]], parameters: int
) -> MeasuredNoise | None:
    """Measurement of an opened update, uint32 ``[parameters + r]``; None where it has no empty coordinates."""
    if total.size == parameters:
        return None
    numbers = total[parameters:].view(np.int32).astype(np.float64)
    found, expected = float(np.mean(numbers**2)), expected_noise(study, survivors, parameters)
    return MeasuredNoise(
        found=float(f"{found:.6g}"), expected=float(f"{expected:.6g}"), coordinates=total.size - parameters
    )


def deviations(measured: Iterable[MeasuredNoise]) -> float:
    """Standard deviations by which the noise of these sums together is above what it should be; 0 for none.

    >>> honest = MeasuredNoise(found=101.0, expected=100.0, coordinates=1024)
    >>> round(deviations([honest] * 8), 2), round(deviations([honest.model_copy(update={"found": 90.0})] * 8), 2)
    (0.64, -6.4)
    """
    off, coordinates = 0.0, 0
    for each in measured:
        off += each.coordinates * (each.found / each.expected - 1)
        coordinates += each.coordinates
    return off / math.sqrt(2 * coordinates) if coordinates else 0.0


def doubt(measured: Iterable[MeasuredNoise]) -> str | None:
    """Reason to stop a study whose opened sums, in order, measure so much noise; None where it is what it should be.

    The last sums are looked at by themselves too: noise that goes missing late is not hidden by what came before.
    """
    found = list(measured)
    lengths = {min(2**power, len(found)) for power in range(len(found).bit_length() + 1)}
    off = max((deviations(found[len(found) - each :]) for each in lengths), key=abs, default=0.0)
    if abs(off) <= LIMIT:
        return None
    amount = "less" if off < 0 else "more"
    return (
        f"the empty coordinates of the opened sums show {amount} noise than the contract's at every site "
        f"({abs(off):.1f} standard deviations; {LIMIT:g} stop the study): somewhere other noise is added than was "
        "approved, or none; and where noise is missing, ε is larger than the ledgers say"
    )
