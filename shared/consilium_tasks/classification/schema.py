"""Contract parts of the classifiers that schema 1 had: one class for the data of all three, one for their models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from consilium_shared.architecture import Architecture
from consilium_shared.inputs import AssetData, Feature, Image, Label, Missing, Series


class Data(AssetData):
    """The asset and how its records become inputs; each task takes one of ``image``, ``series``, ``features``."""

    label: Label
    image: Image | None = None
    series: Series | None = None
    features: Annotated[tuple[Feature, ...], Field(max_length=2000)] | None = None
    missing: Missing = "refuse"
    """A tabular record with a missing value is set aside, or takes the study's ``center`` (no category)."""


class ModelSpec(Architecture):
    """Architecture by name, with the width and number of its hidden layers."""

    hidden: Annotated[int, Field(ge=1, le=4096)] = 64
    layers: Annotated[int, Field(ge=1, le=4)] = 1
