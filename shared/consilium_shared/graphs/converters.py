"""Converters: which node stands for which torch module or function, and what to use in place of one that has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from consilium_shared.graphs.conversion import (
    ARITHMETIC,
    Conversion,
    Ref,
    Refused,
    axes_of,
    plain,
)

Made = Callable[[Conversion, Any, Sequence[Any], str], Any]

ACTIVATIONS = (
    *("relu", "relu6", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "hardswish", "hardsigmoid"),
    "identity",
)

INSTEAD = {
    "Embedding": "no task gives whole numbers yet; take columns of categories",
    "EmbeddingBag": "no task gives whole numbers yet; take columns of categories",
    "TransformerEncoderLayer": "write it as nn.MultiheadAttention, nn.LayerNorm and nn.Linear",
    "TransformerEncoder": "write it as nn.MultiheadAttention, nn.LayerNorm and nn.Linear",
    "LSTMCell": "use nn.LSTM",
    "GRUCell": "use nn.GRU",
    "RNNCell": "use nn.RNN",
    "LocalResponseNorm": "use nn.GroupNorm",
    "SyncBatchNorm": "use nn.GroupNorm",
    "Bilinear": "use nn.Linear of both, concatenated",
    "AlphaDropout": "use nn.Dropout",
    "SELU": "use nn.ELU",
    "CELU": "use nn.ELU",
    "Mish": "use nn.SiLU",
    "LogSoftmax": "leave it out at the end: the loss applies it",
}


def module(to: Conversion, node: fx.Node, child: nn.Module, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """Value of calling a module; raises Refused."""
    name, hint = type(child).__name__, str(node.target)
    if isinstance(child, nn.modules.batchnorm._BatchNorm):
        return _batch_norm(to, node, child, args[0], hint)
    if isinstance(child, nn.MultiheadAttention):
        return _attention(to, child, args, named, hint)
    for kind, made in _MODULES.items():
        if type(child) is kind:
            if not isinstance(args[0], Ref):
                raise Refused("takes a weight or a number where a graph takes what a layer gave")
            return made(to, child, args, hint)
    raise Refused(f"a graph has no {name}; {INSTEAD.get(name, 'use layers of docs/graphs.md')}")


def _weights(child: nn.Module) -> dict[str, Tensor]:
    return dict(child.named_parameters())


def _linear(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    return to.emit("linear", args[0], hint, _weights(child), outputs=child.out_features, bias=child.bias is not None)


def _convolution(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    if child.padding_mode != "zeros":
        raise Refused(f"pads by {child.padding_mode}; use zeros")
    options = {
        "outputs": child.out_channels,
        "kernel": list(child.kernel_size),
        "stride": list(child.stride),
        "dilation": list(child.dilation),
        "groups": child.groups,
        "bias": child.bias is not None,
    }
    dimensions = len(child.kernel_size)
    if child.transposed:
        options["output_padding"] = list(child.output_padding)
    options["padding"] = _padding(child) if isinstance(child.padding, str) else list(child.padding)
    layer = f"conv_transpose{dimensions}d" if child.transposed else f"conv{dimensions}d"
    return to.emit(layer, args[0], hint, _weights(child), **options)


def _padding(child: Any) -> list[int]:
    if child.padding == "valid":
        return [0] * len(child.kernel_size)
    both = [d * (k - 1) for k, d in zip(child.kernel_size, child.dilation, strict=True)]
    if any(each % 2 for each in both):
        raise Refused("pads more on one side (padding='same' of an even kernel); use an odd kernel")
    return [each // 2 for each in both]


def _group_norm(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    return to.emit(
        "group_norm", args[0], hint, _weights(child), groups=child.num_groups, affine=child.affine, eps=child.eps
    )


def _instance_norm(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    if child.track_running_stats:
        raise Refused("keeps statistics over records; leave track_running_stats out")
    options = {"groups": child.num_features, "affine": child.affine, "eps": child.eps}
    return to.emit("group_norm", args[0], hint, _weights(child), **options)


def _layer_norm(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    layer = "layer_norm" if isinstance(child, nn.LayerNorm) else "rms_norm"
    if layer == "layer_norm" and child.elementwise_affine and child.bias is None:
        raise Refused("has no bias; leave bias=False out")
    eps = torch.finfo(torch.float32).eps if child.eps is None else child.eps
    axes = len(child.normalized_shape)
    return to.emit(layer, args[0], hint, _weights(child), axes=axes, affine=child.elementwise_affine, eps=eps)


def _prelu(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    slopes = "channels" if child.num_parameters > 1 else "one"
    return to.emit("prelu", args[0], hint, _weights(child), slopes=slopes)


def _recurrent(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Any:
    if len(args) > 1:
        raise Refused("is given a first state; leave it out")
    if not child.batch_first or getattr(child, "proj_size", False):
        raise Refused("takes the steps first, or projects its states; use batch_first=True and no proj_size")
    if getattr(child, "nonlinearity", "tanh") != "tanh":
        raise Refused("has another nonlinearity; use tanh")
    states = to.emit(
        type(child).__name__.lower(), args[0], hint, _weights(child), hidden=child.hidden_size,
        layers=child.num_layers, bidirectional=child.bidirectional, bias=child.bias,
        dropout=child.dropout if child.num_layers > 1 else 0.0,
    )  # fmt: skip
    last = LastStates(to, states, hint) if not child.bidirectional else None
    return (states, (last, None) if isinstance(child, nn.LSTM) else last)


class LastStates:
    """Last state of each layer, of which a graph has that of the last one."""

    def __init__(self, to: Conversion, states: Ref, hint: str) -> None:
        self.of_last: Callable[[], Ref] = lambda: to.emit(
            "select", states, f"{hint}_last", axis=0, at=states.shape[0] - 1
        )


def _attention(to: Conversion, child: Any, args: Sequence[Any], named: dict[str, Any], hint: str) -> Any:
    given = [*args, *(named[key] for key in ("query", "key", "value") if key in named)][:3]
    if not child.batch_first:
        raise Refused("takes the steps first; use batch_first=True")
    if len(args) > 3 or any(named.get(key) is not None for key in ("key_padding_mask", "attn_mask")):
        raise Refused("is given a mask, and a graph has none")
    if child.bias_k is not None or child.add_zero_attn:
        raise Refused("attends to constants; leave out add_bias_kv and add_zero_attn")
    alone = given[0] == given[1] == given[2]
    options = {"heads": child.num_heads, "bias": child.in_proj_bias is not None, "dropout": child.dropout}
    return to.emit("attention", given[:1] if alone else given, hint, _weights(child), **options), None


def _batch_norm(to: Conversion, node: fx.Node, child: Any, given: Any, hint: str) -> Ref:
    if to.batch_norm == "group":
        groups = max(g for g in range(1, 33) if child.num_features % g == 0)
        to.notes.append(f"{hint}: a group norm of {groups} groups in place of the batch norm; train it anew")
        if len(given.shape) == 1:
            return to.emit("layer_norm", given, hint, None, eps=child.eps)
        return to.emit("group_norm", given, hint, None, groups=groups, eps=child.eps)
    if to.batch_norm != "frozen":
        raise Refused(
            "a batch norm mixes records. Use nn.GroupNorm; or --batch-norm group, which puts one in its place; or, "
            "with weights that were trained elsewhere, --batch-norm frozen, which folds in its statistics"
        )
    if child.running_mean is None:
        raise Refused("has no statistics; use nn.GroupNorm")
    scale = torch.rsqrt(child.running_var.double() + child.eps)
    scale = scale if child.weight is None else scale * child.weight.detach().double()
    shift = -child.running_mean.double() * scale
    shift = shift if child.bias is None else shift + child.bias.detach().double()
    made = to.made_by(given)
    if made is not None and to.alone(node) and made[0]["layer"] in ("linear", "conv1d", "conv2d", "conv3d"):
        content, weights = made
        kernel, bias = weights["weight"].detach().double(), weights.get("bias")
        weights["weight"] = (kernel * scale.view(-1, *[1] * (kernel.dim() - 1))).float()
        weights["bias"] = (shift if bias is None else bias.detach().double() * scale + shift).float()
        content["bias"] = True
        to.notes.append(f"{hint}: folded into {content['name']}")
        return Ref(given.name, given.shape)
    sides = max(1, len(given.shape) - 1)
    values = {"weight": scale.float().view(-1, 1, *[1] * sides), "bias": shift.float()}
    to.notes.append(f"{hint}: became a scale and a shift for each channel")
    flat = len(given.shape) == 1
    below = to.emit("reshape", given, f"{hint}_in", to=[given.shape[0], 1]) if flat else given
    channels = given.shape[0]
    found = to.emit(f"conv{sides}d", below, hint, values, outputs=channels, kernel=1, groups=channels)
    return to.emit("flatten", found, f"{hint}_out") if flat else found


def _activation(layer: str, **usual: Any) -> Made:
    def made(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
        for key, value in usual.items():
            if getattr(child, key) != value:
                raise Refused(f"has {key} {getattr(child, key)}; use {value}")
        return to.emit(layer, args[0], hint)

    return made


def _pool(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    name = type(child).__name__
    layer = f"{name[:3].lower()}_pool{name[-2:]}"
    stride = child.stride if child.stride is not None else child.kernel_size
    return pool(
        to, layer, args[0], hint, child.kernel_size, stride, child.padding, ceil=child.ceil_mode,
        dilation=getattr(child, "dilation", 1), counted=getattr(child, "count_include_pad", True),
    )  # fmt: skip


def pool(
    to: Conversion, layer: str, given: Any, hint: str, kernel: Any, stride: Any = None, padding: Any = 0, *,
    ceil: bool = False, dilation: Any = 1, counted: bool = True,
) -> Ref:  # fmt: skip
    """Pooling; raises Refused for what a graph's has not."""
    if ceil or not (counted or set(_all(padding)) == {0}) or set(_all(dilation)) != {1}:
        raise Refused("pools with ceil_mode, a dilation or padding that does not count; leave these out")
    sizes = {"kernel": kernel, "stride": stride or kernel, "padding": padding}
    return to.emit(layer, given, hint, None, **{key: _written(value) for key, value in sizes.items()})


def _all(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _adaptive(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    name = type(child).__name__
    return adaptive(to, "max" if "Max" in name else "avg", args[0], hint, child.output_size)


def adaptive(to: Conversion, what: str, given: Ref, hint: str, sizes: Any) -> Ref:
    """Pooling to a size that divides what is there; raises Refused for another."""
    sides = given.shape[1:]
    wanted = tuple(sizes) if isinstance(sizes, tuple | list) else (sizes,) * len(sides)
    wanted = tuple(side if each is None else each for side, each in zip(sides, wanted, strict=True))
    if any(side % each for side, each in zip(sides, wanted, strict=True)):
        raise Refused(f"pools {sides} to {wanted}, which does not divide it; use a pooling with a window")
    if what == "avg" and set(wanted) == {1}:
        return to.emit("mean", given, hint, None, axes=list(range(1, len(given.shape))), keep=True)
    kernel = [side // each for side, each in zip(sides, wanted, strict=True)]
    return to.emit(f"{what}_pool{len(sides)}d", given, hint, None, kernel=kernel, stride=kernel)


def _flatten(to: Conversion, child: Any, args: Sequence[Any], hint: str) -> Ref:
    return flatten(to, args[0], hint, child.start_dim, child.end_dim)


def flatten(to: Conversion, given: Ref, hint: str, start: int = 0, end: int = -1) -> Ref:
    """Axes from ``start`` to ``end``, the batch counted, as one."""
    (first,), (last,) = axes_of(start, given.shape), axes_of(end, given.shape)
    if first == 0 and last == len(given.shape) - 1:
        return to.emit("flatten", given, hint)
    middle = math.prod(given.shape[first : last + 1])
    return to.emit("reshape", given, hint, None, to=[*given.shape[:first], middle, *given.shape[last + 1 :]])


def upsample(to: Conversion, given: Ref, hint: str, factor: Any, size: Any, mode: str) -> Ref:
    """Nearest upsampling by a whole factor; raises Refused for another."""
    if mode != "nearest":
        raise Refused(f"upsamples by {mode}; use nearest, and a convolution after it")
    sides = given.shape[1:]
    factors = _all(factor) if factor is not None else tuple(n / s for n, s in zip(_all(size), sides, strict=False))
    if (
        len(set(factors)) != 1
        or not float(factors[0]).is_integer()
        or (size is not None and len(_all(size)) == 1 < len(sides))
    ):
        raise Refused("upsamples by no whole factor, the same along all sides")
    return to.emit("upsample", given, hint, None, factor=int(factors[0]))


_MODULES: dict[type[nn.Module], Made] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    nn.GroupNorm: _group_norm,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.PReLU: _prelu,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent),
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("relu6"),
    nn.ELU: _activation("elu", alpha=1.0),
    nn.GELU: _activation("gelu", approximate="none"),
    nn.SiLU: _activation("silu"),
    nn.Tanh: _activation("tanh"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Softplus: _activation("softplus", beta=1.0, threshold=20.0),
    nn.Hardswish: _activation("hardswish"),
    nn.Hardsigmoid: _activation("hardsigmoid"),
    nn.Identity: lambda to, child, args, hint: args[0],
    nn.LeakyReLU: lambda to, child, args, hint: to.emit("leaky_relu", args[0], hint, slope=child.negative_slope),
    nn.Softmax: lambda to, child, args, hint: to.emit(
        "softmax", args[0], hint, axis=axes_of(child.dim, args[0].shape)[0]
    ),
    nn.Dropout: lambda to, child, args, hint: to.emit("dropout", args[0], hint, rate=child.p),
    **dict.fromkeys(
        (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        lambda to, child, args, hint: to.emit("dropout", args[0], hint, rate=child.p, channels=True),
    ),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive),
    nn.Flatten: _flatten,
    nn.Upsample: lambda to, child, args, hint: upsample(to, args[0], hint, child.scale_factor, child.size, child.mode),
}


def function(to: Conversion, node: fx.Node, name: str, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """Value of calling a function or a method; raises Refused."""
    from consilium_shared.graphs.functions import called

    if name in ARITHMETIC and plain([*args, *named.values()]):
        return ARITHMETIC[name](*args, **named)
    return called(to, node, name.removesuffix("_"), args, named)
