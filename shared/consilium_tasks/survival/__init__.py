"""Survival: the time until an event, of which some patients' is only known to be later, from a table's row.

Time is cut into the study's intervals; the model gives the logit of each interval's hazard, the probability of the
event within it for those who have reached it (Gensheimer & Narasimhan 2019). So the loss is a sum over a patient's own
intervals; Cox's partial likelihood, in whose every term are all who are at risk, has no such form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilium_shared.inputs import width
from consilium_shared.metrics import Counts
from consilium_shared.study import Study
from consilium_shared.task import Examples, ModelKind, Reading, Task
from consilium_tasks.survival.counts import EXPLAINED, METRICS, SurvivalLayout, count
from consilium_tasks.survival.prediction import RiskPredictions
from consilium_tasks.survival.schema import Hazard, SurvivalData

if TYPE_CHECKING:
    import torch

    from consilium_shared.task import Loss, Measure

_HERE = "consilium_tasks.survival.models"


class Survival(Task):
    """Hazards by interval."""

    name = "survival"
    since = 2
    data = SurvivalData
    models = {  # noqa: RUF012
        "linear-hazard": ModelKind(Hazard, f"{_HERE}:linear", low_rank=False),
        "mlp-hazard": ModelKind(Hazard, f"{_HERE}:mlp"),
    }
    metrics = METRICS
    explained = EXPLAINED

    def check(self, study: Study) -> None:
        """No class weights: there are no classes."""
        if study.training.class_weights is not None:
            raise ValueError("training.class_weights is for classifiers")

    def reads(self, study: Study) -> Reading:
        """A table with features, the time, and whether it ends with the event."""
        data = data_of(study)
        return Reading("table", (data.time, data.event), features=data.features, missing=data.missing)

    def invented(self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False) -> Examples:
        """Uniform features; times over all intervals and a little beyond, every second one ending with the event."""
        data = data_of(study)
        inputs = draw.random((count, width(data.features)), dtype=np.float32)
        times = (draw.random(count) * 1.2 * data.edges[-1]).astype(np.float32)
        return Examples((inputs,), (times, np.arange(count, dtype=np.int64) % 2))

    def groups(self, study: Study, targets: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
        """Groups by outcome: patients whose event is known, and patients whose event is only known to be later."""
        return {name: targets[1] == number for number, name in enumerate(data_of(study).event.classes)}

    def loss(self, study: Study, device: torch.device) -> Loss:
        """Sum of the cross entropies of a patient's intervals, of logits ``[B, J]``, times ``[B]``, events ``[B]``."""
        from consilium_tasks.survival.loss import hazard_loss

        return hazard_loss(data_of(study).edges)

    def layout(self, study: Study, *, local: bool = False) -> SurvivalLayout:
        """One table, coarser with privacy."""
        return SurvivalLayout(data_of(study).edges, noised=study.privacy.mode == "dp" and not local)

    def outputs(self, study: Study) -> tuple[str, ...]:
        """Probability of the event until the end of each interval."""
        return tuple(f"event until {edge:g}" for edge in data_of(study).edges)

    def measure(self, study: Study) -> Measure:
        """Probabilities ``[B, J]``."""
        from consilium_tasks.survival.loss import cumulative

        return cumulative

    def unknown(self, study: Study) -> NDArray[np.float64]:
        """Equal chances in each interval and of none."""
        intervals = len(data_of(study).edges)
        return np.arange(1, intervals + 1) / (intervals + 1)

    def count(self, layout: SurvivalLayout, measured: NDArray[np.float64], targets: Sequence[NDArray[Any]]) -> Counts:
        """Counts of times and events ``[N]`` by the probability of an event until the last edge."""
        return count(targets[0], targets[1], measured[:, -1], layout)

    def predictions(self, study: Study) -> RiskPredictions:
        """The probability of the event until each edge."""
        return RiskPredictions(data_of(study), self.outputs(study))


def data_of(study: Study) -> SurvivalData:
    """Part of a survival contract about its data."""
    assert isinstance(study.data, SurvivalData)  # noqa: S101  (the contract's validation made it)
    return study.data


def options_of(study: Study) -> Hazard:
    """Part of a survival contract about its model."""
    assert isinstance(study.model, Hazard)  # noqa: S101  (the contract's validation made it)
    return study.model


TASK = Survival()
