"""Names and shapes of a study's model's inputs and outputs, as everything outside training calls them."""

from __future__ import annotations

from consilium_shared import task
from consilium_shared.study import Study

OUTPUTS = ("logits", "probabilities")


def inputs(study: Study) -> dict[str, tuple[int, ...]]:
    """Shape of one record in each input, by name, in the order in which the model takes them."""
    return dict(zip(task.reads(study).names, task.of(study).shapes(study), strict=True))


def classes(study: Study) -> tuple[str, ...]:
    """Names of the classes, in the order of the outputs."""
    return task.of(study).outputs(study)
