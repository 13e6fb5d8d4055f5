"""A model as flat vectors (for arithmetic) and as safetensors bytes (for the wire and for disk).

Two vectors are told apart. The whole model, ``[d]``: what goes down to the sites, and into files. Its trained part,
``[t]``: the parameters that the study trains, in the same order; updates, and so all that is masked, summed and sent
up, the noise and the server optimizer's state have these coordinates alone. t is d where the study trains everything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import nn

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import PeerError
from consilium_shared.models import build, tensors
from consilium_shared.study import Study

Vector = npt.NDArray[np.float32]

PIECE = 1 << 20
"""Numbers that are looked at together."""
INITIAL = 1e-6
"""Difference allowed between a weight and the seed's here. One release of torch draws the same everywhere, but
processors with fused multiply-add round it otherwise: by 3e-8, measured of every model."""


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
            if not part.flags.writeable:  # torch would warn
                part = part.copy()
            parameter.copy_(torch.from_numpy(part).view_as(parameter))
            start += parameter.numel()


def trained(vector: Vector, study: Study) -> Vector:
    """The trained part ``[t]`` of a whole model ``[d]``; the vector itself where the study trains everything.

    Raises:
        ValueError: ``vector`` does not fit the study's model.
    """
    places, size = _places(study)
    if vector.shape != (size,):
        raise ValueError(f"the study's model has {size} parameters, the vector {vector.shape}")
    return vector if places == [slice(0, size)] else np.concatenate([vector[place] for place in places])


def with_trained(vector: Vector, part: Vector, study: Study) -> Vector:
    """A whole model ``[d]`` with the trained part ``[t]`` put in, the rest as in ``vector``, bit for bit.

    Raises:
        ValueError: one of them does not fit the study's model.
    """
    places, size = _places(study)
    if vector.shape != (size,) or part.shape != (sum(place.stop - place.start for place in places),):
        raise ValueError(f"the study's model has {size} parameters, the vectors {vector.shape} and {part.shape}")
    if places == [slice(0, size)]:
        return part
    found, start = vector.copy(), 0
    for place in places:
        end = start + place.stop - place.start
        found[place], start = part[start:end], end
    return found


def fingerprint(vector: Vector, study: Study) -> str:
    """SHA-256 of a whole model ``[d]`` by itself, whatever study it is in: ``study.model.start`` names it.

    Of the canonical JSON list of ``[name, [shape]]``, then of the numbers in that order as little-endian float32.
    """
    shapes = [[name, list(p.shape)] for name, p in _shapes_alone(study).named_parameters()]
    found = hashlib.sha256(canonical_bytes(shapes))
    found.update(np.ascontiguousarray(vector, dtype="<f4").data)
    return found.hexdigest()


def pack(vector: Vector, study: Study) -> bytes:
    """Safetensors bytes of ``vector`` ``[d]``: one float32 tensor for each parameter name, and the study's digest.

    The same vector and study always give the same bytes.

    Raises:
        ValueError: ``vector`` does not fit the study's model.
    """
    return b"".join(packed(vector, study))


def packed(vector: Vector, study: Study) -> Iterator[memoryview]:
    """The bytes of ``pack`` in pieces, without a copy of the vector; raises as ``pack``."""
    return tensors.encode(*_named(vector, study))


def packed_digest(vector: Vector, study: Study) -> str:
    """SHA-256 of what ``pack`` gives, without making it; raises as ``pack``."""
    return tensors.digest(*_named(vector, study))


def _named(vector: Vector, study: Study) -> tuple[dict[str, Vector], dict[str, str]]:
    """Parameter name to its part of the vector, which is no copy where that is float32; and the file's metadata."""
    shapes = {name: tuple(p.shape) for name, p in _shapes_alone(study).named_parameters()}
    if vector.shape != (sum(math.prod(shape) for shape in shapes.values()),):
        raise ValueError(f"a vector of shape {vector.shape} does not fit the study's model")
    found, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        found[name] = np.ascontiguousarray(vector[start : start + size], dtype="<f4").reshape(shape)
        start += size
    return found, {"study": study.digest}


def study_of(data: bytes) -> str | None:
    """The digest of the study that the bytes of ``pack`` name; None where they name none, or are not such bytes."""
    try:
        named = _metadata(data)["study"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return named if isinstance(named, str) else None


def unpack(data: bytes, model: nn.Module, study: Study | None = None) -> Vector:
    """The vector ``[d]`` in the bytes that ``pack`` made for this model. The model itself is not changed.

    Strict: exactly the model's parameter names, shapes and float32, every value finite, and, when ``study`` is given,
    its digest. Decoding runs no code.

    Raises:
        PeerError: anything else.
    """
    return np.concatenate(list(_parts(data, model, study).values())).astype(np.float32, copy=False)


def load(data: bytes, model: nn.Module, study: Study) -> None:
    """Set all parameters of a model, on the processor, from the bytes of ``pack``; raises as ``unpack``."""
    parts = _parts(data, model, study)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.detach().numpy()[...] = parts[name].reshape(tuple(parameter.shape))


def moved(model: nn.Module, data: bytes, study: Study) -> Vector:
    """Update ``[t]``: the trained parameters of a study's model less those in the bytes; raises as ``unpack``."""
    parts = _parts(data, model, study)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    update, start = np.empty(sum(p.numel() for p in wanted.values()), dtype=np.float32), 0
    for name, parameter in wanted.items():
        after, place = parameter.detach().cpu().numpy().ravel(), slice(start, start + parameter.numel())
        np.subtract(after, parts[name], out=update[place])
        start += parameter.numel()
    return update


def _parts(data: bytes, model: nn.Module, study: Study | None) -> dict[str, Vector]:
    """Numbers of each parameter by name, flat, in the model's order; of bytes as ``pack`` writes them no copies."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    about = None if study is None else {"study": study.digest}
    head, places = tensors.header({name: (np.dtype("<f4"), shape) for name, shape in shapes.items()}, about)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if data.startswith(head) and len(data) == len(head) + 4 * sum(sizes.values()):
        parts = {
            name: np.frombuffer(data, dtype="<f4", count=size, offset=places[name]) for name, size in sizes.items()
        }
    else:
        parts = _deserialized(data, shapes, study)
    for part in parts.values():
        if not all(np.isfinite(part[start : start + PIECE]).all() for start in range(0, part.size, PIECE)):
            raise PeerError("the model's bytes hold a value that is not finite")
    return parts


def _deserialized(data: bytes, shapes: dict[str, tuple[int, ...]], study: Study | None) -> dict[str, Vector]:
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PeerError("the model's bytes are not in safetensors format") from error
    if found.keys() != shapes.keys():
        raise PeerError("the model's bytes name other parameters than the study's model has")
    parts = {}
    for name, shape in shapes.items():
        entry = found[name]
        if entry["dtype"] != "F32" or tuple(entry["shape"]) != shape:
            raise PeerError(f"parameter {name} has another shape or type than in the study's model")
        parts[name] = np.frombuffer(entry["data"], dtype="<f4")
    if study is not None and _metadata(data) != {"study": study.digest}:
        older = f", or to this one in an older contract schema than {study.schema_version} (schema_version in its file)"
        raise PeerError("the model's bytes belong to another study" + (older if study.schema_version > 1 else ""))
    return parts


def width(study: Study) -> int:
    """t, the numbers of an update: the parameters of the study's model that it trains."""
    return sum(p.numel() for p in _shapes_alone(study).parameters() if p.requires_grad)


def check(data: bytes, study: Study, *, first: bool = False) -> str:
    """Check that ``data`` is a model of the study, as far as a site can tell.

    Args:
        first: it is the model before round 1, so the very one that the contract names, or that its seed gives.

    Returns:
        SHA-256 of what the study does not train of it, little-endian float32: the same in every round.

    Raises:
        PeerError: it is none, as ``unpack`` judges; has more than ``limits.PARAMETERS``; or is not what a study starts
            from. Of a study that names no weights what it does not train is its seed's in every round.
    """
    model = _shapes_alone(study)
    if sum(p.numel() for p in model.parameters()) > limits.PARAMETERS:
        raise PeerError(f"the study's model has more than {limits.PARAMETERS} parameters")
    vector, start = unpack(data, model, study), study.model.start
    kept = _frozen(vector, study)
    if start is None and (first or kept.size):
        if not _begins(vector, study, first):
            raise PeerError(f"the model does not begin as the contract's seed has it (torch {torch.__version__} here)")
    elif start is not None and first and fingerprint(vector, study) != start.sha256:
        raise PeerError("the model is not the one that the contract says the study starts from")
    return hashlib.sha256(np.ascontiguousarray(kept, dtype="<f4").data).hexdigest()


def _begins(vector: Vector, study: Study, whole: bool) -> bool:
    """A model ``[d]`` has the parameters that the study's seed gives: all, or those that it does not train."""
    start = 0
    for parameter in build(study).parameters():
        if whole or not parameter.requires_grad:
            seeds = parameter.detach().numpy().ravel()
            for first in range(0, seeds.size, PIECE):
                piece = seeds[first : first + PIECE]
                if not np.allclose(vector[start + first :][: piece.size], piece, rtol=0.0, atol=INITIAL):
                    return False
        start += parameter.numel()
    return True


def _frozen(vector: Vector, study: Study) -> Vector:
    """Parameters of a whole model ``[d]`` that the study does not train."""
    kept = np.ones(vector.shape, dtype=bool)
    for place in _places(study)[0]:
        kept[place] = False
    return vector[kept]


def _shapes_alone(study: Study) -> nn.Module:
    """The study's model without memory for its weights."""
    with torch.device("meta"):
        return build(study)


def _places(study: Study) -> tuple[list[slice], int]:
    """Slices of the trained parameters in the whole model, neighbours as one; and d."""
    found: list[slice] = []
    start = 0
    for parameter in _shapes_alone(study).parameters():
        end = start + parameter.numel()
        if parameter.requires_grad:
            found = (
                [*found[:-1], slice(found[-1].start, end)]
                if found and found[-1].stop == start
                else [*found, slice(start, end)]
            )
        start = end
    return found, start


def _metadata(data: bytes) -> Any:
    """The metadata of bytes that ``safetensors`` has accepted: 8 bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__")
