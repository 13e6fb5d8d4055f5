"""Network of a graph: known torch modules, called one after the other. Nothing comes from a graph but numbers.

Modules with weights are torch's own, under the nodes' names, so that per-sample gradients, exports and files of weights
know them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import plain, weighted
from consilium_shared.graphs.graph import Graph
from consilium_shared.graphs.model import GraphModel
from consilium_shared.graphs.node import Node, Shape
from consilium_shared.study import Study


class Network(nn.Module):
    """``nn.Module`` of a graph: inputs ``[B, …]`` in the graph's order of names given, to its output ``[B, …]``."""

    def __init__(self, graph: Graph, names: Sequence[str]) -> None:
        """``names``: of the inputs, in the order in which they come."""
        super().__init__()
        self._names = tuple(names)
        self._nodes = tuple((node.name, node.of) for node in graph.nodes)
        last = {name: number for number, node in enumerate(graph.nodes) for name in node.of}
        self._done = [tuple(name for name, at in last.items() if at == number) for number in range(len(graph.nodes))]
        for each in graph.sized:
            self.add_module(each.node.name, _MAKERS[type(each.node)](each.node, each.given))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Output of the last node."""
        values = dict(zip(self._names, inputs, strict=True))
        for (name, of), done in zip(self._nodes, self._done, strict=True):
            module, given = self._modules[name], [values[each] for each in of]
            assert module is not None  # noqa: S101  (every node has one)
            if isinstance(module, nn.MultiheadAttention):
                found = module(*(given * 3 if len(given) == 1 else given), need_weights=False)
            elif isinstance(module, nn.RMSNorm) and torch.onnx.is_in_onnx_export():
                found = _rms_norm(module, *given)
            else:
                found = module(*given)
            for each in done:
                values.pop(each, None)
            values[name] = found[0] if isinstance(found, tuple) else found
        return values[name]


def _rms_norm(module: nn.RMSNorm, inputs: Tensor) -> Tensor:
    """``module``'s output in operators that ONNX has."""
    axes, eps = [-1 - axis for axis in range(len(module.normalized_shape))], module.eps or 0.0
    found = inputs * torch.rsqrt((inputs * inputs).mean(axes, keepdim=True) + eps)
    return found if module.weight is None else found * module.weight


def of_study(study: Study) -> Network:
    """Network of a study whose model is a graph; its sizes are held against torch's, once for each graph.

    Raises:
        ConfigurationError: torch gives another shape than the graph says; nothing is computed for that.
    """
    assert isinstance(study.model, GraphModel)  # noqa: S101  (the contract's validation made it)
    from consilium_shared import task

    names = task.reads(study).names
    network = Network(study.model.graph, names)
    _check(study.model.graph.model_dump_json(), names)
    return network


@lru_cache(maxsize=16)  # graphs come from outside, as many as somebody proposes
def _check(written: str, names: tuple[str, ...]) -> None:
    check(Graph.model_validate_json(written), names)


def check(graph: Graph, names: Sequence[str]) -> None:
    """Hold every size of a graph against torch's, on its meta device, where no number is computed.

    Raises:
        ConfigurationError: they differ, or torch refuses the graph.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = Network(graph, names)
        try:
            found = tuple(network(*(torch.empty((2, *graph.inputs[name])) for name in names)).shape)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ConfigurationError(f"torch refuses the graph: {' '.join(str(error).split())[:300]}") from error
    if found != (2, *graph.output):
        raise ConfigurationError(f"torch gives {found} where the graph says {(2, *graph.output)}")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if parameters != graph.parameters:
        raise ConfigurationError(f"torch makes {parameters} parameters where the graph says {graph.parameters}")


class Constants(nn.Module):
    """Learned tensor ``[1, …]`` added to every record's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, *shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, …]`` to ``[B, …]``."""
        return inputs + self.weight


class Token(nn.Module):
    """Learned vector ``[1, 1, width]`` before every series."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, T, width]`` to ``[B, 1 + T, width]``."""
        return torch.cat([self.weight.expand(inputs.shape[0], -1, -1), inputs], dim=1)


class Function(nn.Module):
    """A function of records without weights."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Its output ``[B, …]``."""
        return self._function(*inputs)


def _linear(node: weighted.Linear, given: Sequence[Shape]) -> nn.Module:
    return nn.Linear(given[0][-1], node.outputs, node.bias)


def _convolution(node: weighted.Convolution, given: Sequence[Shape]) -> nn.Module:
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[node.dimensions]
    found: nn.Module = kind(
        given[0][0], node.outputs, node.kernel, node.stride, node.padding, node.dilation, node.groups, node.bias
    )
    return found


def _transposed(node: weighted.Transposed, given: Sequence[Shape]) -> nn.Module:
    kind: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[node.dimensions]
    sizes = node.kernel, node.stride, node.padding, node.output_padding
    found: nn.Module = kind(given[0][0], node.outputs, *sizes, node.groups, node.bias, node.dilation)
    return found


def _group_norm(node: weighted.GroupNorm, given: Sequence[Shape]) -> nn.Module:
    return nn.GroupNorm(node.groups, given[0][0], node.eps, node.affine)


def _layer_norm(node: weighted.LayerNorm, given: Sequence[Shape]) -> nn.Module:
    kind = nn.LayerNorm if node.layer == "layer_norm" else nn.RMSNorm
    return kind(list(given[0][-node.axes :]), node.eps, node.affine)


def _prelu(node: weighted.PReLU, given: Sequence[Shape]) -> nn.Module:
    return nn.PReLU(given[0][0] if node.slopes == "channels" else 1, node.start)


def _recurrent(node: weighted.Recurrent, given: Sequence[Shape]) -> nn.Module:
    kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[node.layer]
    between = node.dropout if node.layers > 1 else 0.0
    found: nn.Module = kind(
        given[0][1], node.hidden, node.layers, bias=node.bias, batch_first=True, dropout=between,
        bidirectional=node.bidirectional,
    )  # fmt: skip
    return found


def _attention(node: weighted.Attention, given: Sequence[Shape]) -> nn.Module:
    query, key, value = (given[0],) * 3 if len(given) == 1 else given
    return nn.MultiheadAttention(
        query[1], node.heads, node.dropout, node.bias, kdim=key[1], vdim=value[1], batch_first=True
    )


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "identity": nn.Identity,
}


def _dropout(node: plain.Dropout, given: Sequence[Shape]) -> nn.Module:
    if not node.channels:
        return nn.Dropout(node.rate)
    return {2: nn.Dropout1d, 3: nn.Dropout2d, 4: nn.Dropout3d}[len(given[0])](node.rate)


def _pool(node: plain.Pool, _: Sequence[Shape]) -> nn.Module:
    kinds: dict[str, Any] = {
        f"{name}_pool{number}d": getattr(nn, f"{kind}Pool{number}d")
        for name, kind in (("max", "Max"), ("avg", "Avg"))
        for number in (1, 2, 3)
    }
    found: nn.Module = kinds[node.layer](node.kernel, node.stride, node.padding)
    return found


def _reduce(node: plain.Reduce, _: Sequence[Shape]) -> nn.Module:
    axes = [axis + 1 for axis in node.axes]
    if node.layer == "mean":
        return Function(lambda inputs: inputs.mean(axes, keepdim=node.keep))
    if node.layer == "sum":
        return Function(lambda inputs: inputs.sum(axes, keepdim=node.keep))
    return Function(lambda inputs: inputs.max(axes[0], keepdim=node.keep).values)


def _reshape(node: plain.Reshape, _: Sequence[Shape]) -> nn.Module:
    return Function(lambda inputs: inputs.reshape(inputs.shape[0], *node.to))


def _permute(node: plain.Permute, _: Sequence[Shape]) -> nn.Module:
    return Function(lambda inputs: inputs.permute(0, *(axis + 1 for axis in node.order)))


def _elementwise(node: plain.Elementwise, _: Sequence[Shape]) -> nn.Module:
    def together(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            if node.layer == "add":
                first = first + other
            elif node.layer == "multiply":
                first = first * other
            else:
                first = first - other
        return first

    return Function(together)


def _pad(node: plain.Pad, given: Sequence[Shape]) -> nn.Module:
    after = len(given[0]) - 1 - node.axis
    return Function(lambda inputs: nn.functional.pad(inputs, [0, 0] * after + [node.before, node.after]))


def _slice(node: plain.Slice, _: Sequence[Shape]) -> nn.Module:
    places = (slice(None),) * (node.axis + 1) + (slice(node.start, node.stop, node.step),)
    return Function(lambda inputs: inputs[places])


_MAKERS: dict[type[Node], Callable[[Any, Sequence[Shape]], nn.Module]] = {
    weighted.Linear: _linear,
    weighted.Convolution: _convolution,
    weighted.Transposed: _transposed,
    weighted.GroupNorm: _group_norm,
    weighted.LayerNorm: _layer_norm,
    weighted.PReLU: _prelu,
    weighted.Recurrent: _recurrent,
    weighted.Attention: _attention,
    weighted.Positions: lambda node, given: Constants(*given[0]),
    weighted.ClassToken: lambda node, given: Token(given[0][1]),
    plain.Activation: lambda node, given: _ACTIVATIONS[node.layer](),
    plain.LeakyReLU: lambda node, given: nn.LeakyReLU(node.slope),
    plain.Softmax: lambda node, given: nn.Softmax(node.axis + 1),
    plain.Dropout: _dropout,
    plain.Affine: lambda node, given: Function(lambda inputs: inputs * node.scale + node.shift),
    plain.Pool: _pool,
    plain.Reduce: _reduce,
    plain.Flatten: lambda node, given: nn.Flatten(),
    plain.Reshape: _reshape,
    plain.Permute: _permute,
    plain.Concat: lambda node, given: Function(lambda *inputs: torch.cat(inputs, node.axis + 1)),
    plain.Elementwise: _elementwise,
    plain.MatMul: lambda node, given: Function(torch.matmul),
    plain.Select: lambda node, given: Function(lambda inputs: inputs.select(node.axis + 1, node.at)),
    plain.Slice: _slice,
    plain.Pad: _pad,
    plain.Upsample: lambda node, given: nn.Upsample(scale_factor=float(node.factor), mode="nearest"),
}
"""Maker of the module of each kind of node, of the node and the shapes that it takes."""
