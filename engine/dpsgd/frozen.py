"""Frozen batch normalisation: what a public model's batch norm does with its fixed statistics, as an affine map.

A batch norm in training mixes the samples of a batch. With the mean and variance that it was published with, it is
x · γ / √(v + ε) + (β - m · γ / √(v + ε)) of each channel: constants, which no record changes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from consilium_shared.errors import ConfigurationError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ChannelAffine(nn.Module):
    """Constant scale and shift of each channel, as buffers ``scale`` and ``shift`` ``[C]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("shift", shift.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, C, …]`` to ``[B, C, …]``."""
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        return inputs * self.scale.view(shape) + self.shift.view(shape)


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Copy of a model in which each batch norm is an affine map by its statistics.

    Where it follows a convolution or a linear layer in an ``nn.Sequential`` it becomes part of that layer's weights;
    elsewhere it is a ``ChannelAffine``. Outputs are those of ``model.eval()``, but for rounding.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> freeze_batch_norm(model)
    Sequential(
      (0): Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )

    Raises:
        ConfigurationError: a batch norm without statistics.
    """
    frozen = copy.deepcopy(model)
    for parent in list(frozen.modules()):
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm):
                folded = _folded(before[1], child) if before and isinstance(parent, nn.Sequential) else None
                if before is not None and folded is not None:
                    setattr(parent, before[0], folded)
                    setattr(parent, name, nn.Identity())
                else:
                    setattr(parent, name, _affine(child))
            before = name, child
    return _affine(frozen) if isinstance(frozen, BatchNorm) else frozen


def _folded(layer: nn.Module, norm: BatchNorm) -> nn.Module | None:
    """The layer with the norm in its weights, trainable as they were; None where it takes none in."""
    if norm.running_var is None or layer._forward_hooks or norm._forward_hooks:
        return None
    training = layer.training
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        found: nn.Module = fuse_conv_bn_eval(layer.eval(), norm.eval())  # type: ignore[type-var]
    elif type(layer) is nn.Linear:
        found = fuse_linear_bn_eval(layer.eval(), norm.eval())
    else:
        return None
    return found.train(training)


def _affine(norm: BatchNorm) -> ChannelAffine:
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigurationError("a batch norm without statistics mixes the samples of a batch; use nn.GroupNorm")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return ChannelAffine(scale, shift if norm.bias is None else shift + norm.bias.detach())
