"""Recalibration of a model of two classes: its log odds, times a slope, plus an intercept.

Both are read off the table of scores by outcome that sites' evaluation counts add up to, on patients that are held
back. They are post-processing of what was released, and cost no ε. They change no rank, only what a probability says:
a model that was trained with privacy often ranks well and is far too sure, or far off the rate of the outcome.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from consilium_shared.errors import PeerError

STEEPEST = 20.0
"""Largest slope and intercept that a bundle is given: beyond, the table tells of something else."""


class Recalibration(NamedTuple):
    """``logit(probability) = intercept + slope * (logit of class 1 - logit of class 0)``.

    >>> Recalibration.read({"recalibration": {"intercept": 0.5, "slope": 0.6}})
    Recalibration(intercept=0.5, slope=0.6)
    >>> Recalibration.read({"auroc": 0.8}) is None
    True
    """

    intercept: float
    slope: float

    @property
    def sound(self) -> bool:
        """True where it keeps every rank and is within ``STEEPEST``."""
        return math.isfinite(self.intercept) and abs(self.intercept) <= STEEPEST and 0 < self.slope <= STEEPEST

    @classmethod
    def read(cls, metrics: dict[str, Any] | None) -> Recalibration | None:
        """Recalibration of a card's metrics; None where they have none.

        Raises:
            PeerError: one that is not two sound numbers.
        """
        found = (metrics or {}).get("recalibration")
        if found is None:
            return None
        try:
            made = cls(float(found["intercept"]), float(found["slope"]))
        except (TypeError, KeyError, ValueError) as error:
            raise PeerError("recalibration: not an intercept and a slope") from error
        if not made.sound:
            raise PeerError(f"recalibration: an intercept of {made.intercept:g} and a slope of {made.slope:g}")
        return made


def chosen(
    fitted: tuple[float, float], shift: float | None, ends: tuple[float, float] | None, *, noised: bool
) -> Recalibration | None:
    """Recalibration that counts support: of intercept and slope, of the intercept alone, or none.

    The slope is taken where the noise on the counts leaves no doubt that it is above 0; else it stays 1.

    >>> chosen((0.9, 0.6), 1.1, (0.3, 0.9), noised=True)
    Recalibration(intercept=0.9, slope=0.6)
    >>> chosen((0.9, 0.6), 1.1, (-0.3, 1.5), noised=True)
    Recalibration(intercept=1.1, slope=1.0)

    Args:
        fitted: intercept and slope of the outcome on the score.
        shift: intercept with the slope at 1; None where it is not known.
        ends: interval of the slope; None where there is none.
        noised: True for counts with noise.
    """
    whole = Recalibration(*fitted)
    if whole.sound and (not noised or (ends is not None and ends[0] > 0)):
        return whole
    alone = Recalibration(math.nan if shift is None else shift, 1.0)
    return alone if alone.sound else None
