"""Plausibility of counts: no metrics are computed of counts that honest sites cannot have given.

Counts are not negative, no record is in one part and missing in another, no metric is outside its range, and no more
patients are held back than the weights allow; all that but for the noise, whose deviation is known. Each test refuses
the counts of honest sites with a probability of ``CHANCE`` at most. What a lying site adds within these bounds passes:
metrics are what the sites say, not what is true.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from consilium_shared.intervals import intervals
from consilium_shared.metrics import Counts, Layout, Vector
from consilium_shared.split import Part, share_for
from consilium_shared.study import Study

CHANCE = 1e-9
"""Chance that one test refuses what honest sites gave."""

_DEVIATIONS = -NormalDist().inv_cdf(CHANCE / 2)
GROWTH = 1.5
"""Growth of a hospital's patients allowed between its approval, which sets its weight, and a round."""
_PATIENTS = 20.0
"""Logarithm of the chance that more are held back than ``most_held_back`` says: below 1e-8."""


def contradiction(counts: Counts, layout: Layout, variance: Vector | None, most: float | None = None) -> str | None:
    """Reason why honest sites cannot have given this sum of counts; None where they can.

    Args:
        counts: the sum ``[k]``.
        variance: of the noise on each of its numbers ``[k]``; None for counts without noise.
        most: ``most_held_back``, where it is known.
    """
    numbers = counts.astype(np.float64)
    noise = np.zeros(layout.width) if variance is None else variance
    for form, what in layout.never_positive():
        over, slack = float(form @ numbers), _DEVIATIONS * math.sqrt(float(form * form @ noise))
        if over > slack:
            return f"{what}: by {over:.4g}, and the noise explains {slack:.4g}"
    records = layout.every_record()
    slack = _DEVIATIONS * math.sqrt(float(records @ noise))
    if most is not None and float(records @ numbers) > most + slack:
        return f"{float(records @ numbers):.0f} patients are counted, and the weights allow {most + slack:.0f}"
    if variance is None:
        lowest = int(counts.min())
        return f"a count is {lowest}, below 0" if lowest < 0 else None
    return _below(numbers / np.sqrt(variance)) or _beyond(counts, layout, variance)


def _below(counts: Vector) -> str | None:
    """Counts, in deviations of their noise ``[k]``, that are farther below 0 than noise takes them."""
    if counts.min() < NormalDist().inv_cdf(CHANCE / counts.size):
        return f"a count is {-counts.min():.1f} deviations of the noise below 0"
    # The length of the part of normal numbers below 0 exceeds its mean by t with a chance of exp(-t²/2) at most.
    length = float(np.linalg.norm(np.minimum(counts, 0.0)))
    limit = math.sqrt(counts.size / 2) + math.sqrt(-2 * math.log(CHANCE))
    if length > limit:
        return f"the counts are {length:.1f} deviations of the noise below 0 together, and at most {limit:.1f} can be"
    return None


def _beyond(counts: Counts, layout: Layout, variance: Vector) -> str | None:
    """A metric that is farther outside its range than noise takes it."""
    for name, ends in intervals(counts, layout, variance, _DEVIATIONS).items():
        least, most = layout.least(name), layout.most(name)
        if ends is not None and (ends[0] > most or ends[1] < least):
            return f"{name} would be between {ends[0]:.3f} and {ends[1]:.3f}, and is between {least:g} and {most:g}"
    return None


def most_held_back(study: Study, sites: int, weight: int, of: Part = "test") -> float | None:
    """Most patients that ``sites`` with this summed weight hold back; None where the weight does not tell.

    It tells where the weight is the noised number of patients to train on, and who is held back is drawn by a hash. The
    number is that of the approval: whoever came later (``GROWTH``) counts too.

    Args:
        study: the contract.
        sites: how many added to the weight.
        weight: Σ of their weights.
        of: part of whom the counts are.
    """
    part, rules = share_for(study.evaluation, of), study.aggregation
    if study.privacy.sums is not None:
        return None
    if part is None or study.privacy.mode != "dp" or rules.weighting != "patients" or weight >= rules.max_weight:
        return None
    training = weight + _DEVIATIONS * math.sqrt(sites * (study.privacy.count_noise**2 + 1 / 12))
    expected = GROWTH * training * part / (1 - part)
    # Bernstein, for a sum of draws that are held back or not.
    return expected + math.sqrt(2 * _PATIENTS * expected / (1 - part)) + _PATIENTS / (1 - part)
