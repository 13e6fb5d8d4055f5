"""Weights that somebody published, read without running anything: safetensors, a torch state dict, ONNX initialisers.

A person runs this on files that the person has chosen.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch

from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import PAYLOAD_BYTES
from consilium_shared.models import tensors
from consilium_shared.printable import printable

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]
Found = tuple[Mapping[str, Any], tuple["Norm", ...]]
"""Arrays by name, and batch norms of which the file says where they stand."""

_SHOWN = 5


class Norm(NamedTuple):
    """Batch norm with fixed statistics, by the names of its arrays in a file.

    Attributes:
        name: of its module, for people.
        scale: one number a channel, as ``shift``; a file may lack both.
        shift: added after it.
        mean: of its training.
        variance: of its training.
        layer: that it follows, alone: the name of its module or weight; None where the file does not say.
        bias: that layer's, which the file may lack; empty for ``layer.bias``.
        eps: added to the variance.
    """

    name: str
    scale: str
    shift: str
    mean: str
    variance: str
    layer: str | None
    bias: str = ""
    eps: float = 1e-5


class Source(NamedTuple):
    """File of weights.

    Attributes:
        weights: arrays by name, in the file's order.
        sha256: of the file.
        norms: batch norms of which the file says where they stand.
    """

    weights: Weights
    sha256: str
    norms: tuple[Norm, ...] = ()


def read(file: Path) -> Source:
    """Arrays of a file, as float32.

    ``.safetensors``, ``.onnx`` (its initialisers), or what ``torch.save`` wrote of a state dict, which is read by
    torch's reader of weights alone: a file with anything else in it is refused.

    Raises:
        ConfigurationError: the file cannot be read, is none of these, holds what is no weight, or one not finite.
    """
    try:
        size = file.stat().st_size
        data = file.read_bytes() if size <= PAYLOAD_BYTES else b""
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
    if not data:
        raise ConfigurationError(f"{file} is empty, or larger than {PAYLOAD_BYTES} bytes")
    reader = {".safetensors": _safetensors, ".onnx": _onnx}.get(file.suffix.lower(), _state_dict)
    try:
        arrays, norms = reader(data)
        _require_size(array.size for array in arrays.values())
        found = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    except Exception as error:  # readers of foreign files raise whatever their parts raise
        what = printable(" ".join(str(error).split())[:200])
        raise ConfigurationError(
            f"{file} holds more or other than weights ({type(error).__name__}: {what}). Save the state dict alone: "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    if not found:
        raise ConfigurationError(f"{file} holds no weights")
    broken = [name for name, array in found.items() if not np.isfinite(array).all()]
    if broken:
        raise ConfigurationError(f"{file}: {broken[0]} has a number that is not finite")
    return Source(found, hashlib.sha256(data).hexdigest(), norms)


def _require_size(numbers: Iterable[int]) -> None:
    """Raises ValueError for more numbers than a model has: a few bytes can stand for any shape."""
    if sum(numbers) * 4 > PAYLOAD_BYTES:
        raise ValueError(f"its weights would take more than {PAYLOAD_BYTES} bytes")


def _safetensors(data: bytes) -> Found:
    try:
        return safetensors.numpy.load(data), ()
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _onnx(data: bytes) -> Found:
    import onnx

    try:
        graph = onnx.load_model_from_string(data).graph
    except Exception as error:  # protobuf's own, whose place differs between its releases
        raise ValueError("not an ONNX model") from error
    if any(each.external_data for each in graph.initializer):
        raise ValueError("its weights lie in other files; save it as one file")
    turned = {name for node in graph.node if node.op_type == "MatMul" for name in node.input[1:2]}
    turned |= {
        node.input[1]
        for node in graph.node
        if node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    }
    found = {}
    for each in graph.initializer:
        array = onnx.numpy_helper.to_array(each)
        if array.dtype.kind == "f":
            found[each.name] = array.T if each.name in turned and array.ndim == 2 else array
    return found, tuple(_onnx_norms(graph, set(found)))


def _onnx_norms(graph: Any, known: set[str]) -> Iterator[Norm]:
    """Batch norms of an ONNX graph, each with the layer that it follows where nothing else reads that layer."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    ends = {each.name for each in graph.output}
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not known.issuperset(node.input[1:5]):
            continue
        maker = makers.get(node.input[0])
        layer, bias = None, ""
        alone = readers[node.input[0]] == 1 and node.input[0] not in ends
        if (
            (maker is not None and alone and maker.op_type in ("Conv", "Gemm"))
            and all(readers[name] == 1 for name in maker.input[1:])  # else another layer has its weights, too
        ):
            layer = maker.input[1]
            bias = maker.input[2] if len(maker.input) > 2 else f"{layer.removesuffix('.weight')}.bias"
        scale, shift, mean, variance = node.input[1:5]
        eps = next((each.f for each in node.attribute if each.name == "epsilon"), 1e-5)
        yield Norm(node.name or node.output[0], scale, shift, mean, variance, layer, bias, eps)


def _state_dict(data: bytes) -> Found:
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            _require_size(-(-part.file_size // 4) for part in packed.infolist())
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}, no state dict")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"{name!r} is a {type(value).__name__}, no weight")
    _require_size(value.numel() for value in found.values())
    return {name: value.detach().float().numpy() for name, value in found.items()}, ()


def write(found: Mapping[str, Array], target: Path) -> None:
    """Write weights as a safetensors file; raises ConfigurationError where that is not possible."""
    try:
        with target.open("xb") as file:
            for piece in tensors.encode(dict(found)):
                file.write(piece)
    except OSError as error:
        raise ConfigurationError(f"cannot write {target}: {error.strerror}") from error


def listed(names: Iterable[str]) -> str:
    """Some names, and how many there are besides."""
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
