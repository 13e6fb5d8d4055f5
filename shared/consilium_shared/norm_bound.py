"""The norm bound of a study whose file names none: as long as an honest update can be, and hardly longer.

With privacy the length of an honest update is known in advance, whatever the data: in each of S steps the mean of the
clipped gradients is at most C long, and the noise on it, of deviation σ · C / batch in each of d coordinates, is a walk
of √S steps. Hence ::

    lr · C · (S + σ / batch · √S · (√d + 6)) / (1 - momentum)

with the σ of a site that draws all its patients in every step, which is the largest. A larger site's draw varies, by
√batch or so: an update is shortened only where nearly all gradients are clipped and point the same way, and then by
what was drawn above the expected. With adaptive clipping the gradient counts in clipping norms, so C is 1.
Adam moves each coordinate by about lr a step, at most lr · S · √d.
Weight decay may take off what is there: lr · decay · S of a model whose weights are about 1 at most.

With ``privacy.sums`` the bound is of the opened sum without its noise: the mean of all sites' clipped gradients is at
most lr · C long, and twice that where a step draws twice as many patients as it expects.

Without privacy nothing bounds a gradient. Mean gradients of a batch are seldom longer than ``LONG_GRADIENT``
except at the very start; a longer update is then shortened and keeps its direction. The bound is never above what it
was before there was a rule (``UNRULED``).
"""

from __future__ import annotations

import math

from consilium_shared.errors import BudgetRefused, ConfigurationError
from consilium_shared.limits import NORM_BOUND
from consilium_shared.models.vector import width
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.study import Study

LONG_GRADIENT = 3.0
UNRULED = 100.0
"""The default of contracts of schema 1."""

_TAIL = 6.0
"""Deviations by which the length of normal noise is above √d, with a chance of 1e-8 at most."""


def derived_norm_bound(study: Study) -> float:
    """The bound for the study's plan, rounded up to two digits."""
    training, parameters = study.training, width(study)
    spec, steps = training.optimizer, training.steps_per_round
    norm = study.privacy.clipping_norm
    if study.privacy.sums is not None and norm is not None:
        return min(_up(2.0 * spec.lr * norm), NORM_BOUND)
    if spec.name in ("adam", "adamw"):
        bound = spec.lr * steps * math.sqrt(parameters)
    elif norm is None:
        bound = min(spec.lr * steps * LONG_GRADIENT / (1 - spec.momentum), UNRULED)
    else:
        clipped = norm if training.adaptive_clipping is None else 1.0
        noise = _largest_noise(study) / training.expected_batch
        walk = steps + noise * math.sqrt(steps) * (math.sqrt(parameters) + _TAIL)
        bound = spec.lr * clipped * walk / (1 - spec.momentum)
    bound += spec.lr * spec.l1 * steps * math.sqrt(parameters)
    bound += min(1.0, spec.lr * spec.weight_decay * steps) * math.sqrt(parameters)
    return min(_up(bound), NORM_BOUND)


def _largest_noise(study: Study) -> float:
    """σ of the smallest site that can take part: the fewer its patients, the larger."""
    fixed = study.privacy.noise_multiplier
    if fixed != "auto":
        return fixed
    patients = 1
    while patients < 2**40:
        try:
            plan = plan_of(study, patients)
        except (BudgetRefused, ConfigurationError):  # so few patients are too few for it
            patients = max(2 * patients, study.training.expected_batch)
            continue
        if isinstance(plan, PrivacyPlan):
            return plan.noise_multiplier
        break
    return 0.0  # no site can take part, and each will say why


def _up(bound: float) -> float:
    """Rounded up to two digits: a number that people can read."""
    unit = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return float(f"{math.ceil(bound / unit - 1e-9) * unit:.2g}")
