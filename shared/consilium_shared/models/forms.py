"""Names and shapes of a study's model's inputs and outputs, as everything outside training calls them."""

from __future__ import annotations

from consilium_shared import task
from consilium_shared.study import Study

LOGITS = "logits"


def inputs(study: Study) -> dict[str, tuple[int, ...]]:
    """Shape of one record in each input, by name, in the order in which the model takes them."""
    return dict(zip(task.reads(study).names, task.of(study).shapes(study), strict=True))


def outputs(study: Study) -> dict[str, tuple[int, ...]]:
    """Shape of one record in each output, by name: the logits, then the scores; raises as ``task.predictions``."""
    own = task.predictions(study)
    return {LOGITS: task.of(study).output_shape(study), own.output: (len(own.names),)}
