"""Convolution patches (im2col), and per-sample gradient norms and sums of convolutions that never hold all of them.

A convolution's weight is applied to T patches of C · K numbers, K the size of the kernel: up to K times what its inputs
are. So a record keeps the inputs. Its norms need no patch: the product of two patches is the sum over the kernel's K
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

from dpsgd.layer_records import OuterProduct, add

Cut = tuple[slice, ...]

_PATCHES = 2**22
"""Numbers of patches copied out at a time."""

_FEW_CHANNELS, _MANY_PLACES = 16, 2**12
"""Below so many channels of a group, and from so many places of the output on, a processor is faster with one sample
after the other than with all of them as groups of one convolution."""

_BLOCK, _LARGE_BLOCK = 2**18, 2**24
"""Numbers of a sum computed at a time: what fits a processor's cache, what fills an accelerator."""

_SUMMING, _GRAM, _SHIFTING = 0.033, 0.05, 1.2
"""Nanoseconds for each multiplication in a sum, for one in a Gram matrix, and for each number of a shifted one, as of
``tape.materializing_is_cheaper``."""


@dataclass(frozen=True)
class Geometry:
    """Geometry of a kernel that moves over its input, in one, two or three dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's convolution."""
        about = self.stride, self.padding, self.dilation, False, [0] * len(self.kernel), self.groups
        found: Tensor = torch.ops.aten.convolution(inputs, weight, bias, *about)
        return found

    def backward(self, grad: Tensor, inputs: Tensor, weight: Tensor, groups: int, which: tuple[bool, bool]) -> Any:
        """torch's gradients of a convolution: of its inputs, of its weight."""
        none = [0] * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            grad, inputs, weight, None, self.stride, self.padding, self.dilation, False, none, groups, [*which, False]
        )[:2]

    def per_sample_gradients(self, inputs: Tensor, grad: Tensor) -> Tensor:
        """Per-sample gradients ``[B, O, C / groups, *kernel]`` of inputs ``[B, C, …]`` and output gradients
        ``[B, O, …]``."""
        found = self._per_sample_gradients(inputs, grad)
        met = self.positions(tuple(inputs.shape[2:]), tuple(grad.shape[2:]))
        empty = [any(each.start == each.stop for each in at) for at, _ in met]
        if any(empty):  # some kernels leave in bfloat16 whatever was in the memory there
            found.masked_fill_(torch.tensor(empty, device=found.device).view(self.kernel), 0.0)
        return found

    def _per_sample_gradients(self, inputs: Tensor, grad: Tensor) -> Tensor:
        batch, channels, outputs = len(inputs), inputs.shape[1], grad.shape[1]
        one = grad.new_zeros(()).expand(batch * outputs, channels // self.groups, *self.kernel)  # its sizes alone count
        in_turn = channels // self.groups < _FEW_CHANNELS or grad[0, 0].numel() >= _MANY_PLACES
        if in_turn and grad.device.type == "cpu":
            pairs = ((grad[i : i + 1], inputs[i : i + 1]) for i in range(batch))
            return torch.stack([self.backward(*pair, one[:outputs], self.groups, (False, True))[1] for pair in pairs])
        found: Tensor = self.backward(
            grad.reshape(1, batch * outputs, *grad.shape[2:]),
            inputs.reshape(1, batch * channels, *inputs.shape[2:]),
            one,
            batch * self.groups,
            (False, True),
        )[1]
        return found.view(batch, outputs, channels // self.groups, *self.kernel)

    def patches(self, inputs: Tensor) -> Tensor:
        """Patches under the kernel at each place: ``[B, T, C · K]``, in one or two dimensions."""
        if set(self.kernel) == {1} and not any(self.padding):
            steps = tuple(slice(None, None, stride) for stride in self.stride)
            return inputs[(slice(None), slice(None), *steps)].flatten(2).transpose(1, 2)
        if len(self.kernel) == 1:
            flat = ((1, *self.kernel), (1, *self.dilation), (0, *self.padding), (1, *self.stride))
            return nn.functional.unfold(inputs.unsqueeze(2), *flat).transpose(1, 2)
        return nn.functional.unfold(inputs, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)

    def by_pixels(self, pixels: int, places: int) -> bool:
        """True where the Gram matrix takes fewer multiplications from pixels than from patches."""
        return pixels**2 <= places**2 * math.prod(self.kernel)

    def cost_factored(self, pixels: int, channels: int, places: int, outputs: int) -> float:
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
        (patients, images), pixels, every = pixel_grams.shape[:2], pixel_grams.shape[2 : 2 + len(places)], slice(None)
        found = pixel_grams.new_zeros((patients, images, *places, images, *places))
        for at, under in self.positions(tuple(pixels), places):
            found[(every, every, *at, every, *at)] += pixel_grams[(every, every, *under, every, *under)]
        return found

    def positions(self, pixels: tuple[int, ...], places: tuple[int, ...]) -> list[tuple[Cut, Cut]]:
        """Places, for each of the kernel's K positions, at which it lies on a pixel and not on padding, and those
        pixels; ``pixels`` and ``places`` are sizes."""
        along = [
            [_meeting(number * dilation - padding, stride, size, most) for number in range(kernel)]
            for kernel, stride, padding, dilation, size, most in zip(
                self.kernel, self.stride, self.padding, self.dilation, pixels, places, strict=True
            )
        ]
        return [(tuple(at for at, _ in each), tuple(under for _, under in each)) for each in itertools.product(*along)]


def _meeting(shift: int, stride: int, pixels: int, places: int) -> tuple[slice, slice]:
    """The places t, and their pixels t · stride + shift, that are between 0 and ``pixels``."""
    first, last = max(0, -(shift // stride)), min(places, (pixels - 1 - shift) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last), slice(first * stride + shift, (last - 1) * stride + shift + 1, stride)


@dataclass
class ConvolutionRecord(OuterProduct):
    """Inputs ``[n, C, *pixels]`` and deltas ``[n, O, *places]`` of n rows, of one weight ``[O, C, *kernel]``: a product
    of the inputs' patches."""

    geometry: Geometry

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the patients' gradients, and squared reaches: float64 ``[P]``."""
        pixels, places = self.inputs.shape[2:], self.deltas.shape[2:]
        if not self.geometry.by_pixels(pixels.numel(), places.numel()):
            return self._unfolded().squares()
        inputs = self.owners.by_patient(self.inputs.double().flatten(2).transpose(1, 2))
        deltas = self.owners.by_patient(self.deltas.double().flatten(2).transpose(1, 2))
        images = deltas.shape[1] // places.numel()
        grams = torch.bmm(inputs, inputs.transpose(1, 2)).view(len(inputs), images, *pixels, images, *pixels)
        grams = self.geometry.patch_grams(grams, tuple(places)).view(len(inputs), deltas.shape[1], deltas.shape[1])
        terms = self.weights[0][0].numel() + self.deltas.shape[1]
        return self._squares(grams, torch.bmm(deltas, deltas.transpose(1, 2)), terms)

    def add_weighted_sum(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        """Add to the clipped sum, as ``Tape.add_weighted_sum`` has it."""
        (weight,), (rows, channels, *pixels) = self.weights, self.inputs.shape
        outputs, *places = self.deltas.shape[1:]
        deltas = _to_float64(self.deltas.movedim(0, -1)).mul_(self.owners.to_rows(factors, rows))
        inputs = _to_float64(self.inputs.movedim((0, 1), (-2, -1)))
        positions = self.geometry.positions(tuple(pixels), tuple(places))
        total = totals[weight].view(outputs, channels, len(positions))
        size = max(1, _PATCHES // (len(positions) * deltas[0].numel()))
        for start in range(0, channels, size):
            cut = inputs[..., start : start + size]
            patches = [(at, cut[under].flatten(0, -2)) for at, under in positions]
            self._add_block(patches, deltas, total[:, start : start + size])

    @staticmethod
    def _add_block(patches: list[tuple[Cut, Tensor]], deltas: Tensor, total: Tensor) -> None:
        """Add to ``total`` ``[O, c, K]`` what ``deltas`` ``[O, *places, n]`` and ``patches`` ``[· n, c]`` give at each
        of the kernel's positions."""
        size = max(1, (_BLOCK if deltas.device.type == "cpu" else _LARGE_BLOCK) // total[0].numel())
        for start in range(0, len(total), size):  # each block's sum by itself, and then once to the total
            block = deltas[start : start + size]
            part = torch.empty((len(patches), len(block), total.shape[1]), dtype=deltas.dtype, device=deltas.device)
            for (at, each), found in zip(patches, part, strict=True):
                torch.mm(block[(slice(None), *at)].flatten(1), each, out=found)
            add(total[start : start + size], part.permute(1, 2, 0))

    def per_sample(self) -> list[Tensor]:
        """The patients' gradients at each weight: ``[P, numel]``."""
        return self._unfolded().per_sample()

    def _unfolded(self) -> OuterProduct:
        patches = self.geometry.patches(self.inputs)
        return OuterProduct(self.weights, patches, self.deltas.flatten(2).transpose(1, 2), self.owners)


def _to_float64(tensor: Tensor) -> Tensor:
    """Copy in float64, contiguous in memory."""
    return torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device).copy_(tensor)
