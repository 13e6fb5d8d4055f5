"""Convolutional models of images: float32 ``[B, 1 or 3, S, S]`` in [0, 1] to logits ``[B, C]``, any S >= 8.

Normalisation is over groups of one sample's channels (Wu & He 2018): batch normalisation would mix patients, and no
bound on one patient's gradient would hold. No activation works in place, because per-sample gradients need what a
layer has put out. The last pooling is a plain mean, whose gradient is deterministic on every device.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from consilium_shared import task
from consilium_shared.inputs import Image
from consilium_shared.study import Study
from consilium_tasks.classification.task import options_of

LARGE_IMAGE = 64
"""Edge of an image from which on ResNet-18 begins with the 7 × 7 stride-2 stem and pooling of He et al. 2016."""

CENTER, SCALE = 0.5, 0.25
"""Brightness in [0, 1] to about mean 0 and deviation 1."""

RECTIFIED_MEAN, POOLED_SCALE = (2.0 * math.pi) ** -0.5, 4.0
"""Normalised and rectified features have a mean of 1/√(2π), and their means over an image differ little from one image
to the next. Without that common part a sample's clipped gradient is spent on what tells samples apart."""


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the most groups, up to ``groups``, that divide the channels."""
    return nn.GroupNorm(max(g for g in range(1, groups + 1) if channels % g == 0), channels)


class SmallCNN(nn.Module):
    """Three strided convolutions, ``layers`` more at the last width, mean over the image, one linear layer.

    With the defaults (width 64, one layer) about 61 thousand parameters: few enough for the noise of a small
    hospital's privacy budget.
    """

    def __init__(self, classes: int, width: int, layers: int, channels: int = 1, volumes: bool = False) -> None:
        super().__init__()
        widths = [channels, max(1, width // 4), max(1, width // 2), width] + [width] * layers
        pairs = list(itertools.pairwise(widths))
        convolution = nn.Conv3d if volumes else nn.Conv2d
        self.convolutions = nn.ModuleList(
            convolution(a, b, 5 if i == 0 else 3, stride=2 if i < 3 else 1, padding=2 if i == 0 else 1)
            for i, (a, b) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(_norm(b, 8) for _, b in pairs)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]`` of images ``[B, 1 or 3, S, S]`` or volumes ``[B, 1, D, S, S]``."""
        inputs = (inputs - CENTER) / SCALE
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            inputs = torch.relu(norm(convolution(inputs)))
        logits: torch.Tensor = self.head((inputs.flatten(2).mean(2) - RECTIFIED_MEAN) * POOLED_SCALE)
        return logits


class _Block(nn.Module):
    """The basic residual block of ResNet-18 with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = _norm(outputs, 32)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = _norm(outputs, 32)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), _norm(outputs, 32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        branch = self.second_norm(self.second(torch.relu(self.first_norm(self.first(inputs)))))
        direct = inputs if self.shortcut is None else self.shortcut(inputs)
        return torch.relu(branch + direct)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, table 1) with GroupNorm, about 11.2 million parameters."""

    def __init__(self, classes: int, small_images: bool, channels: int = 1) -> None:
        super().__init__()
        if small_images:
            self.stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        else:
            self.stem = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        self.pool: nn.Module | None = None if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        self.stem_norm = _norm(64, 32)
        stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
        self.blocks = nn.ModuleList(_Block(*stage) for stage in [*stages, (256, 512, 2), (512, 512, 1)])
        self.head = nn.Linear(512, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]`` of images ``[B, 1 or 3, S, S]``."""
        inputs = torch.relu(self.stem_norm(self.stem((inputs - CENTER) / SCALE)))
        if self.pool is not None:
            inputs = self.pool(inputs)
        for block in self.blocks:
            inputs = block(inputs)
        logits: torch.Tensor = self.head(inputs.mean((2, 3)))
        return logits


def small_cnn(study: Study) -> SmallCNN:
    """``SmallCNN`` as the contract has it, with an output for each that its task names."""
    options = options_of(study)
    outputs = len(task.of(study).outputs(study))
    image = _image(study)
    return SmallCNN(outputs, options.hidden, options.layers, image.channels, volumes=image.depth is not None)


def resnet18(study: Study) -> ResNet18:
    """``ResNet18`` for the contract's size of images, with an output for each that its task names."""
    image = _image(study)
    return ResNet18(len(task.of(study).outputs(study)), image.size < LARGE_IMAGE, image.channels)


def _image(study: Study) -> Image:
    image = task.reads(study).image
    assert image is not None  # noqa: S101  (a task of images reads images)
    return image
