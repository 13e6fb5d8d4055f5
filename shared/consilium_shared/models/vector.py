"""A model as one flat vector (for arithmetic) and as safetensors bytes (for the wire and for disk)."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from torch import nn

from consilium_shared import limits
from consilium_shared.errors import PeerError
from consilium_shared.models import build
from consilium_shared.study import Study

Vector = npt.NDArray[np.float32]


def to_vector(model: nn.Module) -> Vector:
    """All parameters in the order of ``named_parameters``, flat: float32 ``[d]``."""
    return np.concatenate([p.detach().cpu().numpy().ravel() for p in model.parameters()]).astype(np.float32, copy=False)


def load_vector(model: nn.Module, vector: npt.NDArray[np.floating[Any]]) -> None:
    """Set all parameters from ``vector`` ``[d]``.

    Raises:
        ValueError: ``vector`` has another length.
    """
    parameters = list(model.parameters())
    if vector.shape != (sum(p.numel() for p in parameters),):
        raise ValueError(f"the model has {sum(p.numel() for p in parameters)} parameters, the vector {vector.shape}")
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            part = np.asarray(vector[start : start + parameter.numel()], dtype=np.float32)
            parameter.copy_(torch.from_numpy(part.copy()).view_as(parameter))
            start += parameter.numel()


def pack(vector: Vector, study: Study) -> bytes:
    """Safetensors bytes of ``vector`` ``[d]``: one float32 tensor for each parameter name, and the study's digest.

    The same vector and study always give the same bytes.

    Raises:
        ValueError: ``vector`` does not fit the study's model.
    """
    shapes = {name: tuple(p.shape) for name, p in _shapes_alone(study).named_parameters()}
    if vector.shape != (sum(math.prod(shape) for shape in shapes.values()),):
        raise ValueError(f"a vector of shape {vector.shape} does not fit the study's model")
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        tensors[name] = np.ascontiguousarray(vector[start : start + size], dtype=np.float32).reshape(shape)
        start += size
    return safetensors.numpy.save(tensors, metadata={"study": study.digest})


def unpack(data: bytes, model: nn.Module, study: Study | None = None) -> Vector:
    """The vector ``[d]`` in the bytes that ``pack`` made for this model. The model itself is not changed.

    Strict: exactly the model's parameter names, shapes and float32, every value finite, and, when ``study`` is given,
    its digest. Decoding runs no code.

    Raises:
        PeerError: anything else.
    """
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PeerError("the model's bytes are not in safetensors format") from error
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if found.keys() != shapes.keys():
        raise PeerError("the model's bytes name other parameters than the study's model has")
    parts = []
    for name, shape in shapes.items():
        entry = found[name]
        if entry["dtype"] != "F32" or tuple(entry["shape"]) != shape:
            raise PeerError(f"parameter {name} has another shape or type than in the study's model")
        parts.append(np.frombuffer(entry["data"], dtype="<f4"))
    if study is not None and _metadata(data) != {"study": study.digest}:
        raise PeerError("the model's bytes belong to another study")
    vector = np.concatenate(parts).astype(np.float32, copy=False)
    if not np.isfinite(vector).all():
        raise PeerError("the model's bytes hold a value that is not finite")
    return vector


def width(study: Study) -> int:
    """d, the number of parameters of the study's model."""
    return sum(p.numel() for p in _shapes_alone(study).parameters())


def check(data: bytes, study: Study) -> None:
    """Raises PeerError unless ``data`` is a model of the study, as ``unpack`` judges, within ``limits.PARAMETERS``."""
    if width(study) > limits.PARAMETERS:
        raise PeerError(f"the study's model has more than {limits.PARAMETERS} parameters")
    unpack(data, _shapes_alone(study), study)


def _shapes_alone(study: Study) -> nn.Module:
    """The study's model without memory for its weights."""
    with torch.device("meta"):
        return build(study)


def _metadata(data: bytes) -> Any:
    """The metadata of bytes that ``safetensors`` has accepted: 8 bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__")
