"""Summand of one site in a round's secure sum, and what is read off the sum.

    training     update   [t]      weight × update in fixed point, modulo 2^ring_bits; or, in a study with
                                   privacy.sums, the site's integers (private_sums.py), of which the last are of
                                   empty coordinates where the study has some (privacy/measured_noise.py)
                 weight   [1]      modulo 2^64
                 counts   [1 + k]  where they ride along: how many sites counted, and their counts, modulo 2^64
    evaluation   counts   [1 + k]

The counts that ride on a round's updates are of the model that the round began with: no exchange of its own is needed
for them, but after the last round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared.errors import DataError
from consilium_shared.metrics import Layout
from consilium_shared.privacy.measured_noise import MeasuredNoise, empty_coordinates, measured_noise, noise_in_steps
from consilium_shared.private_sums import Grid
from consilium_shared.secagg.ring import FixedPoint, integers_limit
from consilium_shared.secagg.terms import Purpose, Segment
from consilium_shared.study import Study

PIECE = 1 << 17
"""Coordinates worked on at a time: a megabyte of float64."""
_ROUNDING = 1e-5
"""Relative error of float32 beside what it is added to."""
_DEVIATIONS = 10.0
"""Deviations of the noise that no coordinate of ten million and no length is off by, but for a chance of 1e-14."""


def counts_with(study: Study, number: int) -> bool:
    """True where updates of round ``number`` carry evaluation counts of the model after round ``number`` - 1."""
    return number - 1 in study.evaluated_rounds


def segments(study: Study, purpose: Purpose, number: int, parameters: int) -> tuple[Segment, ...]:
    """The parts of what is summed; ``parameters``: those that the study trains (``models.vector.width``)."""
    counts = Segment(name="counts", bits=64, length=1 + Layout.of(study).width)
    if purpose == "evaluation":
        return (counts,)
    update = Segment(name="update", bits=study.aggregation.ring_bits, length=parameters + empty_coordinates(study))
    weight = Segment(name="weight", bits=64, length=1)
    return (update, weight, counts) if counts_with(study, number) else (update, weight)


def fixed_point(study: Study, sites: int) -> FixedPoint:
    """Encoding of updates in a cohort of so many sites."""
    return FixedPoint(study.aggregation.ring_bits, sites, study.aggregation.coordinate_bound)


def largest_weight(study: Study) -> int:
    """The weight that the encoding of updates is made for."""
    equal = study.aggregation.weighting == "equal" or study.privacy.sums is not None
    return 1 if equal else study.aggregation.max_weight


def bound(update: npt.NDArray[np.float32], study: Study) -> float:
    """Scale an update [t] down to the study's norm bound and cut its coordinates off at theirs, in place.

    Returns:
        The factor of the scaling, 1 where nothing was scaled.

    Raises:
        DataError: a coordinate that is not finite.
    """
    total = 0.0
    for start in range(0, update.size, PIECE):
        exact = update[start : start + PIECE].astype(np.float64)
        total += float(exact @ exact)
    if not math.isfinite(total):
        raise DataError("the update has coordinates that are not finite")
    factor = min(1.0, study.aggregation.norm_bound / math.sqrt(total)) if total > 0 else 1.0
    limit = study.aggregation.coordinate_bound
    for start in range(0, update.size, PIECE):
        piece = update[start : start + PIECE]
        if factor < 1.0:
            np.multiply(piece, np.float32(factor), out=piece)
        np.clip(piece, -limit, limit, out=piece)
    return factor


def counts_segment(counts: npt.NDArray[np.int64], sites: int, *, counted: bool) -> npt.NDArray[np.uint64]:
    """The segment of that name, for a cohort of ``sites``; zeros where this site adds none (``counted``).

    Raises:
        DataError: a count so large that the sum could overflow.
    """
    found = np.zeros(1 + counts.size, dtype=np.int64)
    if counted:
        found[0], found[1:] = 1, counts
    if int(np.abs(found).max(initial=0)) > integers_limit(sites):
        raise DataError("a count is too large to be added up")
    return found.view(np.uint64)


@dataclass(frozen=True)
class Opened:
    """Contents of an opened sum.

    Attributes:
        mean: float32 [t], Σ wᵢ·uᵢ / Σ wᵢ; empty without a segment of updates, and where the sum was spoilt.
        weight: Σ wᵢ; 0 without updates.
        counted: how many sites added counts.
        counts: int64, their sum; None where none were asked for.
        implausible: why honest sites could not have given this sum, or None.
        norm: L2 norm of ``mean``; None where there is none.
        noise: what the empty coordinates measure; None where the study has none, and where the sum was spoilt.
    """

    mean: npt.NDArray[np.float32]
    weight: int
    counted: int
    counts: npt.NDArray[np.int64] | None
    implausible: str | None
    norm: float | None = None
    noise: MeasuredNoise | None = None


def read(
    study: Study,
    purpose: Purpose,
    cohort: int,
    survivors: int,
    totals: dict[str, npt.NDArray[np.unsignedinteger[Any]]],
    counting: int | None = None,
) -> Opened:
    """Contents of an opened sum over ``survivors`` of a ``cohort``. Totals of updates in 32 bits are overwritten.

    ``counting``: how many of the survivors add counts, as they said with their keys; None where that is not known.
    Where the weight or the number of sites that counted is none that sites could have, nothing of the sum is used.
    """
    counted, counts = 0, None
    if "counts" in totals:
        whole = totals["counts"].view(np.int64)
        counted, counts = int(whole[0]), whole[1:]
    if not 0 <= counted <= survivors:
        return _spoilt(f"{counted} of {survivors} sites say that they counted")
    if counting is not None and counted > counting:
        return _spoilt(f"{counted} of {survivors} sites say that they counted, and {counting} had offered to")
    if purpose == "evaluation":
        return Opened(np.zeros(0, dtype=np.float32), 0, counted, counts, None)
    weight = int(totals["weight"].view(np.int64)[0])
    if not survivors <= weight <= survivors * largest_weight(study):
        return _spoilt(f"the summed weight of {survivors} sites is {weight}")
    if study.privacy.sums is not None:
        return _of_private_sum(study, survivors, totals["update"], weight, counted, counts)
    total, encoding = totals["update"], fixed_point(study, cohort)
    mean = total.view(np.float32) if total.itemsize == 4 else np.empty(total.size, dtype=np.float32)
    encoding.decode(total, mean, divisor=weight / largest_weight(study))
    slack = survivors * encoding.error * largest_weight(study) / weight
    norm, largest = _size(mean)
    return Opened(mean, weight, counted, counts, _implausible(study, mean.size, norm, largest, slack), norm)


def _of_private_sum(
    study: Study,
    survivors: int,
    total: npt.NDArray[np.unsignedinteger[Any]],
    weight: int,
    counted: int,
    counts: npt.NDArray[np.int64] | None,
) -> Opened:
    """Contents of an opened sum of gradients: ``mean`` is the step against their mean over the expected patients.

    Its bounds are those of the sites' gradients, and beside them the noise, whose size is known.
    """
    size = total.size - empty_coordinates(study)
    measured = measured_noise(study, survivors, total, size)
    grid, total = Grid.of(study, size), total[:size]
    mean = total.view(np.float32)
    grid.update(total, mean)
    noise = noise_in_steps(study, grid) * math.sqrt(survivors) * grid.per_step
    norm, largest = _size(mean)
    bounds, implausible = study.aggregation, None
    if norm > bounds.norm_bound * (1 + _ROUNDING) + noise * (math.sqrt(mean.size) + _DEVIATIONS):
        implausible = (
            f"the update has norm {norm:.4g}; norm_bound is {bounds.norm_bound:g}, and the noise explains "
            f"{noise * math.sqrt(mean.size):.4g} more"
        )
    elif largest > survivors * bounds.coordinate_bound * (1 + _ROUNDING) + noise * _DEVIATIONS:
        implausible = f"a coordinate of the update is {largest:.4g}: beyond coordinate_bound at every site, and noise"
    return Opened(mean, weight, counted, counts, implausible, norm, measured)


def _spoilt(why: str) -> Opened:
    return Opened(np.zeros(0, dtype=np.float32), 0, 0, None, f"{why}: somebody spoilt the sum")


def _size(mean: npt.NDArray[np.float32]) -> tuple[float, float]:
    """L2 norm and largest absolute coordinate."""
    square, largest = 0.0, 0.0
    for start in range(0, mean.size, PIECE):
        piece = mean[start : start + PIECE].astype(np.float64)
        square += float(piece @ piece)
        largest = max(largest, float(np.abs(piece).max(initial=0.0)))
    return math.sqrt(square), largest


def _implausible(study: Study, size: int, norm: float, largest: float, slack: float) -> str | None:
    """The mean of vectors within a bound is within it, but for the rounding, ``slack`` on each coordinate."""
    bounds = study.aggregation
    if norm > bounds.norm_bound * (1 + _ROUNDING) + slack * math.sqrt(size):
        return f"the mean update has norm {norm:.4g}, and every site's own is at most {bounds.norm_bound:g}"
    if largest > bounds.coordinate_bound * (1 + _ROUNDING) + slack:
        return f"a coordinate of the mean update is {largest:.4g}, and every site's at most {bounds.coordinate_bound:g}"
    return None
