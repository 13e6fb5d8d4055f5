"""Image classification: one class for each image, of radiographs and the like."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from consilium_shared.inputs import Image
from consilium_shared.study import Study
from consilium_shared.suggestion import Asked, Suggestion
from consilium_shared.task import Augmentation, ModelKind, Reading
from consilium_tasks.classification.schema import ModelSpec
from consilium_tasks.classification.task import Classification, data_of
from consilium_tasks.image_classification.suggestion import suggest
from consilium_tasks.volumes import check_volumes

_NETWORKS = "consilium_tasks.image_networks"
_SMALL_EDGE = 32


class ImageClassification(Classification):
    """Classes of square images."""

    name = "image-classification"
    part = "image"
    models = {  # noqa: RUF012
        "small-cnn": ModelKind(ModelSpec, f"{_NETWORKS}:small_cnn"),
        "resnet18-gn": ModelKind(ModelSpec, f"{_NETWORKS}:resnet18"),
    }
    augmentations = ("light",)

    def check(self, study: Study) -> None:
        """Images, in colour only where the contract's schema has it."""
        super().check(study)
        if image_of(study).channels == 3 and study.schema_version < 2:
            raise ValueError("data.image.channels: 3 came with schema 2")
        check_volumes(study, image_of(study))

    def augmentation(self, study: Study) -> Augmentation | None:
        """Small turns and shifts, for ``light``."""
        if study.training.augment == "none":
            return None
        from consilium_tasks.augmentation import Light

        return Light()

    def suggestion(self, asked: Asked) -> Suggestion:
        """A small network, in sums with privacy."""
        return suggest(asked)

    def reads(self, study: Study) -> Reading:
        """A folder of images and the label table."""
        return Reading("dicom", (data_of(study).label,), image=image_of(study))

    def inputs(
        self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False
    ) -> tuple[NDArray[np.float32], ...]:
        """Images float32 ``[count, C, S, S]``."""
        channels, *edges = image_of(study).shape
        edges = [min(edge, _SMALL_EDGE) for edge in edges] if small else edges
        return (draw.random((count, channels, *edges), dtype=np.float32),)


def image_of(study: Study) -> Image:
    """The study's image."""
    image = data_of(study).image
    assert image is not None  # noqa: S101  (``check`` refuses a contract without)
    return image


TASK = ImageClassification()
