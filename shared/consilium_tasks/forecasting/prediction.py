"""Predictions of a forecasting model: numbers in the study's units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from consilium_shared.prediction import Outcome, Predictions, Quantity, Values

if TYPE_CHECKING:
    import torch

    from consilium_shared.prediction import Scores
    from consilium_tasks.forecasting.schema import ForecastingData


class NumberPredictions(Predictions):
    """Predictions of each target's value, or of its quantiles, which never fall from one to the next."""

    output = "values"
    gives = "the values"

    def __init__(self, data: ForecastingData, names: tuple[str, ...]) -> None:
        super().__init__(", ".join(target.name for target in data.targets), names)
        self._targets, self._levels = data.targets, data.quantiles
        self._each = len(data.quantiles) or 1
        self._first = self._each // 2

    def scores(self) -> Scores:
        """Values ``[B, T · Q]`` of outputs in scaled units."""
        import torch

        from consilium_tasks.forecasting.loss import within

        bounds = [((t.low - t.center) / t.scale, (t.high - t.center) / t.scale) for t in self._targets]
        measure = within(bounds, self._each)
        scale = torch.tensor([t.scale for t in self._targets for _ in range(self._each)])
        center = torch.tensor([t.center for t in self._targets for _ in range(self._each)])

        def values(outputs: torch.Tensor) -> torch.Tensor:
            return measure(outputs) * scale + center

        return values

    def declared(self) -> dict[str, Any]:
        """Targets with their units and ranges, and the levels of quantiles."""
        targets = [{"name": t.name, "unit": t.unit or "1", "low": t.low, "high": t.high} for t in self._targets]
        return {"label": self.label, "targets": targets, "quantiles": list(self._levels)}

    def said(self, scores: Values, threshold: float) -> dict[str, Any]:
        """Value of the first target, its median where there are quantiles, and all values."""
        return {
            "value": float(scores[self._first]),
            "of": self.names[self._first],
            "values": dict(zip(self.names, map(float, scores), strict=True)),
        }

    def sentence(self, prediction: dict[str, Any]) -> str:
        """Every value with its unit."""
        found = (f"{each.name} {each.value:.4g} {each.unit}".removesuffix(" 1") for each in self.outcomes(prediction))
        return f"Predicted: {'; '.join(found)}."

    def outcomes(self, prediction: dict[str, Any]) -> list[Outcome]:
        """Values with their units; none is a probability."""
        units = [t.unit or "1" for t in self._targets for _ in range(self._each)]
        values = prediction[self.output]
        return [Outcome(name, values[name], unit, False) for name, unit in zip(self.names, units, strict=True)]

    def explained(self, logits: Values) -> tuple[dict[str, str], Quantity]:
        """Value of the first target, in its unit, before it is brought into its range."""
        target, at = self._targets[0], self._first

        def value(found: Values) -> Values:
            return np.asarray(found[:, at] * target.scale + target.center)

        return {"of": self.names[at]}, value
