"""Contract part of images with several labels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from consilium_shared.fields import Column
from consilium_shared.inputs import AssetData, Image


class FindingsData(AssetData):
    """The asset, the image, and a column of the label table for each finding."""

    image: Image
    findings: Annotated[tuple[Column, ...], Field(min_length=1, max_length=100)]
    """Columns, in the order of the model's outputs; an empty cell is a finding of which nothing is known."""
    values: tuple[str, str] = ("0", "1")
    """Values of those columns: absent, then present."""

    @model_validator(mode="after")
    def _distinct(self) -> FindingsData:
        if len(set(self.findings)) != len(self.findings):
            raise ValueError("two findings have the same name")
        return self
