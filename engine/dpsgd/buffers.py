"""Buffers as constants: whatever a module writes into them in training is taken back before the next pass.

A buffer such as a table of positions is no weight, and has no gradient. One that a pass changes, by what it has seen,
would carry one patient's numbers into the gradients of others, without noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConstantBuffers:
    """Buffers of a model, kept as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._versions = [buffer._version for _, _, buffer, _ in self._buffers]

    def restore(self) -> None:
        """Undo what was changed since."""
        for number, (module, name, buffer, value) in enumerate(self._buffers):
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if buffer._version != self._versions[number]:
                with torch.no_grad():
                    buffer.copy_(value)
                self._versions[number] = buffer._version


def keeps_statistics(module: nn.Module) -> bool:
    """True for a normalisation that keeps a mean over the samples that it has seen."""
    found: Tensor | None = getattr(module, "running_mean", None)
    return isinstance(module, nn.modules.batchnorm._NormBase) and found is not None
