"""A model as a bounded list of layers: checked, counted and described without computing anything.

A node takes inputs and nodes that stand before it, so no graph has a circle. The last node is the output. Nothing in a
graph is evaluated: a layer is one of a closed list, with numbers within bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes
from consilium_shared.config import Strict
from consilium_shared.fields import Column
from consilium_shared.graphs import plain, weighted
from consilium_shared.graphs.node import AXES, Node, Shape, Size, said

FORMAT = 1
"""Newest format of a graph; another list of layers is another format."""

Layer = Annotated[
    weighted.Linear
    | weighted.Convolution
    | weighted.Transposed
    | weighted.GroupNorm
    | weighted.LayerNorm
    | weighted.PReLU
    | weighted.Recurrent
    | weighted.Attention
    | weighted.Positions
    | weighted.ClassToken
    | plain.Activation
    | plain.LeakyReLU
    | plain.Softmax
    | plain.Dropout
    | plain.Affine
    | plain.Pool
    | plain.Reduce
    | plain.Flatten
    | plain.Reshape
    | plain.Permute
    | plain.Concat
    | plain.Elementwise
    | plain.MatMul
    | plain.Select
    | plain.Slice
    | plain.Pad
    | plain.Upsample,
    Field(discriminator="layer"),
]
"""Every layer that a graph may have."""


class Sized(NamedTuple):
    """Sizes of one node within its graph.

    Attributes:
        node: the node.
        given: shapes that it takes.
        shape: shape that comes out.
        parameters: number of its weights.
        numbers: of one record, that are kept.
    """

    node: Node
    given: tuple[Shape, ...]
    shape: Shape
    parameters: int
    numbers: int


class Graph(Strict):
    """Layers with their wiring, and the inputs for which they were made.

    >>> graph = Graph.model_validate({
    ...     "format": 1,
    ...     "inputs": {"record": [10]},
    ...     "nodes": [
    ...         {"name": "hidden", "layer": "linear", "of": "record", "outputs": 4},
    ...         {"name": "bent", "layer": "relu", "of": "hidden"},
    ...         {"name": "head", "layer": "linear", "of": "bent", "outputs": 2},
    ...     ],
    ... })
    >>> graph.output, graph.parameters
    ((2,), 54)
    """

    format: Annotated[int, Field(ge=1)]
    inputs: Annotated[
        dict[Column, Annotated[tuple[Size, ...], Field(min_length=1, max_length=AXES)]],
        Field(min_length=1, max_length=16),
    ]
    """Shape of one record in each input of the task, by its name; without the batch."""
    nodes: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=limits.GRAPH_NODES)]

    @model_validator(mode="after")
    def _known(self) -> Graph:
        if self.format > FORMAT:
            raise ValueError(f"a graph of format {self.format}; its reader knows {FORMAT}: upgrade its Consilium")
        if len(canonical_bytes(self.model_dump(mode="json"))) > limits.GRAPH_BYTES:
            raise ValueError(f"a graph of more than {limits.GRAPH_BYTES} bytes")
        return self

    @model_validator(mode="after")
    def _wired(self) -> Graph:
        known, used = set(self.inputs), set[str]()
        for node in self.nodes:
            for name in node.of:
                if name not in known:
                    raise ValueError(f"node {node.name} takes {name}, and neither an input nor a node before it is so")
            if node.name in known:
                raise ValueError(f"two nodes or inputs have the name {node.name}")
            least, most = node.takes
            if not least <= len(node.of) <= most:
                wanted = str(least) if least == most else f"{least} to {most}"
                raise ValueError(f"node {node.name} ({_layer(node)}) takes {wanted} inputs, and has {len(node.of)}")
            known.add(node.name)
            used.update(node.of)
        idle = sorted(known - used - {self.nodes[-1].name})
        if idle:
            raise ValueError(f"{idle[0]} leads to nothing; the output is the last node, {self.nodes[-1].name}")
        return self

    @model_validator(mode="after")
    def _bounded(self) -> Graph:
        parameters = numbers = work = 0
        for each in self._walk():
            parameters += each.parameters
            numbers += each.numbers
            for found, most, what in (
                (parameters, limits.GRAPH_PARAMETERS, "parameters"),
                (numbers, limits.GRAPH_NUMBERS, "intermediate numbers of a record"),
            ):
                if found > most:
                    raise ValueError(f"node {each.node.name} brings the graph to more than {most} {what}")
            work += each.node.work(each.given)
            if work > limits.GRAPH_WORK:
                raise ValueError(f"node {each.node.name} brings a record to more than {limits.GRAPH_WORK} products")
        return self

    def _walk(self) -> Iterator[Sized]:
        shapes: dict[str, Shape] = dict(self.inputs)
        for node in self.nodes:
            given = tuple(shapes[name] for name in node.of)
            try:
                shape = node.shape(given)
            except ValueError as error:
                raise ValueError(f"node {node.name} ({_layer(node)}) {error}") from error
            if len(shape) > AXES:
                raise ValueError(f"node {node.name} ({_layer(node)}) gives more than {AXES} axes")
            shapes[node.name] = shape
            yield Sized(node, given, shape, node.parameters(given), node.numbers(given))

    @cached_property
    def sized(self) -> tuple[Sized, ...]:
        """Every node with its sizes, in order."""
        return tuple(self._walk())

    @property
    def output(self) -> Shape:
        """Shape of one record's output."""
        return self.sized[-1].shape

    @property
    def parameters(self) -> int:
        """Number of weights of all nodes."""
        return sum(each.parameters for each in self.sized)

    @property
    def numbers(self) -> int:
        """Numbers of one record that the nodes keep, together."""
        return sum(each.numbers for each in self.sized)

    def step_bytes(self, rows: int) -> int:
        """Bytes that a private step in pieces of so many records takes at the least: what the layers give and its
        gradient in float32, and of each weight itself, its sum and its noise in float64."""
        return 8 * rows * self.numbers + 28 * self.parameters

    def described(self) -> Iterator[tuple[str, str, str, int]]:
        """Rows for people: name, layer with the options that are not the usual ones and what it takes, shape that comes
        out, parameters."""
        for each in self.sized:
            told = ", ".join(f"{key} {_value(value)}" for key, value in _options(each.node).items())
            layer = _layer(each.node) + (f" ({told})" if told else "")
            yield each.node.name, f"{layer} of {', '.join(each.node.of)}", said(each.shape), each.parameters

    def text(self) -> str:
        """YAML for people: a line for each node, without the options that are the usual ones."""
        lines = [f"format: {self.format}", "inputs:"]
        lines += [f"  {json.dumps(name)}: {list(shape)}" for name, shape in self.inputs.items()]
        lines.append("nodes:")
        for node in self.nodes:
            of = node.of[0] if len(node.of) == 1 else f"[{', '.join(node.of)}]"
            told = (f", {key}: {json.dumps(_one(key, value))}" for key, value in _options(node).items())
            options = "".join(told)
            lines.append(f"  - {{name: {node.name}, layer: {_layer(node)}, of: {of}{options}}}")
        return "\n".join(lines) + "\n"


_WINDOW = ("kernel", "stride", "padding", "dilation", "output_padding")
_USUAL = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def _options(node: Node) -> dict[str, object]:
    """Options that are not the usual ones."""
    return {
        key: value
        for key, value in node.model_dump(mode="json", exclude={"name", "of", "layer"}).items()
        if value != type(node).model_fields[key].default and set(_list(value)) != {_USUAL.get(key)}
    }


def _one(key: str, value: object) -> object:
    """One number for equal ones of all dimensions."""
    same = key in _WINDOW and isinstance(value, list) and len(set(value)) == 1
    return value[0] if same and isinstance(value, list) else value


def _layer(node: Node) -> str:
    return str(getattr(node, "layer", ""))


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _value(value: object) -> str:
    each = list(map(str, _list(value)))
    return (each[0] if len(set(each)) == 1 else "×".join(each)).lower()
