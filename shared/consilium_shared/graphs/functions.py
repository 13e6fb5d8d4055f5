"""Converters of functions and methods of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from consilium_shared.graphs.conversion import Batch, Conversion, Ref, Refused, Sized, axes_of, shape_of
from consilium_shared.graphs.converters import ACTIVATIONS, LastStates, adaptive, flatten, pool, upsample

SAME = ("contiguous", "clone", "float", "to", "detach", "type_as", "identity")


def called(to: Conversion, node: fx.Node, name: str, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """Value of calling one by its name; raises Refused."""
    first = args[0] if args else named.get("input")
    rest = list(args[1:])
    if name in ("getitem", "getattr"):
        return _item(to, node, first, rest[0])
    if name in SAME:
        if name == "detach":
            raise Refused("cuts the gradient off; leave it out")
        return first
    if name in ("size", "shape"):
        whole = _sized(first)
        return whole if not (rest or named) else whole[(rest or [named["dim"]])[0]]
    if name in ("len",):
        return _sized(first)[0]
    if name == "dim" and isinstance(first, Ref):
        return len(first.shape) + 1
    hint = node.name
    if isinstance(first, nn.Parameter) or any(isinstance(each, nn.Parameter) for each in rest):
        return _with_weight(to, name, [first, *rest], hint)
    if name in _SUMS:
        return _arithmetic(to, name, first, rest[0] if rest else named.get("other"), hint)
    if name in ("cat", "concat", "concatenate"):
        return _cat(to, first, (rest or [named.get("dim", named.get("axis", 0))])[0], hint)
    if not isinstance(first, Ref):
        raise Refused("takes a number or a weight where a graph takes what a layer gave")
    made = _FUNCTIONS.get(name)
    if made is None:
        raise Refused(f"a graph has no {name}; use layers of docs/graphs.md")
    try:
        return made(to, first, hint, *rest, **{key: value for key, value in named.items() if key != "input"})
    except TypeError as error:
        raise Refused(f"has arguments that a graph's layer has not ({error})") from error


def _sized(value: Any) -> Sized:
    if not isinstance(value, Ref):
        raise Refused("asks for the size of what is no tensor of records")
    return Sized((Batch(), *value.shape))


def _item(to: Conversion, node: fx.Node, of: Any, at: Any) -> Any:
    if at == "shape":
        return _sized(of)
    if isinstance(of, LastStates):
        if at != -1:
            raise Refused("takes the last state of a layer that is not the last; take h[-1]")
        return of.of_last()
    if isinstance(of, Sized):
        return of[at] if isinstance(at, int) else Sized([*of][at])
    if isinstance(of, tuple | list) and not isinstance(of, Ref):
        return of[at]
    if not isinstance(of, Ref):
        raise Refused("takes a part of what is no tensor")
    places = list(at) if isinstance(at, tuple) else [at]
    if Ellipsis in places:
        where = places.index(Ellipsis)
        places[where : where + 1] = [slice(None)] * (len(of.shape) + 2 - len(places))
    if places[0] != slice(None):
        raise Refused("takes some records of the batch; begin with a colon")
    axis, found = 0, of
    for place in places[1:]:
        if place is None:
            found = to.emit("reshape", found, node.name, None, to=[*found.shape[:axis], 1, *found.shape[axis:]])
            axis += 1
        elif isinstance(place, int):
            found = to.emit("select", found, node.name, None, axis=axis, at=place % found.shape[axis])
        elif isinstance(place, slice):
            start, stop, step = place.indices(found.shape[axis])
            if (start, stop, step) != (0, found.shape[axis], 1):
                found = to.emit("slice", found, node.name, None, axis=axis, start=start, stop=stop, step=step)
            axis += 1
        else:
            raise Refused("takes places by a list; take a slice")
    return found


_SUMS = {"add": "add", "iadd": "add", "mul": "multiply", "imul": "multiply", "sub": "subtract", "isub": "subtract",
         "truediv": "divide", "div": "divide", "multiply": "multiply", "subtract": "subtract", "neg": "negative",
         "itruediv": "divide", "rsub": "reversed"}  # fmt: skip


def _arithmetic(to: Conversion, name: str, first: Any, second: Any, hint: str) -> Ref:
    what = _SUMS[name]
    if what == "negative":
        return to.emit("affine", first, hint, None, scale=-1.0)
    both = isinstance(first, Ref), isinstance(second, Ref)
    if both == (True, True):
        if what not in ("add", "multiply", "subtract"):
            raise Refused("divides by what records give; multiply instead")
        long = max(len(first.shape), len(second.shape))
        given = [
            each if len(each.shape) == long
            else to.emit("reshape", each, f"{hint}_as", None, to=[*[1] * (long - len(each.shape)), *each.shape])
            for each in (first, second)
        ]  # fmt: skip
        return to.emit(what, given, hint)
    value, number, turned = (first, second, False) if both[0] else (second, first, True)
    if not isinstance(value, Ref) or not isinstance(number, int | float):
        raise Refused("takes a constant tensor; a graph has constants of one number (affine)")
    if what == "divide":
        if turned or number == 0:
            raise Refused("divides by what records give; multiply instead")
        return to.emit("affine", value, hint, None, scale=1.0 / number)
    if what == "multiply":
        return to.emit("affine", value, hint, None, scale=float(number))
    sign = {"add": (1.0, 1.0), "subtract": (-1.0, 1.0) if turned else (1.0, -1.0), "reversed": (-1.0, 1.0)}[what]
    return to.emit("affine", value, hint, None, scale=sign[0], shift=sign[1] * number)


def _with_weight(to: Conversion, name: str, args: Sequence[Any], hint: str) -> Any:
    """Weights of the module itself: positions that are added, and a class token that is put before a series."""
    weight = next(each for each in args if isinstance(each, Tensor))
    if name in ("expand", "repeat"):
        return weight
    if name in ("add", "iadd"):
        value = next((each for each in args if isinstance(each, Ref)), None)
        if value is not None and weight.numel() == math.prod(value.shape):
            shaped = weight.detach().reshape(1, *value.shape)
            return to.emit("positions", value, hint, {"weight": shaped})
    raise Refused(
        "uses a weight of the module outside of a layer; a graph has positions (x + parameter of a record's shape) and "
        "a class token (cat of parameter.expand(len(x), -1, -1) and x)"
    )


def _cat(to: Conversion, parts: Any, dim: int, hint: str) -> Ref:
    values = list(parts)
    if (
        isinstance(values[0], nn.Parameter)
        and len(values) == 2
        and dim == 1
        and values[0].numel() == values[1].shape[-1]
    ):
        return to.emit("class_token", values[1], hint, {"weight": values[0].detach().reshape(1, 1, -1)})
    if not all(isinstance(each, Ref) for each in values):
        raise Refused("joins what layers gave with something else")
    return to.emit("concat", values, hint, None, axis=axes_of(dim, values[0].shape)[0])


def _dims(value: Any, dim: Any) -> list[int]:
    return axes_of(list(range(1, len(value.shape) + 1)) if dim is None else dim, value.shape)


def _reduced(layer: str) -> Callable[..., Ref]:
    def made(to: Conversion, value: Ref, hint: str, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is None:
            raise Refused("goes over all records together; name the dimensions, without the first")
        found = to.emit(layer, value, hint, None, axes=_dims(value, dim), keep=keepdim)
        return found

    return made


def _max(to: Conversion, value: Ref, hint: str, dim: Any = None, keepdim: bool = False) -> Any:
    return (_reduced("max")(to, value, hint, dim, keepdim), None)


def _reshape(to: Conversion, value: Ref, hint: str, *sizes: Any) -> Ref:
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    shape = shape_of(wanted, math.prod(value.shape))
    return to.emit("flatten", value, hint) if len(shape) == 1 else to.emit("reshape", value, hint, None, to=shape)


def _permute(to: Conversion, value: Ref, hint: str, *order: Any) -> Ref:
    wanted = list(order[0] if len(order) == 1 and isinstance(order[0], tuple | list) else order)
    if wanted[0] != 0:
        raise Refused("moves the batch; leave it first (and use batch_first=True)")
    return to.emit("permute", value, hint, None, order=axes_of(wanted[1:], value.shape))


def _transpose(to: Conversion, value: Ref, hint: str, one: int, other: int) -> Ref:
    first, second = axes_of([one, other], value.shape)
    order = list(range(len(value.shape)))
    order[first], order[second] = second, first
    return to.emit("permute", value, hint, None, order=order)


def _unsqueeze(to: Conversion, value: Ref, hint: str, dim: int) -> Ref:
    axis = dim - 1 if dim >= 0 else dim + len(value.shape) + 1
    if axis < 0:
        raise Refused("puts an axis before the batch")
    return to.emit("reshape", value, hint, None, to=[*value.shape[:axis], 1, *value.shape[axis:]])


def _squeeze(to: Conversion, value: Ref, hint: str, dim: Any = None) -> Ref:
    if dim is None:
        raise Refused("drops every axis of 1, the batch of one record too; name the dimension")
    (axis,) = axes_of(dim, value.shape)
    if value.shape[axis] != 1:
        return value
    return to.emit("reshape", value, hint, None, to=[*value.shape[:axis], *value.shape[axis + 1 :]])


def _softmax(to: Conversion, value: Ref, hint: str, dim: Any = None, **_: Any) -> Ref:
    if dim is None:
        raise Refused("does not say along which dimension; name it")
    return to.emit("softmax", value, hint, None, axis=axes_of(dim, value.shape)[0])


def _log_softmax(to: Conversion, value: Ref, hint: str, dim: Any = None, **_: Any) -> Ref:
    to.changed = "log_softmax"
    return _softmax(to, value, hint, dim)


def _dropout(to: Conversion, value: Ref, hint: str, p: float = 0.5, training: Any = True, inplace: bool = False) -> Ref:
    return to.emit("dropout", value, hint, None, rate=p) if training else value


def _pooled(layer: str) -> Callable[..., Ref]:
    def made(
        to: Conversion, value: Ref, hint: str, kernel_size: Any, stride: Any = None, padding: Any = 0, *more: Any,
        dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False, count_include_pad: bool = True,
    ) -> Ref:  # fmt: skip
        if more or return_indices:
            raise Refused("pools with arguments that a graph's pooling has not; name them")
        return pool(
            to, layer, value, hint, kernel_size, stride, padding, ceil=ceil_mode, dilation=dilation,
            counted=count_include_pad,
        )  # fmt: skip

    return made


def _pad(to: Conversion, value: Ref, hint: str, pad: Any, mode: str = "constant", value_: Any = 0, **named: Any) -> Ref:
    if mode != "constant" or named.get("value") not in (None, 0, 0.0) or value_ not in (None, 0):
        raise Refused("pads with something else than zeros")
    found = value
    for place in range(0, len(pad), 2):
        axis = len(value.shape) - 1 - place // 2
        if axis < 0:
            raise Refused("pads the batch")
        if pad[place] or pad[place + 1]:
            found = to.emit("pad", found, hint, None, axis=axis, before=pad[place], after=pad[place + 1])
    return found


def _matmul(to: Conversion, value: Ref, hint: str, other: Any) -> Ref:
    return to.emit("matmul", [value, other], hint)


def _interpolate(
    to: Conversion, value: Ref, hint: str, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **_: Any
) -> Ref:
    return upsample(to, value, hint, scale_factor, size, mode)


def _leaky(to: Conversion, value: Ref, hint: str, negative_slope: float = 0.01, inplace: bool = False) -> Ref:
    return to.emit("leaky_relu", value, hint, None, slope=negative_slope)


def _activation(layer: str) -> Callable[..., Ref]:
    def made(to: Conversion, value: Ref, hint: str, inplace: bool = False) -> Ref:
        return to.emit(layer, value, hint)

    return made


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{layer: _activation(layer) for layer in ACTIVATIONS},
    "leaky_relu": _leaky,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "dropout": _dropout,
    "flatten": lambda to, value, hint, start_dim=0, end_dim=-1: flatten(to, value, hint, start_dim, end_dim),
    "view": _reshape,
    "reshape": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "mean": _reduced("mean"),
    "sum": _reduced("sum"),
    "amax": _reduced("max"),
    "max": _max,
    "matmul": _matmul,
    "bmm": _matmul,
    "interpolate": _interpolate,
    "pad": _pad,
    **{
        f"{what}_pool{dimensions}d": _pooled(f"{what}_pool{dimensions}d")
        for what in ("max", "avg")
        for dimensions in (1, 2, 3)
    },
    **{
        f"adaptive_{what}_pool{dimensions}d": lambda to, value, hint, output_size, _what=what: adaptive(
            to, _what, value, hint, output_size
        )
        for what in ("avg", "max")
        for dimensions in (1, 2, 3)
    },
}
