"""Forecasting and regression: numbers that were measured later, or were not measured, from a table's row.

A row says what is known at a time, such as the last values of a series; a patient may have many. Targets are scaled by
constants of the study, and the loss of a record has a bounded gradient by each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilium_shared.inputs import Numeric, width
from consilium_shared.metrics import Counts
from consilium_shared.study import Study
from consilium_shared.task import Examples, ModelKind, Reading, Task
from consilium_tasks.forecasting.counts import EXPLAINED, METRICS, Axis, ForecastLayout, count
from consilium_tasks.forecasting.prediction import NumberPredictions
from consilium_tasks.forecasting.schema import Forecast, ForecastingData

if TYPE_CHECKING:
    import torch

    from consilium_shared.task import Loss, Measure

_HERE = "consilium_tasks.forecasting.models"


class Forecasting(Task):
    """Numbers of a table's records."""

    name = "forecasting"
    since = 2
    data = ForecastingData
    models = {  # noqa: RUF012
        "linear-forecast": ModelKind(Forecast, f"{_HERE}:linear", low_rank=False),
        "mlp-forecast": ModelKind(Forecast, f"{_HERE}:mlp"),
    }
    metrics = METRICS
    explained = EXPLAINED

    def check(self, study: Study) -> None:
        """No class weights; metrics have what they are read off."""
        data = data_of(study)
        if study.training.class_weights is not None:
            raise ValueError("training.class_weights is for classifiers")
        if "skill" in study.evaluation.metrics and any(target.last is None for target in data.targets):
            raise ValueError("evaluation.metrics: skill needs data.targets with the feature of their last value, last")
        if "coverage" in study.evaluation.metrics and len(data.quantiles) < 2:
            raise ValueError("evaluation.metrics: coverage needs data.quantiles, such as [0.05, 0.5, 0.95]")

    def reads(self, study: Study) -> Reading:
        """A table with features and targets; last values are read once more, as numbers to compare with."""
        data = data_of(study)
        return Reading("table", (*data.targets, *_lasts(data)), features=data.features, missing=data.missing)

    def invented(self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False) -> Examples:
        """Uniform features, and targets uniform in their ranges."""
        data = data_of(study)
        inputs = draw.random((count, width(data.features)), dtype=np.float32)
        axes = _axes(data)
        targets = [draw.uniform(axis.low, axis.high, count).astype(np.float32) for axis in axes]
        lasts = [inputs[:, width(data.features[: data.features.index(each)])].copy() for each in _lasts(data)]
        return Examples((inputs,), (*targets, *lasts))

    def groups(self, study: Study, targets: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
        """Records whose first target is below the study's center, and those where it is not."""
        name = data_of(study).targets[0].name
        return {f"{name} below its center": targets[0] < 0, f"{name} at or above its center": targets[0] >= 0}

    def loss(self, study: Study, device: torch.device) -> Loss:
        """Mean of the losses of a record's targets, of outputs ``[B, T · Q]``."""
        from consilium_tasks.forecasting.loss import huber, pinball

        data = data_of(study)
        return pinball(len(data.targets), data.quantiles) if data.quantiles else huber(len(data.targets))

    def layout(self, study: Study, *, local: bool = False) -> ForecastLayout:
        """Histograms of each target, coarser with privacy; of those that the metrics are read off."""
        data = data_of(study)
        asked = frozenset(METRICS if local else study.evaluation.metrics)
        if any(target.last is None for target in data.targets):
            asked -= {"skill"}
        if len(data.quantiles) < 2:
            asked -= {"coverage"}
        return ForecastLayout(_axes(data), len(data.quantiles) or 1, asked, study.privacy.mode == "dp" and not local)

    def outputs(self, study: Study) -> tuple[str, ...]:
        """The targets; with quantiles each at every level."""
        data = data_of(study)
        return tuple(
            f"{target.name}{ending}"
            for target in data.targets
            for ending in ([f" quantile {level:g}" for level in data.quantiles] or [""])
        )

    def measure(self, study: Study) -> Measure:
        """Values ``[B, T · Q]`` in scaled units, within the targets' ranges."""
        from consilium_tasks.forecasting.loss import within

        data = data_of(study)
        return within([(axis.low, axis.high) for axis in _axes(data)], len(data.quantiles) or 1)

    def unknown(self, study: Study) -> NDArray[np.float64]:
        """Middle of each target's range."""
        data = data_of(study)
        return np.repeat([(axis.low + axis.high) / 2 for axis in _axes(data)], len(data.quantiles) or 1)

    def count(self, layout: ForecastLayout, measured: NDArray[np.float64], targets: Sequence[NDArray[Any]]) -> Counts:
        """Counts of values ``[N, T · Q]`` against targets, each ``[N]``."""
        return count(measured, targets, layout)

    def predictions(self, study: Study) -> NumberPredictions:
        """Numbers in the study's units."""
        return NumberPredictions(data_of(study), self.outputs(study))


def _lasts(data: ForecastingData) -> list[Numeric]:
    """Features that are last values, each once."""
    found = (data.last_of(target) for target in data.targets)
    return list({each[0].name: each[0] for each in found if each is not None}.values())


def _axes(data: ForecastingData) -> tuple[Axis, ...]:
    names = [each.name for each in _lasts(data)]
    made = []
    for target in data.targets:
        last = data.last_of(target)
        made.append(
            Axis(
                target.name,
                (target.low - target.center) / target.scale,
                (target.high - target.center) / target.scale,
                target.scale,
                None if last is None else (len(data.targets) + names.index(last[0].name), last[1], last[2]),
            )
        )
    return tuple(made)


def data_of(study: Study) -> ForecastingData:
    """Part of a forecasting contract about its data."""
    assert isinstance(study.data, ForecastingData)  # noqa: S101  (the contract's validation made it)
    return study.data


def options_of(study: Study) -> Forecast:
    """Part of a forecasting contract about its model."""
    assert isinstance(study.model, Forecast)  # noqa: S101  (the contract's validation made it)
    return study.model


TASK = Forecasting()
