"""Contract parts of a forecasting study."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from consilium_shared.architecture import Architecture
from consilium_shared.fields import Column
from consilium_shared.inputs import AssetData, Feature, Missing, Numeric


class Target(Numeric):
    """A number that is predicted, scaled by constants of the study; a record whose value is outside is set aside."""

    low: float
    high: float
    last: Column | None = None
    """Feature that is the number's last known value: the untrained model predicts it, and ``skill`` is against it."""

    @model_validator(mode="after")
    def _ordered(self) -> Target:
        if not self.low < self.high:
            raise ValueError(f"target {self.name}: low is less than high")
        return self


Level = Annotated[float, Field(gt=0, lt=1)]


class ForecastingData(AssetData):
    """The asset, and its columns: what is known at a time, and numbers that were measured later."""

    targets: Annotated[tuple[Target, ...], Field(min_length=1, max_length=50)]
    """Numbers to predict: one variable at several horizons, or several variables."""
    quantiles: Annotated[tuple[Level, ...], Field(max_length=9)] = ()
    """Levels in growing order about 0.5, which is in the middle, to predict quantiles; else one value of each."""
    features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=2000)]
    missing: Missing = "refuse"
    """A record with a missing feature is set aside, or takes the study's ``center`` (no category)."""

    @model_validator(mode="after")
    def _fits(self) -> ForecastingData:
        names = [target.name for target in self.targets]
        if len(set(names)) != len(names):
            raise ValueError("two targets have the same name")
        numbers = {each.name for each in self.features if isinstance(each, Numeric)}
        if both := numbers.intersection(names):
            raise ValueError(f"{', '.join(sorted(both))}: a target is no feature")
        for target in self.targets:
            if target.last is not None and target.last not in numbers:
                raise ValueError(f"target {target.name}: last is the name of a numeric feature")
        levels = self.quantiles
        if levels and (list(levels) != sorted(set(levels)) or len(levels) % 2 == 0 or levels[len(levels) // 2] != 0.5):
            raise ValueError("quantiles grow from one to the next, and 0.5 is in the middle")
        return self

    def last_of(self, target: Target) -> tuple[Numeric, float, float] | None:
        """Feature with a target's last value, and the factor and offset that bring it to the target's scale."""
        for each in self.features:
            if isinstance(each, Numeric) and each.name == target.last:
                return each, each.scale / target.scale, (each.center - target.center) / target.scale
        return None


class Forecast(Architecture):
    """Architecture by name; ``mlp-forecast`` has ``layers`` hidden layers of ``hidden`` units."""

    hidden: Annotated[int, Field(ge=1, le=4096)] = 32
    layers: Annotated[int, Field(ge=1, le=4)] = 1
