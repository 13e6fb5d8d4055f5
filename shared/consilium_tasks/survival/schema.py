"""Contract parts of a survival study."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from consilium_shared.architecture import Architecture
from consilium_shared.fields import Positive
from consilium_shared.inputs import AssetData, Feature, Label, Missing, Numeric


class SurvivalData(AssetData):
    """The asset, and its columns: features, time, and whether the time ends with the event."""

    time: Numeric
    """Time from the start until the event, or until nothing more is known; ``scale`` brings it to the edges' unit."""
    event: Label
    """Two classes in this order: nothing more is known after the time; the event."""
    edges: Annotated[tuple[Positive, ...], Field(min_length=2, max_length=100)]
    """Ends of the intervals in which hazards are told apart; the first begins at 0. Constants of the study."""
    features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=2000)]
    missing: Missing = "refuse"
    """A record with a missing feature is set aside, or takes the study's ``center`` (no category)."""

    @model_validator(mode="after")
    def _ordered(self) -> SurvivalData:
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges grow from one to the next")
        if len(self.event.classes) != 2:
            raise ValueError("event has two classes: nothing more is known, and the event")
        if self.event.prior is not None:
            raise ValueError("event.prior does nothing here: the chance of an event is another in each interval")
        return self


class Hazard(Architecture):
    """Architecture by name; ``mlp-hazard`` has ``layers`` hidden layers of ``hidden`` units."""

    hidden: Annotated[int, Field(ge=1, le=4096)] = 32
    layers: Annotated[int, Field(ge=1, le=4)] = 1
