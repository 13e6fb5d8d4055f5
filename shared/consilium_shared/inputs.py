"""Kinds of input and target that tasks combine in the part of the contract about data. Readers of assets know them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
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


Code = Annotated[str, Field(pattern=r"^[A-Z0-9_ ]{1,16}$")]
"""A code of the DICOM standard, in upper case."""


class Selection(Strict):
    """Images that count, by what their files say; each key that is given must hold, and a tag that is absent does not.

    Hospitals write body parts, views and descriptions in their own words: ``data check`` shows what was set aside.
    """

    body_part: Annotated[tuple[Code, ...], Field(max_length=50)] = ()
    """BodyPartExamined, such as CHEST."""
    view: Annotated[tuple[Code, ...], Field(max_length=50)] = ()
    """ViewPosition, such as PA, AP, LL; of mammograms CC, MLO."""
    laterality: Annotated[tuple[Literal["L", "R", "B", "U"], ...], Field(max_length=4)] = ()
    """ImageLaterality, or Laterality where that is absent."""
    intent: Literal["presentation", "processing"] | None = None
    """PresentationIntentType: an exposure is often archived in both forms."""
    description: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(max_length=50)] = ()
    """Texts of which SeriesDescription has one, in any case."""
    since: date | None = None
    until: date | None = None
    """First and last day of the acquisition (AcquisitionDate, else SeriesDate, else StudyDate), both included."""


class Image(Strict):
    """A picture or volume as presented to the model, float32 in [0, 1]: ``size`` × ``size`` pixels, each of
    ``channels`` numbers, in ``depth`` slices where there are any."""

    size: Annotated[int, Field(ge=8, le=1024)]
    channels: Literal[1, 3] = 1
    """1 is grey; 3 is red, green and blue, where a grey picture has the same number three times."""
    modality: tuple[Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")], ...] = ("CR", "DX")
    depth: Annotated[int | None, Field(ge=2, le=512), Since(2)] = None
    """Slices of a volume, from the feet to the head; a record is then a series, not a file."""
    frames: Annotated[Literal["single", "middle", "each"], Since(2)] = "single"
    """Frames that are taken of a file with several: none, the one in the middle, or each as a record of its own."""
    intensity: Annotated[Literal["file", "window", "percentiles"], Since(2)] = "file"
    """Black and white: as the file's own window says; at the ends of ``window``; or at the 1st and 99th percentile of
    the record's own values."""
    window: Annotated[tuple[float, float] | None, Since(2)] = None
    """Values in the modality's unit (of CT Hounsfield units) that are shown black and white."""
    select: Annotated[Selection | None, Since(2)] = None
    gaps: Annotated[Literal["refuse", "interpolate"], Since(2)] = "refuse"
    """A volume whose slices are not evenly apart: set aside, or the slices between made of their two neighbours, as
    far as no gap is wider than three of the usual steps."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image as the model sees it: ``[C, S, S]``, of a volume ``[C, D, S, S]``."""
        depth = () if self.depth is None else (self.depth,)
        return self.channels, *depth, self.size, self.size

    @model_validator(mode="after")
    def _one_scale(self) -> Image:
        if (self.window is not None) != (self.intensity == "window"):
            raise ValueError("window goes with intensity: window, and only with it")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("window is the value shown black, then the larger one shown white")
        if self.depth is not None and self.intensity == "file":
            raise ValueError("the slices of a volume share one scale: intensity is window or percentiles")
        if self.depth is None and self.gaps != "refuse":
            raise ValueError("gaps are between the slices of volumes: it goes with depth")
        if self.depth is not None and (self.channels == 3 or self.frames != "single"):
            raise ValueError("a volume has one channel, and its frames are its slices")
        return self


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
