"""Widths of a study's inputs and outputs: one answer for the model and for whoever prepares its data. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from consilium_shared.inputs import Categorical, Feature
from consilium_shared.study import Study

INPUTS_PER_VARIABLE = 3
"""Value, mask and hours since the last sample (``study.Series``)."""


def classes(study: Study) -> int:
    """Number of classes, the width of the model's output."""
    return len(study.data.label.classes)


def image_size(study: Study) -> int:
    """Edge of the square input image in pixels; 0 when the study has no images."""
    return study.data.image.size if study.data.image is not None else 0


def series_inputs(study: Study) -> int:
    """Inputs at each step of a series: three for every variable; 0 when the study has no series."""
    return INPUTS_PER_VARIABLE * len(study.data.series.variables) if study.data.series is not None else 0


def statics_width(study: Study) -> int:
    """Width of what accompanies a series, once for each patient; 0 when there is none."""
    return _width(study.data.series.statics) if study.data.series is not None else 0


def tabular_width(study: Study) -> int:
    """Width of a table's record; 0 when the study has no table."""
    return _width(study.data.features or ())


def inputs(study: Study) -> tuple[tuple[int, ...], ...]:
    """The shape of one record in each of the model's inputs: an image, a series (and its statics), or a table's row."""
    image, series, beside = study.data.image, study.data.series, statics_width(study)
    if image is not None:
        return ((image.channels, image.size, image.size),)
    if series is not None:
        return ((series.bins, series_inputs(study)), *(((beside,),) if beside else ()))
    return ((tabular_width(study),),)


def _width(features: Iterable[Feature]) -> int:
    return sum(len(feature.categories) if isinstance(feature, Categorical) else 1 for feature in features)
