"""Names and shapes of a study's model's inputs and outputs, as everything outside training calls them."""

from __future__ import annotations

from consilium_shared.models import shape
from consilium_shared.study import Study

OUTPUTS = ("logits", "probabilities")


def inputs(study: Study) -> dict[str, tuple[int, ...]]:
    """Shape of one record in each input, by name, in the order in which the model takes them."""
    if study.data.image is not None:
        names: tuple[str, ...] = ("image",)
    else:
        names = ("series", "statics") if study.data.series is not None else ("record",)
    return dict(zip(names, shape.inputs(study), strict=False))


def classes(study: Study) -> tuple[str, ...]:
    """Names of the classes, in the order of the outputs."""
    return study.data.label.classes
