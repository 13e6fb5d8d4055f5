"""Tabular classification: one class for each row of a table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilium_shared.inputs import Feature, width
from consilium_shared.study import Study
from consilium_shared.suggestion import Asked, Suggestion
from consilium_shared.task import ModelKind, Reading
from consilium_tasks.classification.schema import ModelSpec
from consilium_tasks.classification.task import Classification, data_of
from consilium_tasks.tabular_classification.suggestion import suggest

_HERE = "consilium_tasks.tabular_classification.models"


class TabularClassification(Classification):
    """Classes of rows of numbers and categories."""

    name = "tabular-classification"
    part = "features"
    models = {  # noqa: RUF012
        "logistic": ModelKind(ModelSpec, f"{_HERE}:logistic", low_rank=False),
        "mlp": ModelKind(ModelSpec, f"{_HERE}:mlp"),
    }

    def check(self, study: Study) -> None:
        """At least one feature, besides what every classifier needs."""
        super().check(study)
        if not features_of(study):
            raise ValueError("data.features is empty")

    def suggestion(self, asked: Asked) -> Suggestion:
        """A linear model, in sums with privacy."""
        return suggest(asked)

    def reads(self, study: Study) -> Reading:
        """A table with features and label."""
        data = data_of(study)
        return Reading("table", (data.label,), features=features_of(study), missing=data.missing)

    def inputs(
        self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False
    ) -> tuple[NDArray[np.float32], ...]:
        """Rows float32 ``[count, F]``."""
        return (draw.random((count, width(features_of(study))), dtype=np.float32),)


def features_of(study: Study) -> tuple[Feature, ...]:
    """The study's features."""
    return data_of(study).features or ()


TASK = TabularClassification()
