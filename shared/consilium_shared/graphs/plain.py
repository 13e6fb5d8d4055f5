"""Layers without weights, by name: options and the sizes that come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from consilium_shared.graphs.node import (
    LONGEST,
    MOST_INPUTS,
    Axes,
    Axis,
    Constant,
    Node,
    Rate,
    Shape,
    Size,
    Sizes,
    ranked,
    said,
    within,
)
from consilium_shared.graphs.weighted import Amounts, Windowed

Place = Annotated[int, Field(ge=0, le=LONGEST)]


class Activation(Node):
    """Function of each number by itself."""

    layer: Literal[
        "relu", "relu6", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "hardswish", "hardsigmoid", "identity"
    ]

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return given[0]


class LeakyReLU(Node):
    """Rectifier with a constant slope below zero."""

    layer: Literal["leaky_relu"]
    slope: Annotated[float, Field(ge=0, le=1)] = 0.01

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return given[0]


class Softmax(Node):
    """Shares that add up to 1 along one axis."""

    layer: Literal["softmax"]
    axis: Axis

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        within((self.axis,), given[0])
        return given[0]


class Dropout(Node):
    """Numbers, or whole channels, set to zero in training, by each record's own random numbers."""

    layer: Literal["dropout"]
    rate: Rate
    channels: bool = False

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return ranked(given[0], 2, 4, "channels and at least one dimension") if self.channels else given[0]


class Affine(Node):
    """Every number times a constant, plus a constant."""

    layer: Literal["affine"]
    scale: Constant = 1.0
    shift: Constant = 0.0

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return given[0]


class Pool(Windowed):
    """Largest number under a window, or the mean of all under it (zeros of the padding among them)."""

    layer: Literal["max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"]
    stride: Sizes
    padding: Amounts

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Channels, and smaller sides."""
        channels, *sides = self.planes(given)
        if any(2 * padding > kernel for padding, kernel in zip(self.padding, self.kernel, strict=True)):
            raise ValueError("has a padding of more than half its window")
        ones = (1,) * self.dimensions
        return channels, *self.moved(tuple(sides), self.kernel, self.stride, self.padding, ones)

    def work(self, given: Sequence[Shape]) -> int:
        """The window at each place."""
        return math.prod(self.shape(given)) * math.prod(self.kernel)


class Reduce(Node):
    """Mean, sum or largest number over some axes."""

    layer: Literal["mean", "sum", "max"]
    axes: Axes
    keep: bool = False
    """Such an axis stays, with one number."""

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Without these axes."""
        within(self.axes, given[0])
        if self.layer == "max" and len(self.axes) > 1:
            raise ValueError("takes the largest over one axis; write one node after the other")
        if self.keep:
            return tuple(1 if axis in self.axes else side for axis, side in enumerate(given[0]))
        return tuple(side for axis, side in enumerate(given[0]) if axis not in self.axes)

    def work(self, given: Sequence[Shape]) -> int:
        """Every number once."""
        return math.prod(given[0])


class Flatten(Node):
    """All numbers along one axis."""

    layer: Literal["flatten"]

    def shape(self, given: Sequence[Shape]) -> Shape:
        """One axis."""
        return (math.prod(given[0]),)


class Reshape(Node):
    """Numbers in another shape."""

    layer: Literal["reshape"]
    to: Sizes

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as asked for."""
        if math.prod(self.to) != math.prod(given[0]):
            raise ValueError(f"cannot make {said(self.to)} of {said(given[0])}")
        return self.to


class Permute(Node):
    """Axes in another order."""

    layer: Literal["permute"]
    order: Axes

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Sides in that order."""
        if sorted(self.order) != list(range(len(given[0]))):
            raise ValueError(f"has an order {list(self.order)} for {said(given[0])}; it names each axis once")
        return tuple(given[0][axis] for axis in self.order)


class Concat(Node):
    """Inputs one behind the other along one axis."""

    layer: Literal["concat"]
    axis: Axis = 0
    takes: ClassVar[tuple[int, int]] = (2, MOST_INPUTS)

    def shape(self, given: Sequence[Shape]) -> Shape:
        """The axis is as long as all together."""
        within((self.axis,), given[0])
        rest = {(*each[: self.axis], *each[self.axis + 1 :]) for each in given}
        if len({len(each) for each in given}) > 1 or len(rest) > 1:
            raise ValueError(f"cannot join {', '.join(map(said, given))} along axis {self.axis}")
        return tuple(sum(e[self.axis] for e in given) if a == self.axis else s for a, s in enumerate(given[0]))


class Elementwise(Node):
    """Sum, product or difference of inputs, number by number; a side of 1 stands for any length."""

    layer: Literal["add", "multiply", "subtract"]
    takes: ClassVar[tuple[int, int]] = (2, MOST_INPUTS)

    def shape(self, given: Sequence[Shape]) -> Shape:
        """The longest of each side."""
        if self.layer == "subtract" and len(given) != 2:
            raise ValueError("takes two inputs")
        ranks = {len(each) for each in given}
        longest = tuple(map(max, zip(*given, strict=True))) if len(ranks) == 1 else ()
        if len(ranks) > 1 or any(
            side not in (1, most) for each in given for side, most in zip(each, longest, strict=True)
        ):
            raise ValueError(f"does not fit {', '.join(map(said, given))} together")
        return longest

    def work(self, given: Sequence[Shape]) -> int:
        """Every number of each input."""
        return len(given) * math.prod(self.shape(given))


class MatMul(Node):
    """Product of two matrices of the record's own, as a sum over a graph's neighbours: adjacency times features."""

    layer: Literal["matmul"]
    takes: ClassVar[tuple[int, int]] = (2, 2)

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Rows of the first, columns of the second."""
        first, second = (ranked(each, 2, 4, "matrices") for each in given)
        if first[:-2] != second[:-2] or first[-1] != second[-2]:
            raise ValueError(f"cannot multiply {said(first)} by {said(second)}")
        return (*first[:-1], second[-1])

    def work(self, given: Sequence[Shape]) -> int:
        """Rows times columns times what lies between."""
        return math.prod(self.shape(given)) * given[0][-1]


class Select(Node):
    """One place of an axis, such as the last step of a series; the axis goes."""

    layer: Literal["select"]
    axis: Axis
    at: Place

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Without the axis."""
        within((self.axis,), given[0])
        if self.at >= given[0][self.axis]:
            raise ValueError(f"takes place {self.at} of an axis of {given[0][self.axis]}; the first is 0")
        return (*given[0][: self.axis], *given[0][self.axis + 1 :])


class Slice(Node):
    """Places of an axis from ``start`` up to and without ``stop``, each ``step``-th."""

    layer: Literal["slice"]
    axis: Axis
    start: Place = 0
    stop: Size
    step: Size = 1

    def shape(self, given: Sequence[Shape]) -> Shape:
        """A shorter axis."""
        within((self.axis,), given[0])
        if not self.start < self.stop <= given[0][self.axis]:
            raise ValueError(f"takes places {self.start} to {self.stop} of an axis of {given[0][self.axis]}")
        length = (self.stop - self.start - 1) // self.step + 1
        return (*given[0][: self.axis], length, *given[0][self.axis + 1 :])


class Pad(Node):
    """Zeros before and after an axis."""

    layer: Literal["pad"]
    axis: Axis
    before: Place = 0
    after: Place = 0

    def shape(self, given: Sequence[Shape]) -> Shape:
        """A longer axis."""
        within((self.axis,), given[0])
        length = given[0][self.axis] + self.before + self.after
        return (*given[0][: self.axis], length, *given[0][self.axis + 1 :])


class Upsample(Node):
    """Each place of every dimension (the axes after the first) several times: nearest neighbour."""

    layer: Literal["upsample"]
    factor: Annotated[int, Field(ge=2, le=16)]

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Longer sides."""
        channels, *sides = ranked(given[0], 2, 4, "channels and at least one dimension")
        return channels, *(side * self.factor for side in sides)
