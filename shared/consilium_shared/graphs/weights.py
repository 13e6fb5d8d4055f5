"""Weights that somebody published, read without running anything: safetensors, a torch state dict, ONNX initialisers.

A person runs this on files that the person has chosen.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch

from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import PAYLOAD_BYTES

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

_SHOWN = 5


class Source(NamedTuple):
    """File of weights.

    Attributes:
        weights: arrays by name, in the file's order.
        sha256: of the file.
    """

    weights: Weights
    sha256: str


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
        found = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in reader(file, data).items()}
    except (ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        what = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"{file} holds more or other than weights ({type(error).__name__}: {what}). Save the state dict alone: "
            "torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    if not found:
        raise ConfigurationError(f"{file} holds no weights")
    broken = [name for name, array in found.items() if not np.isfinite(array).all()]
    if broken:
        raise ConfigurationError(f"{file}: {broken[0]} has a number that is not finite")
    return Source(found, hashlib.sha256(data).hexdigest())


def _safetensors(file: Path, data: bytes) -> Mapping[str, Any]:
    try:
        return safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _onnx(file: Path, data: bytes) -> Mapping[str, Any]:
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
    return found


def _state_dict(file: Path, data: bytes) -> Mapping[str, Any]:
    found = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise TypeError(f"a {type(found).__name__}, no state dict")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"{name!r} is a {type(value).__name__}, no weight")
    return {name: value.detach().float().numpy() for name, value in found.items()}


def listed(names: Iterable[str]) -> str:
    """Some names, and how many there are besides."""
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")
