"""Rules of a contract for volumes, for the tasks whose records are images."""

from __future__ import annotations

from consilium_shared.inputs import Image
from consilium_shared.study import Study

MODELS = ("small-cnn",)
"""Models that have layers of three dimensions."""


def check_volumes(study: Study, image: Image) -> None:
    """Check that model and training can take the study's volumes, where it has any; raises ValueError."""
    if image.depth is None:
        return
    if study.model.name not in MODELS:
        raise ValueError(f"data.image.depth takes the model {', '.join(MODELS)}, not {study.model.name}")
    if study.training.augment != "none":
        raise ValueError("training.augment turns single images; a study of volumes has none")
