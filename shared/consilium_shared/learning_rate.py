"""Learning rate of a study's local steps over the study: warm-up, then constant, falling by a cosine, or by steps."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilium_shared.config import Strict


class Schedule(Strict):
    """Fractions of ``optimizer.lr``, which is the largest rate, by the number of the step in the whole study.

    It is a constant of the study, the same at every site, so it costs no ε.
    """

    decay: Literal["none", "cosine", "step"] = "none"
    """After the warm-up: nothing, half a cosine down to ``least``, or times ``factor`` after every ``every`` rounds."""
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps over which the rate rises evenly, the first at 1 / ``warmup`` of it."""
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest fraction, at the end of a cosine."""
    every: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Rounds between two steps down."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        if (self.decay == "step") != (self.every is not None):
            raise ValueError("schedule.every goes with decay: step, and only with it")
        if self.decay != "cosine" and self.least:
            raise ValueError("schedule.least is for decay: cosine")
        return self

    def fraction(self, step: int, steps_per_round: int, rounds: int) -> float:
        """Fraction of the largest rate at a step.

        >>> half = Schedule(decay="cosine", warmup=2)
        >>> [round(half.fraction(step, 2, 4), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]

        Args:
            step: number of the step in the study, from 0.
            steps_per_round: of the study.
            rounds: of the study.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "step":
            assert self.every is not None  # noqa: S101  (``_complete``)
            return float(self.factor ** (step // steps_per_round // self.every))
        if self.decay == "none":
            return 1.0
        along = (step - self.warmup) / max(rounds * steps_per_round - self.warmup, 1)
        return self.least + (1.0 - self.least) * (1.0 + math.cos(math.pi * min(along, 1.0))) / 2.0
