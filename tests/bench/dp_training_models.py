"""What ``dp_training.py`` trains: models of the sizes that hospitals use, batches to train them on, and their marks.

Each is made of torch's own layers. Opacus cannot train nn.LSTM and nn.GRU and gets its replacements for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn

from consilium_tasks.image_networks import ResNet18
from dpsgd import AddedConstant


@dataclass(frozen=True)
class Marks:
    """What ours is held to: at most ``ratio`` × plain in time and ``memory`` × plain in peak memory, and at least
    ``speedup`` × faster than Opacus's hooks."""

    ratio: float
    speedup: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Case:
    """A model and the samples it is trained on.

    ``build`` and ``build_for_opacus`` give the model with random weights. A sample has shape ``sample``: float32 of
    N(0, 1), or int64 below ``tokens``. Its labels have shape ``labels`` (() is one label) and are below ``classes``.
    """

    build: Callable[[], nn.Module]
    build_for_opacus: Callable[[], nn.Module]
    sample: tuple[int, ...]
    classes: int
    marks: dict[int, Marks]
    """By batch size; these sizes are measured unless others are asked for."""
    tokens: int | None = None
    labels: tuple[int, ...] = ()

    def batch(self, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """``size`` samples and their labels, the same at every call."""
        draw = torch.Generator().manual_seed(size)
        shape = (size, *self.sample)
        if self.tokens is None:
            samples = torch.randn(shape, generator=draw)
        else:
            samples = torch.randint(self.tokens, shape, generator=draw)
        labels = torch.randint(self.classes, (size, *self.labels), generator=draw)
        return samples.to(device), labels.to(device)


def cases(kind: str) -> dict[str, Case]:
    """All models by name, with sizes for one core (``cpu``) or such as fill an accelerator (``cuda``)."""
    return _for_one_core() if kind == "cpu" else _for_an_accelerator()


def _for_one_core() -> dict[str, Case]:
    cnn, resnet = Marks(1.2, 2.5, 1.4), Marks(1.4, 6.0, 1.4)
    mini = (16, (4, 4, 4), 32, False)
    return {
        "small-cnn": _plain(lambda: SmallCNN(2, edge=64), (1, 64, 64), 2, {64: cnn}),
        "resnet18-gn": _plain(lambda: colour_resnet(10), (3, 64, 64), 10, {32: resnet}),
        "densenet-like": _plain(lambda: DenseNet(1, 5, *mini), (1, 64, 64), 5, {64: Marks(1.3, 2.5, 1.4)}),
        "unet-like": _plain(lambda: UNet(16, 3), (1, 64, 64), 2, {64: Marks(1.3, 2.5, 1.4)}, labels=(64, 64)),
        "lstm": _series(nn.LSTM, DPLSTM, {64: Marks(2.0, 6.0, 2.0), 256: Marks(1.4, 6.0, 2.0)}),
        "gru": _series(nn.GRU, DPGRU, {64: Marks(1.1, 6.0, 2.0)}),
        "embedding-lstm": _tokens({64: Marks(1.7, 6.0, 2.0)}),
        "rnn": _series(nn.RNN, DPRNN, {64: Marks(1.7, 6.0, 2.0)}),
        "transformer": _plain(lambda: Transformer(40, 64, 2), (48, 40), 2, {64: Marks(1.7)}),
        "autoencoder-1d": _plain(lambda: Autoencoder(1, 16), (1, 512), 2, {64: Marks(2.0)}, labels=(512,)),
        "autoencoder-3d": _plain(lambda: Autoencoder(3, 8), (1, 16, 16, 16), 2, {32: Marks(2.0)}, labels=(16, 16, 16)),
    }


def _for_an_accelerator() -> dict[str, Case]:
    goal = Marks(1.15)
    densenet121 = (32, (6, 12, 24, 16), 64, True)
    return {
        "small-cnn": _plain(lambda: SmallCNN(2, edge=64), (1, 64, 64), 2, {1024: goal}),
        "resnet18-gn": _plain(lambda: colour_resnet(10), (3, 224, 224), 10, {256: goal, 1024: goal}),
        "densenet-like": _plain(lambda: DenseNet(3, 5, *densenet121), (3, 224, 224), 5, {256: goal}),
        "unet-like": _plain(lambda: UNet(64, 4), (1, 256, 256), 2, {64: goal}, labels=(256, 256)),
        "lstm": _series(nn.LSTM, DPLSTM, {256: goal, 1024: goal}),
        "gru": _series(nn.GRU, DPGRU, {256: goal, 1024: goal}),
        "embedding-lstm": _tokens({512: goal}),
    }


def _plain(
    build: Callable[[], nn.Module],
    sample: tuple[int, ...],
    classes: int,
    marks: dict[int, Marks],
    labels: tuple[int, ...] = (),
) -> Case:
    return Case(build, build, sample, classes, marks, labels=labels)


def _series(layer: type[nn.RNNBase], for_opacus: type[nn.Module], marks: dict[int, Marks]) -> Case:
    """40 vital signs and laboratory values over 48 hours."""
    return Case(lambda: LastState(layer(40, 128, batch_first=True), 2),
                lambda: LastState(for_opacus(40, 128, batch_first=True), 2), (48, 40), 2, marks)  # fmt: skip


def _tokens(marks: dict[int, Marks]) -> Case:
    """Notes of 200 words, of a vocabulary of 5000."""
    return Case(lambda: LastState(nn.LSTM(64, 128, batch_first=True), 2, nn.Embedding(5000, 64)),
                lambda: LastState(DPLSTM(64, 128, batch_first=True), 2, nn.Embedding(5000, 64)),
                (200,), 2, marks, tokens=5000)  # fmt: skip


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def convolution(inputs: int, outputs: int, *, bias: bool) -> list[nn.Module]:
    """A 3 × 3 convolution that keeps the size, its norm, and a rectifier."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), group_norm(outputs), nn.ReLU()]


class SmallCNN(nn.Sequential):
    """Three convolutions of 16, 32 and 64 channels, each pooled, and two linear layers: 0.55 million parameters at
    64 × 64, nearly all of them in the first linear layer."""

    def __init__(self, classes: int, *, edge: int) -> None:
        blocks = [[*convolution(a, b, bias=True), nn.MaxPool2d(2)] for a, b in pairwise((1, 16, 32, 64))]
        head = [nn.Flatten(), nn.Linear(64 * (edge // 8) ** 2, 128), nn.ReLU(), nn.Linear(128, classes)]
        super().__init__(*[layer for block in blocks for layer in block], *head)


def colour_resnet(classes: int) -> nn.Module:
    """Our ResNet-18 with GroupNorm, for three colours."""
    model = ResNet18(classes, small_images=False)
    model.stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    return model


class DenseNet(nn.Module):
    """DenseNet-BC (Huang et al. 2017) with GroupNorm: each layer adds ``growth`` channels to all that came before."""

    def __init__(
        self, inputs: int, classes: int, growth: int, blocks: tuple[int, ...], width: int, large_images: bool
    ) -> None:
        """``blocks`` gives the layers of each block, ``width`` the channels that enter the first."""
        super().__init__()
        if large_images:
            stem = nn.Conv2d(inputs, width, 7, stride=2, padding=3, bias=False)
            self.stem = nn.Sequential(stem, group_norm(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for layers in blocks:
            if self.blocks:
                halved = nn.Conv2d(width, width // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(group_norm(width), nn.ReLU(), halved, nn.AvgPool2d(2)))
                width //= 2
            self.blocks.append(nn.ModuleList(self._layer(width + i * growth, growth) for i in range(layers)))
            width += layers * growth
        self.norm, self.head = group_norm(width), nn.Linear(width, classes)

    @staticmethod
    def _layer(inputs: int, growth: int) -> nn.Module:
        narrow = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        wide = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        return nn.Sequential(group_norm(inputs), nn.ReLU(), narrow, group_norm(4 * growth), nn.ReLU(), wide)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]`` of images ``[B, channels, S, S]``."""
        found = self.stem(images)
        for number, block in enumerate(self.blocks):
            found = self.transitions[number - 1](found) if number else found
            for layer in block:
                found = torch.cat([found, layer(found)], dim=1)
        return self.head(torch.relu(self.norm(found)).mean((2, 3)))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with GroupNorm, padded convolutions, and two classes of pixels."""

    def __init__(self, width: int, depth: int) -> None:
        """``width`` channels at full size, twice as many after each of ``depth`` halvings."""
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(self._twice(a, b) for a, b in [(1, width), *pairs])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(self._twice(2 * a, a) for a, _ in pairs)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(*convolution(inputs, outputs, bias=False), *convolution(outputs, outputs, bias=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, 2, S, S]`` of images ``[B, 1, S, S]``, S a multiple of 2 to the power of the depth."""
        found, kept = self.down[0](images), []
        for level in self.down[1:]:
            kept.append(found)
            found = level(nn.functional.max_pool2d(found, 2))
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            found = merge(torch.cat([up(found), kept.pop()], dim=1))
        return self.head(found)


class LastState(nn.Module):
    """A recurrent layer, over an embedding where there is one, and a linear layer of its last state."""

    def __init__(self, recurrent: nn.Module, classes: int, embedding: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding, self.recurrent, self.head = embedding, recurrent, nn.Linear(128, classes)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]`` of series ``[B, T, D]``, or of tokens ``[B, T]``."""
        states, _ = self.recurrent(series if self.embedding is None else self.embedding(series))
        return self.head(states[:, -1])


class Transformer(nn.Module):
    """Attention over the steps of a series, with positions that are learned."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(inputs, width), AddedConstant(48, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, 2)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.encoder(self.positions(self.embed(series))).mean(1))
        return found


class Autoencoder(nn.Sequential):
    """Two strided convolutions and two transposed ones, of one or three dimensions, to two classes at each place."""

    def __init__(self, dimensions: int, width: int) -> None:
        down, up = (nn.Conv1d, nn.ConvTranspose1d) if dimensions == 1 else (nn.Conv3d, nn.ConvTranspose3d)
        norm = nn.InstanceNorm1d if dimensions == 1 else nn.InstanceNorm3d
        super().__init__(
            down(1, width, 3, 2, 1), norm(width, affine=True), nn.PReLU(width),
            down(width, 2 * width, 3, 2, 1), norm(2 * width, affine=True), nn.PReLU(2 * width),
            up(2 * width, width, 2, 2), norm(width, affine=True), nn.PReLU(width),
            up(width, 2, 2, 2),
        )  # fmt: skip
