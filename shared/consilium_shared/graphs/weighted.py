"""Layers with weights, by name: options, sizes that come out, number of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from consilium_shared.graphs.node import LONGEST, Epsilon, Node, Rate, Shape, Sizes, Width, listed, ranked

Stack = Annotated[int, Field(ge=1, le=8)]
Amounts = Annotated[
    tuple[Annotated[int, Field(ge=0, le=LONGEST)], ...],
    BeforeValidator(listed),
    Field(min_length=1, max_length=3),
]


class Linear(Node):
    """Linear layer of the last axis."""

    layer: Literal["linear"]
    outputs: Width
    bias: bool = True

    def shape(self, given: Sequence[Shape]) -> Shape:
        """The last axis becomes ``outputs``."""
        return (*ranked(given[0], 1, 5, "at least one axis")[:-1], self.outputs)

    def parameters(self, given: Sequence[Shape]) -> int:
        """A matrix, and a bias."""
        return self.outputs * (given[0][-1] + self.bias)

    def work(self, given: Sequence[Shape]) -> int:
        """One multiplication for each weight and place."""
        return math.prod(given[0]) * self.outputs


class Windowed(Node):
    """Layer that moves a window over one to three dimensions, as the last letters of its name say.

    One number stands for all dimensions.
    """

    layer: str
    kernel: Sizes

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        """Write a single number out for each dimension; what is left out, too."""
        name = value.get("layer") if isinstance(value, dict) else None
        if not isinstance(name, str) or name[-2:] not in ("1d", "2d", "3d"):
            return value
        dimensions, found = int(name[-2]), dict(value)
        fresh = {"stride": found.get("kernel") if "pool" in name else 1, "padding": 0, "dilation": 1}
        fresh["output_padding"] = 0
        for key in ("kernel", *fresh):
            if key not in cls.model_fields:
                continue
            number = found.get(key, fresh.get(key))
            if isinstance(number, int) and not isinstance(number, bool):
                number = [number] * dimensions
            if number is not None:
                found[key] = number
        return found

    @model_validator(mode="after")
    def _of_its_dimensions(self) -> Windowed:
        for key in ("kernel", "stride", "padding", "dilation", "output_padding"):
            if key in type(self).model_fields and len(getattr(self, key)) != self.dimensions:
                raise ValueError(f"{key} of {self.layer} is one number, or {self.dimensions}")
        return self

    @property
    def dimensions(self) -> int:
        """Number of dimensions that the window moves over."""
        return int(self.layer[-2])

    def planes(self, given: Sequence[Shape]) -> Shape:
        """Shape that is taken: channels and dimensions."""
        most = self.dimensions + 1
        return ranked(given[0], most, most, f"channels and {self.dimensions} dimension{'s' * (most > 2)}")

    def moved(self, sides: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Shape:
        """Sides after the window; raises ValueError where it is larger than what it moves over."""
        found = []
        for side, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True):
            room = side + 2 * p - d * (k - 1) - 1
            if room < 0:
                raise ValueError(f"has a window of {d * (k - 1) + 1} on a side of {side + 2 * p}")
            found.append(room // s + 1)
        return tuple(found)


class Convolution(Windowed):
    """Convolution of channels and one to three dimensions; padding is with zeros."""

    layer: Literal["conv1d", "conv2d", "conv3d"]
    outputs: Width
    stride: Sizes
    padding: Amounts
    dilation: Sizes
    groups: Width = 1
    bias: bool = True

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Channels and sides."""
        channels, *sides = self.planes(given)
        _grouped(self.groups, channels, self.outputs)
        return self.outputs, *self.moved(tuple(sides), self.kernel, self.stride, self.padding, self.dilation)

    def parameters(self, given: Sequence[Shape]) -> int:
        """A kernel for each output, over its group's channels."""
        return self.outputs * (given[0][0] // self.groups * math.prod(self.kernel) + self.bias)

    def work(self, given: Sequence[Shape]) -> int:
        """The kernel at each place."""
        return math.prod(self.shape(given)) * (given[0][0] // self.groups) * math.prod(self.kernel)


class Transposed(Windowed):
    """Transposed convolution of channels and one to three dimensions."""

    layer: Literal["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
    outputs: Width
    stride: Sizes
    padding: Amounts
    output_padding: Amounts
    dilation: Sizes
    groups: Width = 1
    bias: bool = True

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Channels and sides."""
        channels, *sides = self.planes(given)
        _grouped(self.groups, channels, self.outputs)
        found = []
        numbers = zip(
            sides, self.kernel, self.stride, self.padding, self.output_padding, self.dilation, strict=True
        )  # fmt: skip
        for side, k, s, p, more, d in numbers:
            if more >= s:
                raise ValueError("has an output_padding of its stride or more")
            out = (side - 1) * s - 2 * p + d * (k - 1) + more + 1
            if out < 1:
                raise ValueError(f"leaves nothing of a side of {side}")
            found.append(out)
        return self.outputs, *found

    def parameters(self, given: Sequence[Shape]) -> int:
        """A kernel for each input, over its group's outputs."""
        return given[0][0] * (self.outputs // self.groups) * math.prod(self.kernel) + self.outputs * self.bias

    def work(self, given: Sequence[Shape]) -> int:
        """The kernel at each place of the input."""
        return math.prod(given[0]) * (self.outputs // self.groups) * math.prod(self.kernel)


def _grouped(groups: int, channels: int, outputs: int) -> None:
    if channels % groups or outputs % groups:
        raise ValueError(f"has {groups} groups, which do not divide {channels} channels and {outputs} outputs")


class GroupNorm(Node):
    """Normalisation over groups of one record's channels (Wu & He 2018); as many groups as channels: instance norm."""

    layer: Literal["group_norm"]
    groups: Width
    affine: bool = True
    eps: Epsilon = 1e-5

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        shape = ranked(given[0], 2, 4, "channels and at least one dimension")
        if shape[0] % self.groups:
            raise ValueError(f"has {self.groups} groups, which do not divide {shape[0]} channels")
        if math.prod(shape) // self.groups < 2:
            raise ValueError("has groups of one number, of which nothing is left")
        return shape

    def parameters(self, given: Sequence[Shape]) -> int:
        """A scale and a shift for each channel."""
        return 2 * given[0][0] * self.affine


class LayerNorm(Node):
    """Normalisation over a record's last axes (``layer_norm``), or of their length alone (``rms_norm``)."""

    layer: Literal["layer_norm", "rms_norm"]
    axes: Annotated[int, Field(ge=1, le=4)] = 1
    affine: bool = True
    eps: Epsilon = 1e-5

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return ranked(given[0], self.axes, 5, f"at least {self.axes} axes")

    def parameters(self, given: Sequence[Shape]) -> int:
        """A scale, and of a layer norm a shift, for each number of these axes."""
        return (2 if self.layer == "layer_norm" else 1) * math.prod(given[0][-self.axes :]) * self.affine


class PReLU(Node):
    """Rectifier with a learned slope: one, or one for each channel (the first axis)."""

    layer: Literal["prelu"]
    slopes: Literal["one", "channels"] = "one"
    start: Annotated[float, Field(ge=-1, le=1)] = 0.25

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return ranked(given[0], 1, 5, "at least one axis")

    def parameters(self, given: Sequence[Shape]) -> int:
        """The slopes."""
        return given[0][0] if self.slopes == "channels" else 1


class Recurrent(Node):
    """Recurrent layers over a series ``T × width``: the states of the last layer at each step."""

    layer: Literal["lstm", "gru", "rnn"]
    hidden: Annotated[int, Field(ge=1, le=4096)]
    layers: Stack = 1
    bidirectional: bool = False
    bias: bool = True
    dropout: Rate = 0.0
    """Rate between one layer and the next."""

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Steps and states."""
        steps, _ = ranked(given[0], 2, 2, "steps and a width")
        return steps, self.hidden * (1 + self.bidirectional)

    def parameters(self, given: Sequence[Shape]) -> int:
        """Two matrices and two biases for each layer, direction and gate."""
        gates, directions = {"lstm": 4, "gru": 3, "rnn": 1}[self.layer], 1 + self.bidirectional
        widths = [given[0][1]] + [self.hidden * directions] * (self.layers - 1)
        return sum(directions * gates * self.hidden * (width + self.hidden + 2 * self.bias) for width in widths)

    def numbers(self, given: Sequence[Shape]) -> int:
        """States and gates of each layer."""
        return given[0][0] * self.layers * (1 + self.bidirectional) * self.hidden * 5

    def work(self, given: Sequence[Shape]) -> int:
        """Every weight at each step."""
        return given[0][0] * self.parameters(given)


class Attention(Node):
    """Multi-head attention of a series to itself; with three inputs, of queries to keys and values."""

    layer: Literal["attention"]
    heads: Annotated[int, Field(ge=1, le=256)]
    bias: bool = True
    dropout: Rate = 0.0
    takes: ClassVar[tuple[int, int]] = (1, 3)

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape of the queries."""
        if len(given) == 2:
            raise ValueError("takes one series, or queries, keys and values")
        for each in given:
            ranked(each, 2, 2, "steps and a width")
        query, key, value = (given[0],) * 3 if len(given) == 1 else given
        if query[1] % self.heads:
            raise ValueError(f"has {self.heads} heads, which do not divide a width of {query[1]}")
        if key[0] != value[0]:
            raise ValueError(f"has keys of {key[0]} steps and values of {value[0]}")
        return query

    def parameters(self, given: Sequence[Shape]) -> int:
        """Three projections to the queries' width, and one of what comes out."""
        query, key, value = (given[0],) * 3 if len(given) == 1 else given
        return query[1] * (2 * query[1] + key[1] + value[1] + 4 * self.bias)

    def numbers(self, given: Sequence[Shape]) -> int:
        """Projections, scores and what comes out."""
        query, key, _ = (given[0],) * 3 if len(given) == 1 else given
        return 3 * math.prod(query) + 2 * key[0] * query[1] + self.heads * query[0] * key[0]

    def work(self, given: Sequence[Shape]) -> int:
        """Projections, scores and their products with the values."""
        query, key, value = (given[0],) * 3 if len(given) == 1 else given
        width = query[1]
        projected = width * (2 * query[0] * width + key[0] * key[1] + value[0] * value[1])
        return projected + 2 * query[0] * key[0] * width


class Positions(Node):
    """Learned tensor of a record's shape, added to every record."""

    layer: Literal["positions"]

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape as given."""
        return ranked(given[0], 1, 4, "at least one axis")

    def parameters(self, given: Sequence[Shape]) -> int:
        """One for each of a record's numbers."""
        return math.prod(given[0])


class ClassToken(Node):
    """Learned vector that is put before every series."""

    layer: Literal["class_token"]

    def shape(self, given: Sequence[Shape]) -> Shape:
        """One step more."""
        steps, width = ranked(given[0], 2, 2, "steps and a width")
        return steps + 1, width

    def parameters(self, given: Sequence[Shape]) -> int:
        """A vector."""
        return given[0][1]
