"""Small graphs: one of each layer, and studies whose model is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium_shared import study_file, task
from consilium_shared.graphs.graph import Graph
from consilium_shared.study import Study

IMAGE, SERIES, ROW = [4, 6, 8], [7, 6], [12]

LAYERS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "linear": [(ROW, {"outputs": 3}), (SERIES, {"outputs": 3, "bias": False})],
    "conv1d": [([3, 11], {"outputs": 4, "kernel": 3, "stride": 2, "padding": 1})],
    "conv2d": [
        (IMAGE, {"outputs": 6, "kernel": [3, 5], "padding": [1, 2], "groups": 2}),
        (IMAGE, {"outputs": 4, "kernel": 2, "dilation": 2, "stride": [2, 1], "bias": False}),
    ],
    "conv3d": [([2, 4, 5, 6], {"outputs": 3, "kernel": 3, "padding": 1})],
    "conv_transpose1d": [([3, 5], {"outputs": 4, "kernel": 3, "stride": 2, "output_padding": 1})],
    "conv_transpose2d": [([4, 3, 5], {"outputs": 6, "kernel": [2, 3], "stride": 2, "padding": [0, 1], "groups": 2})],
    "conv_transpose3d": [([2, 2, 3, 2], {"outputs": 3, "kernel": 2, "stride": 2, "dilation": 2, "bias": False})],
    "group_norm": [(IMAGE, {"groups": 2}), ([4, 5], {"groups": 4, "affine": False})],
    "layer_norm": [(SERIES, {}), (IMAGE, {"axes": 2})],
    "rms_norm": [(SERIES, {"axes": 2})],
    "prelu": [(IMAGE, {"slopes": "channels"}), (ROW, {})],
    "lstm": [(SERIES, {"hidden": 3, "layers": 2, "bidirectional": True}), (SERIES, {"hidden": 4, "bias": False})],
    "gru": [(SERIES, {"hidden": 3, "layers": 2, "dropout": 0.25})],
    "rnn": [(SERIES, {"hidden": 5})],
    "attention": [(SERIES, {"heads": 2}), ([[5, 4], [7, 6], [7, 3]], {"heads": 2, "bias": False})],
    "positions": [(SERIES, {})],
    "class_token": [(SERIES, {})],
    **{
        name: [(ROW, {})]
        for name in (
            *("relu", "relu6", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "hardswish", "hardsigmoid"),
            *("identity", "leaky_relu"),
        )
    },
    "softmax": [(IMAGE, {"axis": 1})],
    "dropout": [(ROW, {"rate": 0.25}), (IMAGE, {"rate": 0.25, "channels": True})],
    "affine": [(ROW, {"scale": -2.0, "shift": 0.5})],
    "max_pool1d": [([3, 9], {"kernel": 3, "stride": 2, "padding": 1})],
    "max_pool2d": [(IMAGE, {"kernel": 2})],
    "max_pool3d": [([2, 4, 4, 5], {"kernel": 2})],
    "avg_pool1d": [([3, 9], {"kernel": 3, "stride": 2})],
    "avg_pool2d": [(IMAGE, {"kernel": [2, 3], "padding": [1, 0]})],
    "avg_pool3d": [([2, 4, 4, 5], {"kernel": 2})],
    "mean": [(IMAGE, {"axes": [1, 2]}), (IMAGE, {"axes": 0, "keep": True})],
    "sum": [(IMAGE, {"axes": [2]})],
    "max": [(SERIES, {"axes": 0})],
    "flatten": [(IMAGE, {})],
    "reshape": [(ROW, {"to": [3, 4]})],
    "permute": [(IMAGE, {"order": [2, 0, 1]})],
    "concat": [([[4, 6], [4, 6], [2, 6]], {}), ([[4, 6], [4, 1]], {"axis": 1})],
    "add": [([[4, 6], [4, 1]], {})],
    "multiply": [([[4, 1, 1], [4, 5, 6], [1, 5, 1]], {})],
    "subtract": [([[4, 6], [4, 6]], {})],
    "matmul": [([[5, 5], [5, 3]], {}), ([[2, 5, 4], [2, 4, 3]], {})],
    "select": [(SERIES, {"axis": 0, "at": 6})],
    "slice": [(IMAGE, {"axis": 2, "start": 1, "stop": 8, "step": 3})],
    "pad": [(IMAGE, {"axis": 1, "before": 1, "after": 2})],
    "upsample": [(IMAGE, {"factor": 2}), ([2, 3], {"factor": 3}), ([2, 2, 3, 2], {"factor": 2})],
}
"""Layer to shapes (or lists of them, for several inputs) and options."""


def one(layer: str, shapes: Any, options: Mapping[str, Any], outputs: int = 2) -> dict[str, Any]:
    """A graph with this layer between linear ones, so that its gradient has something above and below."""
    shapes = shapes if isinstance(shapes[0], list) else [shapes]
    inputs = {f"x{number}": shape for number, shape in enumerate(shapes)}
    below = [
        {"name": f"below{n}", "layer": "linear", "of": name, "outputs": shape[-1]}
        for n, (name, shape) in enumerate(inputs.items())
    ]
    tested = {"name": "tested", "layer": layer, "of": [each["name"] for each in below], **options}
    flat = {"name": "flat", "layer": "flatten", "of": "tested"}
    head = {"name": "head", "layer": "linear", "of": "flat", "outputs": outputs}
    return {"format": 1, "inputs": inputs, "nodes": [*below, tested, flat, head]}


ALL = [
    (f"{layer} {number}", one(layer, shapes, options))
    for layer, each in LAYERS.items()
    for number, (shapes, options) in enumerate(each)
]
"""Name and graph of each."""


def for_task(name: str) -> Study:
    """A task's sample study with a graph as its model: all inputs flat, a hidden layer, dropout."""
    own = task.get(name)
    sample = study_file.read(own.sample)
    inputs = dict(zip(own.reads(sample).names, map(list, own.shapes(sample)), strict=True))
    flat = [{"name": f"flat{n}", "layer": "flatten", "of": each} for n, each in enumerate(inputs)]
    joined = [{"name": "joined", "layer": "concat", "of": [e["name"] for e in flat]}] if len(flat) > 1 else []
    nodes = [
        *flat,
        *joined,
        {"name": "hidden", "layer": "linear", "of": "joined" if joined else "flat0", "outputs": 8},
        {"name": "bent", "layer": "relu", "of": "hidden"},
        {"name": "dropped", "layer": "dropout", "of": "bent", "rate": 0.25},
        {"name": "head", "layer": "linear", "of": "dropped", "outputs": own.output_shape(sample)[0]},
    ]
    graph = {"format": 1, "inputs": inputs, "nodes": nodes}
    return Study.model_validate({**sample.contract, "model": {"name": "graph", "graph": graph}})


def parsed(graph: Mapping[str, Any]) -> Graph:
    """The graph, as its file is read."""
    return Graph.model_validate(graph)
