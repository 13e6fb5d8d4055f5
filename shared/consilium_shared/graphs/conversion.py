"""Conversion of a traced module, step by step, into the nodes of a graph; and what a graph has no layer for."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, fx, nn

from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import graph as graphs
from consilium_shared.graphs.graph import FORMAT, Graph
from consilium_shared.graphs.node import RESERVED, Node, Shape, said

Array = npt.NDArray[np.float32]
_ONE_NODE: TypeAdapter[Node] = TypeAdapter(graphs.Layer)


class Refused(Exception):
    """Step that a graph has not; the text says what to use instead."""


class Ref(NamedTuple):
    """A node or an input, and the shape of one record in it."""

    name: str
    shape: Shape


class Batch:
    """Number of records, wherever the module asks for it."""


class Sized(tuple[Any, ...]):
    """Shape as a module sees it: the number of records, then one record's."""


class Conversion:
    """Nodes so far, and which value of the traced module each is."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Shape], batch_norm: str) -> None:
        """``batch_norm``: refuse, group or frozen."""
        self.module, self.batch_norm = module, batch_norm
        self.notes: list[str] = []
        self.changed = ""
        """Name of a last activation that the graph leaves to the loss."""
        self._inputs, self._waiting = dict(inputs), list(inputs)
        self._values: dict[fx.Node, Any] = {}
        self._nodes: list[dict[str, Any]] = []
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._used: set[str] = set()
        self._output: Ref | None = None

    def step(self, node: fx.Node) -> None:
        """Take one step of the traced module; raises Refused."""
        from consilium_shared.graphs import converters

        if node.op == "placeholder":
            if not self._waiting:
                if node.args:  # an argument with a default
                    self._values[node] = node.args[0]
                    return
                raise Refused("forward takes more than the inputs that were given; add --input NAME=SHAPE")
            name = self._waiting.pop(0)
            self._values[node] = Ref(name, self._inputs[name])
        elif node.op == "get_attr":
            self._values[node] = self._attribute(str(node.target))
        elif node.op == "output":
            self._output = self._last(node)
        else:
            args = fx.node.map_arg(node.args, lambda each: self._values[each])
            named = fx.node.map_arg(node.kwargs, lambda each: self._values[each])
            if node.op == "call_module":
                target = str(node.target)
                child = self.module.get_submodule(target)
                if any(True for _ in child.parameters()) and target in self._used:
                    raise Refused("is called twice, and a graph has no shared weights; make two layers of it")
                self._used.add(target)
                self._values[node] = converters.module(self, node, child, args, named)
            else:
                name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
                self._values[node] = converters.function(self, node, str(name), args, named)

    def _attribute(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        value = getattr(self.module.get_submodule(owner), name)
        if isinstance(value, nn.Parameter):
            return value
        raise Refused(
            f"{target} is a constant of the module, and a graph has none; learn it (nn.Parameter), or use affine"
        )

    # -- nodes

    def emit(
        self,
        layer: str,
        of: Ref | Sequence[Ref],
        hint: str,
        weights: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Ref:
        """Add a node; raises Refused where its sizes do not fit."""
        given = [of] if isinstance(of, Ref) else list(of)
        for each in given:
            if not isinstance(each, Ref):
                raise Refused("takes a number or a weight where a graph takes what a layer gave")
        name = self._name(hint)
        content = {"name": name, "layer": layer, "of": [each.name for each in given], **options}
        try:
            node = _ONE_NODE.validate_python(content)
            shape = node.shape([each.shape for each in given])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:])
            raise Refused(f"{layer}: {where} {first['msg']}") from error
        except ValueError as error:
            raise Refused(f"{layer} {error}") from error
        self._nodes.append(content)
        if weights:
            self._weights[name] = dict(weights)
        return Ref(name, shape)

    def made_by(self, ref: Ref) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Node of a value, and its weights; None for an input."""
        found = next((node for node in self._nodes if node["name"] == ref.name), None)
        return None if found is None else (found, self._weights.get(ref.name, {}))

    def alone(self, node: fx.Node) -> bool:
        """Answer to: is this step the only one that takes what it takes?"""
        return all(len(each.users) == 1 for each in node.all_input_nodes)

    def _name(self, hint: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "_", hint.lower()).strip("_")[:50] or "node"
        plain = plain if plain[0].isalpha() else f"n{plain}"
        taken = {*self._inputs, *(node["name"] for node in self._nodes), *RESERVED}
        return next(name for name in (plain, *(f"{plain}_{n}" for n in range(2, 10_000))) if name not in taken)

    # -- the end

    def _last(self, node: fx.Node) -> Ref:
        value = fx.node.map_arg(node.args[0], lambda each: self._values[each])
        if isinstance(value, tuple | list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, Ref):
            raise Refused("gives more than one tensor; a graph has one output")
        made = self.made_by(value)
        if made is None:
            raise Refused("gives what it was given")
        layer, below = made[0]["layer"], made[0]["of"][0]
        if layer == "softmax":
            self._leave_out(made[0], layer, "softmax")
            return Ref(below, value.shape)
        if layer == "sigmoid" and value.shape == (1,):
            self._leave_out(made[0], layer, "sigmoid of one")
            one = Ref(below, value.shape)
            zero = self.emit("affine", one, "zero", scale=0.0)
            return self.emit("concat", [zero, one], "logits")
        if layer == "sigmoid":
            self._leave_out(made[0], layer, "sigmoid")
            return Ref(below, value.shape)
        return value

    def _leave_out(self, node: dict[str, Any], layer: str, changed: str) -> None:
        self._nodes.remove(node)
        self.changed = self.changed or changed
        self.notes.append(f"the last {layer} is left out: the study's loss and counts apply it")

    def finished(self) -> tuple[Graph, dict[str, Array]]:
        """Graph and the weights under its names; raises ConfigurationError where it is beyond the bounds."""
        if self._output is None:
            raise ConfigurationError("the module gives nothing")
        needed = {self._output.name}
        for node in reversed(self._nodes):
            if node["name"] in needed:
                needed.update(node["of"])
        idle = [name for name in self._inputs if name not in needed]
        if idle:
            raise ConfigurationError(f"the module does not use its input {idle[0]}")
        nodes = [node for node in self._nodes if node["name"] in needed]
        head = next((node for node in reversed(nodes) if node["layer"] == "linear"), None)
        if head is not None and all(node["name"] != "head" for node in nodes):
            self._renamed(nodes, head["name"], "head")
        # the output is the last node
        nodes.sort(key=lambda node: node["name"] == self._output.name if self._output else False)
        try:
            graph = Graph.model_validate({"format": FORMAT, "inputs": self._inputs, "nodes": nodes})
        except ValidationError as error:
            raise ConfigurationError(f"the graph: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        kept = {node["name"] for node in nodes}
        return graph, {
            f"{name}.{parameter}": np.ascontiguousarray(value.detach().float().numpy())
            for name, each in self._weights.items()
            if name in kept
            for parameter, value in each.items()
        }

    def _renamed(self, nodes: list[dict[str, Any]], old: str, new: str) -> None:
        for node in nodes:
            node["name"] = new if node["name"] == old else node["name"]
            node["of"] = [new if each == old else each for each in node["of"]]
        if old in self._weights:
            self._weights[new] = self._weights.pop(old)
        if self._output is not None and self._output.name == old:
            self._output = Ref(new, self._output.shape)


def axes_of(dims: Any, shape: Shape) -> list[int]:
    """Axes of one record that a module names with the batch before them; raises Refused for the batch."""
    found = []
    for dim in dims if isinstance(dims, tuple | list) else [dims]:
        axis = dim - 1 if dim >= 0 else dim + len(shape)
        if axis < 0:
            raise Refused("works along the batch, which would mix records; name another dimension")
        found.append(axis)
    return found


def shape_of(sizes: Sequence[Any], numbers: int) -> list[int]:
    """Shape of one record that a module asks for with the batch before it; one −1 is worked out.

    Raises:
        Refused: the batch is not kept.
    """
    first, *rest = sizes
    if not (isinstance(first, Batch) or first == -1):
        raise Refused(f"reshapes the batch away ({first}); begin with x.size(0), or use flatten(1)")
    if any(isinstance(each, Batch) for each in rest):
        raise Refused("puts the batch at another place")
    if -1 in rest:
        if first == -1:
            raise Refused("leaves two sizes open; begin with x.size(0)")
        known = math.prod(each for each in rest if each != -1)
        rest = [numbers // known if each == -1 else each for each in rest]
    if math.prod(rest) != numbers:
        raise Refused(
            f"cannot make {said(tuple(rest))} of {numbers} numbers of a record without taking the batch apart"
        )
    return [int(each) for each in rest]


ARITHMETIC: dict[str, Callable[..., Any]] = {
    name: cast(Callable[..., Any], getattr(operator, name))
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
}
"""Python's arithmetic with numbers of a module's own, such as sizes."""


def plain(values: Sequence[Any]) -> bool:
    """Answer to: are these numbers and texts of the module's own, and no records?"""
    return not any(isinstance(each, Ref | Tensor | Batch | Sized) for each in values)
