"""What lies under a convolution's kernel at each place of its output, and the entry that a convolution leaves on a tape.

A convolution's weight is applied to T patches of C · K numbers, K the size of the kernel: up to K times what its inputs
are. So an entry keeps the inputs. Its norms need no patch: the product of two patches is the sum over the kernel's K
positions of products of two pixels, so the patches' Gram matrix is that of the pixels, shifted and added K times. And
for the sum patches are copied out a few channels at a time, which stay in the processor's cache until they are
multiplied.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilium_client.training.entries import Product, add

_BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Numbers of patches, and of their product, computed at a time."""

_SUMMING, _GRAM, _SHIFTING = 0.033, 0.05, 1.2
"""Nanoseconds for each multiplication in a sum, for one in a Gram matrix, and for each number of a shifted one, as of
``tape.forms_rows``."""


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input, in one, two or three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def backward(self, grad: Tensor, inputs: Tensor, weight: Tensor, groups: int, which: tuple[bool, bool]) -> Any:
        """torch's gradients of a convolution: of its inputs, of its weight."""
        none = [0] * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            grad, inputs, weight, None, self.stride, self.padding, self.dilation, False, none, groups, [*which, False]
        )[:2]

    def formed(self, inputs: Tensor, grad: Tensor) -> Tensor:
        """Per-sample gradients ``[B, O, C / groups, *kernel]`` of inputs ``[B, C, …]`` and output gradients
        ``[B, O, …]``."""
        batch, channels, outputs = len(inputs), inputs.shape[1], grad.shape[1]
        one = grad.new_zeros(()).expand(batch * outputs, channels // self.groups, *self.kernel)  # its sizes alone count
        found: Tensor = self.backward(
            grad.reshape(1, batch * outputs, *grad.shape[2:]),
            inputs.reshape(1, batch * channels, *inputs.shape[2:]),
            one,
            batch * self.groups,
            (False, True),
        )[1]
        return found.view(batch, outputs, channels // self.groups, *self.kernel)

    def patches(self, inputs: Tensor) -> Tensor:
        """What lies under the kernel at each place: ``[B, T, C · K]``, in one or two dimensions."""
        if set(self.kernel) == {1} and not any(self.padding):
            steps = tuple(slice(None, None, stride) for stride in self.stride)
            return inputs[(slice(None), slice(None), *steps)].flatten(2).transpose(1, 2)
        if len(self.kernel) == 1:
            flat = ((1, *self.kernel), (1, *self.dilation), (0, *self.padding), (1, *self.stride))
            return nn.functional.unfold(inputs.unsqueeze(2), *flat).transpose(1, 2)
        return nn.functional.unfold(inputs, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)

    def by_pixels(self, pixels: int, places: int) -> bool:
        """Whether a Gram matrix takes fewer multiplications of pixels than of patches."""
        return pixels**2 <= places**2 * math.prod(self.kernel)

    def spared(self, pixels: int, channels: int, places: int, outputs: int) -> float:
        """Nanoseconds for one sample's norm and part of the sum without its gradient. Copying patches is not in it:
        where few are applied it costs the same with the gradient."""
        kernel, summing = math.prod(self.kernel), places * outputs * channels * math.prod(self.kernel) * _SUMMING
        if self.by_pixels(pixels, places):
            shifting = places**2 * kernel * _SHIFTING
            return summing + shifting + (pixels**2 * channels + places**2 * outputs) * _GRAM
        return summing + places**2 * (channels * kernel + outputs) * _GRAM

    def patch_grams(self, pixel_grams: Tensor, places: tuple[int, ...]) -> Tensor:
        """The patches' Gram matrices, of the pixels'.

        Args:
            pixel_grams: ``[P, R, *pixels, R, *pixels]`` of R images of each of P.
            places: sizes of the output.

        Returns:
            ``[P, R, *places, R, *places]``.
        """
        around = [side for padding in reversed(self.padding) for side in (padding, padding)] + [0, 0]
        pixel_grams = nn.functional.pad(pixel_grams, around + around) if any(self.padding) else pixel_grams
        patients, images, every = *pixel_grams.shape[:2], slice(None)
        found = pixel_grams.new_zeros((patients, images, *places, images, *places))
        for position in itertools.product(*(range(size) for size in self.kernel)):
            start = [at * dilation for at, dilation in zip(position, self.dilation, strict=True)]
            under = tuple(
                slice(first, first + (size - 1) * stride + 1, stride)
                for first, size, stride in zip(start, places, self.stride, strict=True)
            )
            found += pixel_grams[(every, every, *under, every, *under)]
        return found

    def padded(self, inputs: Tensor) -> Tensor:
        """Inputs ``[n, C, *pixels]`` with their padding, samples last: float64 ``[C, *padded, n]``."""
        sizes = [size + 2 * padding for size, padding in zip(inputs.shape[2:], self.padding, strict=True)]
        found = inputs.new_zeros((inputs.shape[1], *sizes, len(inputs)), dtype=torch.float64)
        within = (slice(p, p + size) for p, size in zip(self.padding, inputs.shape[2:], strict=True))
        found[(slice(None), *within)] = inputs.movedim(0, -1)
        return found

    def under(self, padded: Tensor, places: tuple[int, ...]) -> Tensor:
        """Patches ``[c · K, T · n]`` of c channels of ``padded``."""
        channel, *steps, sample = padded.stride()
        shape = (len(padded), *self.kernel, *places, padded.shape[-1])
        kernel = (step * dilation for step, dilation in zip(steps, self.dilation, strict=True))
        moves = (step * stride for step, stride in zip(steps, self.stride, strict=True))
        found = padded.as_strided(shape, (channel, *kernel, *moves, sample), padded.storage_offset())
        return found.reshape(len(padded) * math.prod(self.kernel), -1)


@dataclass
class Convolved(Product):
    """Inputs ``[n, C, *pixels]`` and deltas ``[n, O, *places]`` of n rows, of one weight ``[O, C, *kernel]``: a product
    of the inputs' patches."""

    geometry: Geometry

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the patients' gradients, and squared reaches: float64 ``[P]``."""
        pixels, places = self.inputs.shape[2:], self.deltas.shape[2:]
        if not self.geometry.by_pixels(pixels.numel(), places.numel()):
            return self._unfolded().squares()
        inputs = self.owners.beside(self.inputs.double().flatten(2).transpose(1, 2))
        deltas = self.owners.beside(self.deltas.double().flatten(2).transpose(1, 2))
        images = deltas.shape[1] // places.numel()
        grams = torch.bmm(inputs, inputs.transpose(1, 2)).view(len(inputs), images, *pixels, images, *pixels)
        grams = self.geometry.patch_grams(grams, tuple(places)).view(len(inputs), deltas.shape[1], deltas.shape[1])
        return self._squares(grams, torch.bmm(deltas, deltas.transpose(1, 2)), self._terms())

    def _terms(self) -> int:
        return self.weights[0].numel() // self.deltas.shape[1] + self.deltas.shape[1]

    def add_up(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        """See ``Tape.add_up``."""
        geometry, (weight,) = self.geometry, self.weights
        outputs, places = self.deltas.shape[1], tuple(self.deltas.shape[2:])
        deltas = self.deltas.movedim(0, -1).double() * self.owners.each(factors, len(self.deltas))
        deltas, padded = deltas.reshape(outputs, -1), geometry.padded(self.inputs)
        total, kernel = totals[weight].view(outputs, -1), math.prod(geometry.kernel)
        size = max(1, _BLOCK[deltas.device.type] // (kernel * max(deltas.shape)))
        for start in range(0, len(padded), size):  # each block's sum by itself, and then once to the total
            patches = geometry.under(padded[start : start + size], places)
            add(total[:, start * kernel : (start + size) * kernel], deltas @ patches.t())

    def formed(self) -> list[Tensor]:
        """The patients' gradients at each weight: ``[P, numel]``."""
        return self._unfolded().formed()

    def _unfolded(self) -> Product:
        patches = self.geometry.patches(self.inputs)
        return Product(self.weights, patches, self.deltas.flatten(2).transpose(1, 2), self.owners)
