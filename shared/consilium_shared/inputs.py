"""Kinds of input and target that tasks combine in the part of the contract about data. Readers of assets know them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilium_shared.config import Strict
from consilium_shared.fields import Column, Name, Positive
from consilium_shared.schema import Since


class AssetData(Strict):
    """The asset, a name that each site maps to its own files; a task's own class adds how records become inputs."""

    asset: Name


class Label(Strict):
    """Column of the label table that is predicted, and its values in the order of the model's outputs."""

    column: Column
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=100)]
    prior: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None, Since(2)] = None
    """Rates of the classes that the untrained model predicts: public numbers, never the sites' own."""

    @model_validator(mode="after")
    def _distinct(self) -> Label:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("two classes have the same name")
        if self.prior is not None and (len(self.prior) != len(self.classes) or abs(sum(self.prior) - 1) > 0.01):
            raise ValueError("prior has a rate for each class, and they add up to 1")
        return self


UnitName = Annotated[str, Field(pattern=r"^[!-~]{1,60}$")]
"""Unit in UCUM's spelling (``mg/dL``, ``mm[Hg]``, ``Cel``)."""


class Numeric(Strict):
    """A numeric column, scaled by constants of the study: ``(value - center) / scale``.

    The constants are public (from the literature or a data dictionary). Statistics of the site's own patients would
    let one patient's value move another's gradient, which breaks the bound that clipping gives.
    """

    name: Column
    center: float = 0.0
    scale: Positive = 1.0
    low: float | None = None
    high: float | None = None
    unit: Annotated[UnitName | None, Since(2)] = None
    """Unit of the constants. A site that declares its own unit of the variable has its values converted to this one."""


class Categorical(Strict):
    """A column of categories, one-hot over the listed values; any other value is set aside with a reason."""

    name: Column
    categories: Annotated[tuple[str, ...], Field(min_length=2, max_length=1000)]


Feature = Numeric | Categorical
Missing = Literal["refuse", "center"]


def width(features: Iterable[Feature]) -> int:
    """Numbers that the features of one record come to.

    >>> width([Numeric(name="age"), Categorical(name="sex", categories=("f", "m"))])
    3
    """
    return sum(len(feature.categories) if isinstance(feature, Categorical) else 1 for feature in features)


class Image(Strict):
    """An image as presented to the model: ``size`` × ``size`` pixels, float32 in [0, 1]."""

    size: Annotated[int, Field(ge=8, le=1024)]
    channels: Literal[1] = 1
    modality: tuple[Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")], ...] = ("CR", "DX")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image as the model sees it."""
        return self.channels, self.size, self.size


class Series(Strict):
    """An irregular series as presented: ``bins`` steps of ``step_minutes``; each variable gives three inputs a
    step: the mean of its samples (or the last known), a mask, and the hours since its last sample."""

    variables: Annotated[tuple[Numeric, ...], Field(min_length=1, max_length=500)]
    bins: Annotated[int, Field(ge=1, le=10_000)]
    step_minutes: Positive
    statics: Annotated[tuple[Feature, ...], Field(max_length=500)] = ()

    @property
    def inputs(self) -> int:
        """Inputs at each step: three for every variable."""
        return 3 * len(self.variables)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of one series as the model sees it, without the statics."""
        return self.bins, self.inputs

    @property
    def statics_width(self) -> int:
        """Width of what accompanies a series, once for each record; 0 where there is none."""
        return width(self.statics)
