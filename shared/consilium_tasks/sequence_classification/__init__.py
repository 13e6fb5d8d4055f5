"""Sequence classification: one class for each irregular time series, such as the vital signs of a stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilium_shared.inputs import Series
from consilium_shared.study import Study
from consilium_shared.suggestion import Asked, Suggestion
from consilium_shared.task import ModelKind, Reading
from consilium_tasks.classification.schema import ModelSpec
from consilium_tasks.classification.task import Classification, data_of
from consilium_tasks.sequence_classification.suggestion import suggest

_HERE = "consilium_tasks.sequence_classification.models"
_FEW_BINS = 8


class SequenceClassification(Classification):
    """Classes of series, with what is known of a record besides."""

    name = "sequence-classification"
    part = "series"
    models = {  # noqa: RUF012
        "lstm": ModelKind(ModelSpec, f"{_HERE}:lstm", low_rank=False, stepwise=True),
        "gru": ModelKind(ModelSpec, f"{_HERE}:gru", low_rank=False, stepwise=True),
    }

    def suggestion(self, asked: Asked) -> Suggestion:
        """A small recurrent network, or the advice to take a table."""
        return suggest(asked)

    def reads(self, study: Study) -> Reading:
        """A table of samples and the label table, which has the statics too."""
        data = data_of(study)
        return Reading("timeseries", (data.label,), series=series_of(study), missing=data.missing)

    def inputs(
        self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False
    ) -> tuple[NDArray[np.float32], ...]:
        """Series float32 ``[count, bins, 3 V]``, and statics ``[count, K]`` where the study has them."""
        series = series_of(study)
        bins = min(series.bins, _FEW_BINS) if small else series.bins
        beside = series.statics_width
        return (
            draw.random((count, bins, series.inputs), dtype=np.float32),
            *([draw.random((count, beside), dtype=np.float32)] if beside else []),
        )


def series_of(study: Study) -> Series:
    """The study's series."""
    series = data_of(study).series
    assert series is not None  # noqa: S101  (``check`` refuses a contract without)
    return series


TASK = SequenceClassification()
