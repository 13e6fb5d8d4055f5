"""Safetensors bytes array by array: written and read without a second copy of what they hold.

``safetensors`` makes one string of all arrays, from copies; with a model of 400 MB and an optimizer's state that is ten
times the model. The bytes here are the very same (``tests/unit/shared/test_tensors.py``): 8 bytes of length, a JSON
header padded with spaces to a multiple of 8, then the arrays, larger types first and by name among those of one type.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from consilium_shared.errors import IntegrityError

Arrays = dict[str, npt.NDArray[Any]]

PIECE_BYTES = 1 << 20
TYPES: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4")}
"""Types by the name that safetensors has for them, larger first."""
HEADER_BYTES = 1 << 24
"""Longest header that is read."""


def encode(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> Iterator[memoryview]:
    """The bytes of a safetensors file in pieces, which are views of the arrays' own memory.

    Args:
        arrays: name to a float32 or float64 array, contiguous.
        metadata: of the file.

    Raises:
        ValueError: another type, or an array that is not contiguous.
    """
    for name, array in arrays.items():
        if array.dtype not in TYPES.values() or not array.flags.c_contiguous:
            raise ValueError(f"{name}: not a contiguous array of float32 or float64")
    head, places = header({name: (each.dtype, each.shape) for name, each in arrays.items()}, metadata)
    yield memoryview(head)
    for name in places:
        octets = arrays[name].reshape(-1).view(np.uint8).data
        for begin in range(0, len(octets), PIECE_BYTES):
            yield octets[begin : begin + PIECE_BYTES]


def header(
    arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The bytes of such a file before its arrays; and each array's name and first byte in the file, in its order.

    Args:
        arrays: name to type, float32 or float64, and shape.
        metadata: of the file.

    >>> header({"weight": (np.dtype("<f4"), (2, 3))})[1]
    {'weight': 72}
    """
    names = {kind: name for name, kind in TYPES.items()}
    about: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    places, start = {}, 0
    for name in sorted(arrays, key=lambda name: (-arrays[name][0].itemsize, name)):
        kind, shape = arrays[name]
        end = start + kind.itemsize * math.prod(shape)
        about[name] = {"dtype": names[kind], "shape": list(shape), "data_offsets": [start, end]}
        places[name], start = start, end
    head = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, {name: 8 + len(head) + at for name, at in places.items()}


def digest(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of the bytes of ``encode``, 64 hex digits."""
    found = hashlib.sha256()
    for piece in encode(arrays, metadata):
        found.update(piece)
    return found.hexdigest()


def read(path: Path) -> tuple[Arrays, str]:
    """The arrays of a file that ``encode`` wrote, by name, and the SHA-256 of the file.

    Raises:
        OSError: the file cannot be read.
        IntegrityError: it is no such file.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        try:
            arrays = dict(_arrays(file, found))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise IntegrityError("not in safetensors format, or cut off") from error
    return arrays, found.hexdigest()


def _arrays(file: IO[bytes], found: Any) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """In the file's order, each read into its own memory; everything that is read is hashed."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) != 8 or size > HEADER_BYTES:
        raise ValueError("header")
    head = file.read(size)
    found.update(length)
    found.update(head)
    about = json.loads(head)
    about.pop("__metadata__", None)
    at = 0
    for name, entry in sorted(about.items(), key=lambda item: item[1]["data_offsets"]):
        array = np.empty(entry["shape"], TYPES[entry["dtype"]])
        if entry["data_offsets"] != [at, at + array.nbytes]:
            raise ValueError("offsets")
        octets = array.reshape(-1).view(np.uint8).data
        for begin in range(0, len(octets), PIECE_BYTES):
            piece = octets[begin : begin + PIECE_BYTES]
            if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError("cut off")
            found.update(piece)
        at += array.nbytes
        yield name, array
    if file.read(1):
        raise ValueError("more than its arrays")
