"""Images with several labels: findings of which an image may have none, one or many, and of which some are unknown.

Each finding is a question of its own, present or not. What nobody has looked for is no answer: the image is trained
on by its known findings alone, and counted in theirs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilium_shared.inputs import Label
from consilium_shared.metrics import Counts
from consilium_shared.study import Study
from consilium_shared.task import Augmentation, Examples, ModelKind, Reading, Task
from consilium_tasks.classification.metrics import EXPLAINED
from consilium_tasks.classification.schema import ModelSpec
from consilium_tasks.image_multilabel.counts import METRICS, FindingsLayout, count
from consilium_tasks.image_multilabel.prediction import FindingPredictions
from consilium_tasks.image_multilabel.schema import FindingsData

if TYPE_CHECKING:
    import torch

    from consilium_shared.task import Loss, Measure
from consilium_tasks.volumes import check_volumes

_NETWORKS = "consilium_tasks.image_networks"
_SMALL_EDGE = 32


class ImageMultilabel(Task):
    """Findings of square images."""

    name = "image-multilabel"
    since = 2
    data = FindingsData
    models = {  # noqa: RUF012
        "small-cnn": ModelKind(ModelSpec, f"{_NETWORKS}:small_cnn"),
        "resnet18-gn": ModelKind(ModelSpec, f"{_NETWORKS}:resnet18"),
    }
    metrics = METRICS
    explained = EXPLAINED
    augmentations = ("light",)

    def check(self, study: Study) -> None:
        """A weight for each finding or none."""
        weights = study.training.class_weights
        if weights is not None and len(weights) != len(data_of(study).findings):
            raise ValueError("training.class_weights needs one number for each finding")
        check_volumes(study, data_of(study).image)

    def reads(self, study: Study) -> Reading:
        """A folder of images and the label table, with a column for each finding."""
        data = data_of(study)
        labels = tuple(Label(column=column, classes=data.values) for column in data.findings)
        return Reading("dicom", labels, image=data.image, optional=frozenset(data.findings))

    def invented(self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False) -> Examples:
        """Uniform images; of each finding absent, present and unknown in turn; every fourth image has none."""
        data = data_of(study)
        channels, *edges = data.image.shape
        edges = [min(edge, _SMALL_EDGE) for edge in edges] if small else edges
        number = np.arange(count, dtype=np.int64)
        findings = [np.where(number % 4 == 3, 0, (number + at) % 3 - 1) for at in range(len(data.findings))]
        return Examples((draw.random((count, channels, *edges), dtype=np.float32),), tuple(findings))

    def groups(self, study: Study, targets: Sequence[NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
        """Images with each finding, and those without any that is known."""
        found = {name: each == 1 for name, each in zip(self.outputs(study), targets, strict=True)}
        return found | {"no finding": ~np.any(list(found.values()), axis=0)}

    def augmentation(self, study: Study) -> Augmentation | None:
        """Small turns and shifts, for ``light``."""
        if study.training.augment == "none":
            return None
        from consilium_tasks.augmentation import Light

        return Light()

    def loss(self, study: Study, device: torch.device) -> Loss:
        """Mean of the cross entropies of a record's known findings, of logits ``[B, L]`` and findings int64 ``[B]``."""
        from consilium_tasks.image_multilabel.loss import known_cross_entropy

        return known_cross_entropy(study.training.class_weights, device)

    def layout(self, study: Study, *, local: bool = False) -> FindingsLayout:
        """Scores of each finding."""
        asked = METRICS if local else study.evaluation.metrics
        return FindingsLayout(self.outputs(study), frozenset(asked), study.privacy.mode == "dp" and not local)

    def outputs(self, study: Study) -> tuple[str, ...]:
        """The findings: a probability of each is measured."""
        return data_of(study).findings

    def measure(self, study: Study) -> Measure:
        """Probabilities ``[B, L]``."""
        from consilium_tasks.image_multilabel.loss import probabilities

        return probabilities

    def unknown(self, study: Study) -> NDArray[np.float64]:
        """One half each."""
        return np.full(len(self.outputs(study)), 0.5)

    def count(self, layout: FindingsLayout, measured: NDArray[np.float64], targets: Sequence[NDArray[Any]]) -> Counts:
        """Counts of findings, each ``[N]``, by their probabilities ``[N, L]``."""
        return count(np.stack(targets, axis=1), measured, layout)

    def predictions(self, study: Study) -> FindingPredictions:
        """A probability of each finding."""
        return FindingPredictions(self.outputs(study))


def data_of(study: Study) -> FindingsData:
    """Part of the contract about its data."""
    assert isinstance(study.data, FindingsData)  # noqa: S101  (the contract's validation made it)
    return study.data


TASK = ImageMultilabel()
