"""The figures that the coordinator publishes of an opened sum: metrics as the sites reported them, with intervals."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared.intervals import noised_metrics, noised_parts, variances
from consilium_shared.metrics import Counts, Layout, Values, metrics
from consilium_shared.plausibility import contradiction, most_held_back
from consilium_shared.privacy.plan import noise_of_evaluations
from consilium_shared.protocol.summand import Opened
from consilium_shared.recalibration import chosen
from consilium_shared.sampling import sampling
from consilium_shared.split import counted_part
from consilium_shared.study import Study


class Figures:
    """Metrics of one study's sums of evaluation counts."""

    def __init__(self, study: Study, least: int = 2) -> None:
        """``least``: fewest sites whose counts are told (``secagg.terms.least_sites``)."""
        self.study, self.least = study, max(least, study.aggregation.min_sites)
        self.layout = Layout.of(study)

    @cached_property
    def noise(self) -> float | None:
        """Noise multiplier of each site's counts; None where they carry none."""
        epsilon, delta = self.study.evaluation.epsilon, self.study.privacy.delta
        if epsilon is None or delta is None:
            return None
        return noise_of_evaluations(len(self.study.evaluated_rounds), epsilon, delta)

    def of(
        self, opened: Opened, training: dict[str, Any] | None = None, *, last: bool = True
    ) -> tuple[dict[str, Any] | None, str | None]:
        """Metrics of an opened sum's counts, or why there are none though it has some.

        Args:
            opened: the sum.
            training: the record of a round in which every site of the sum took part (``weight``, ``participants``).
            last: whether it is of the model that is published, after the last round.

        Returns:
            (metrics by name, with ``sites`` that counted, ``sampling`` (intervals for that other patients could have
            been held back), of noised counts ``interval``, and where the layout has them ``parts``; None), (None, why),
            or (None, None) where too few sites have counted.
        """
        if opened.counts is None or opened.counted < self.least:
            return None, None
        variance = None if self.noise is None else variances(self.layout, self.noise, opened.counted)
        most = None
        if training is not None and training.get("weight") is not None:
            held = counted_part(self.study, last=last)
            most = most_held_back(self.study, len(training["participants"]), training["weight"], held)
        why = contradiction(opened.counts, self.layout, variance, most)
        if why is not None:
            return None, why
        if variance is None:
            values, known = metrics(opened.counts, self.layout), None
        else:
            values, known = noised_metrics(opened.counts, self.layout, variance)
        kept: dict[str, Any] = {name: values[name] for name in self.study.evaluation.metrics}
        kept["sites"] = opened.counted
        if known is not None:
            kept["interval"] = {name: list(known[name]) for name in self.study.evaluation.metrics if name in known}
        parts: dict[str, dict[str, Any]] = {}
        whole, apart = sampling(opened.counts, self.layout, variance)
        kept["sampling"] = {name: list(whole[name]) for name in self.study.evaluation.metrics if name in whole}
        for part, own, ends in noised_parts(opened.counts, self.layout, variance):
            told = {"interval": {name: list(each) for name, each in ends.items()}} if ends else {}
            told["sampling"] = {name: list(each) for name, each in apart[part.kind, part.name].items()}
            parts.setdefault(part.kind, {})[part.name] = {**own, **told}
        # Where a round is chosen, its recalibration is read off those for validation: see ``rounds.py``.
        if self.study.evaluation.recalibrate and not (last and self.study.evaluation.keep is not None):
            kept |= self._recalibration(opened.counts, values, known)
        return kept | ({"parts": parts} if parts else {}), None

    def _recalibration(
        self, counts: Counts, values: Values, known: dict[str, tuple[float, float]] | None
    ) -> dict[str, Any]:
        """Intercept and slope that the counts support, as a card has them; nothing where they support none."""
        noised = known is not None
        fitted = self.layout.recalibrated(counts.astype(np.float64), noised=noised)
        ends = None if known is None else known.get("calibration-slope")
        found = None if fitted is None else chosen(fitted, values["calibration-intercept"], ends, noised=noised)
        if found is None:
            return {}
        return {"recalibration": {name: float(f"{value:.4g}") for name, value in found._asdict().items()}}


def noised_weight(study: Study, opened: Opened) -> int | None:
    """The summed weight where it is made of noised numbers of patients, which leave anyway; else None."""
    noised = study.privacy.mode == "dp" and study.aggregation.weighting == "patients" and study.privacy.sums is None
    return opened.weight or None if noised else None


def length(vector: npt.NDArray[np.floating[Any]]) -> float:
    """L2 norm to six digits, for a record."""
    return float(f"{float(np.linalg.norm(vector.astype(np.float64))):.6g}")
