"""Models by name, as their tasks build them, made only of layers whose per-sample gradients are known.

Importing this package does not import torch; building a model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilium_shared import task
from consilium_shared.study import Study

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build"]


def build(study: Study) -> nn.Module:
    """The study's model with its initial weights, float32 on the CPU.

    The weights depend on ``study.model.seed`` alone; torch's global generator is left as it was found. What the study
    does not train has ``requires_grad`` False. A study that starts from a file's weights has them put in afterwards
    (``start``). The model is called with the task's inputs, each ``[B, ...]``, and returns its outputs ``[B, ...]``.
    """
    import torch

    from consilium_shared.models.adaptation import adapt, start_at

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.model.seed)
        model = task.of(study).construct(study)
        start_at(model, task.of(study).prior(study))
        adapt(model, study.model)
        return model
