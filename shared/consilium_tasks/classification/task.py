"""Classifiers' common parts: one class of several a record, whatever its input is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from consilium_shared.metrics import Counts
from consilium_shared.study import Study
from consilium_shared.task import Examples, Task
from consilium_tasks.classification.counts import LATER, METRICS, ClassLayout, count
from consilium_tasks.classification.metrics import EXPLAINED
from consilium_tasks.classification.prediction import ClassPredictions
from consilium_tasks.classification.schema import Data, ModelSpec

if TYPE_CHECKING:
    import torch

    from consilium_shared.task import Loss, Measure


class Classification(Task):
    """Classes of records. A subclass has ``part``, the key of ``data`` that says its input."""

    since = 1
    data: ClassVar[type[Data]] = Data
    metrics = (*METRICS, *LATER)
    explained = EXPLAINED
    one_class = True
    part: ClassVar[str]

    def check(self, study: Study) -> None:
        """One input, of this task's kind; and a weight for each class or none."""
        found = data_of(study)
        for other in ("image", "series", "features"):
            if (getattr(found, other) is not None) != (other == self.part):
                raise ValueError(f"task {self.name} takes data.{self.part} and no other of image, series, features")
        for key in ("class_weights", "class_sampling"):
            given = getattr(study.training, key)
            if given is not None and len(given) != len(found.label.classes):
                raise ValueError(f"training.{key} needs one number for each class")
        later = sorted(set(study.evaluation.metrics) & set(LATER))
        if later and study.schema_version < 2:
            raise ValueError(f"evaluation.metrics: {later[0]} came with schema 2")
        if found.label.prior is not None and study.model.name == "graph":
            raise ValueError("data.label.prior is for models by name: a graph has no last layer that is known")
        if study.evaluation.recalibrate:
            asked = {"calibration-intercept", "calibration-slope"} <= set(study.evaluation.metrics)
            if len(found.label.classes) != 2 or not asked:
                raise ValueError(
                    "evaluation.recalibrate takes two classes, and evaluation.metrics with calibration-intercept and "
                    "calibration-slope, off whose table it is read"
                )

    @abstractmethod
    def inputs(
        self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False
    ) -> tuple[NDArray[np.float32], ...]:
        """Invented inputs, numbers uniform in [0, 1)."""

    def invented(self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False) -> Examples:
        """Uniform numbers, with the classes in turn."""
        labels = np.arange(count, dtype=np.int64) % len(self.outputs(study))
        return Examples(self.inputs(study, count, draw, small=small), (labels,))

    def groups(self, study: Study, targets: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
        """The records of each class."""
        return {name: targets[0] == number for number, name in enumerate(self.outputs(study))}

    def prior(self, study: Study) -> tuple[float, ...] | None:
        """The contract's ``data.label.prior``."""
        return data_of(study).label.prior

    def loss(self, study: Study, device: torch.device) -> Loss:
        """Cross entropy of logits ``[B, C]`` and classes int64 ``[B]``."""
        from consilium_tasks.classification.loss import cross_entropy

        return cross_entropy(study, device)

    def layout(self, study: Study, *, local: bool = False) -> ClassLayout:
        """The blocks that the study's metrics need."""
        classes = len(self.outputs(study))
        if local:
            return ClassLayout.local(classes)
        return ClassLayout(classes, frozenset(study.evaluation.metrics), noised=study.privacy.mode == "dp")

    def outputs(self, study: Study) -> tuple[str, ...]:
        """The classes: a probability of each is measured."""
        return data_of(study).label.classes

    def measure(self, study: Study) -> Measure:
        """Predicted distributions ``[B, C]``."""
        from consilium_tasks.classification.loss import probabilities

        return probabilities

    def unknown(self, study: Study) -> NDArray[np.float64]:
        """The distribution of a model that knows nothing about a record."""
        classes = len(self.outputs(study))
        return np.full(classes, 1 / classes)

    def count(self, layout: ClassLayout, measured: NDArray[np.float64], targets: Sequence[NDArray[Any]]) -> Counts:
        """Counts of classes ``[N]`` and predicted distributions ``[N, C]``."""
        return count(targets[0], measured, layout)

    def predictions(self, study: Study) -> ClassPredictions | None:
        """A probability of each class."""
        return ClassPredictions(data_of(study).label.column, self.outputs(study))


def data_of(study: Study) -> Data:
    """Part of a classifier's contract about its data."""
    assert isinstance(study.data, Data)  # noqa: S101  (the contract's validation made it)
    return study.data


def classes_of(study: Study) -> int:
    """Number of classes, the width of a classifier's output."""
    return len(data_of(study).label.classes)


def options_of(study: Study) -> ModelSpec:
    """Part of a classifier's contract about its model."""
    assert isinstance(study.model, ModelSpec)  # noqa: S101  (the contract's validation made it)
    return study.model
