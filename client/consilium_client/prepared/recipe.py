"""Recipe: how a source, a file or a few, becomes one record, by the source's content and the recipe alone."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from consilium_shared.canonical import canonical_digest


class Source(NamedTuple):
    """Source of one record: files, in their order; ``detail`` says what of them (a frame, say); ``memory`` is about
    how many bytes preparing it takes, where that is much."""

    paths: tuple[Path, ...]
    detail: str = ""
    memory: int = 0


class Field(NamedTuple):
    """One array of a record: its shape and NumPy's name of its type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Recipe(ABC):
    """A preparation. What it makes of a source depends on its parameters, its code and the source's content alone.

    Attributes:
        kind: by which the process that prepares finds the class; part of a folder's name.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Everything about it as JSON-like data, from which ``recipes.made_of`` makes it again."""

    @property
    @abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """The arrays of every record."""

    @abstractmethod
    def code(self) -> str:
        """Digest of the code that prepares (``code_digest``): another one may give other bits."""

    @abstractmethod
    def make(self, source: Source) -> tuple[NDArray[Any], ...]:
        """The arrays of a record, as ``fields`` has them; raises Unusable with the reason."""

    def remark(self, arrays: tuple[NDArray[Any], ...]) -> str:
        """Remark on a record that is used and looks odd, a fixed sentence; kept with it. Empty for most."""
        return ""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(field.size for field in self.fields)

    @property
    def digest(self) -> str:
        """SHA-256 that names the preparation: what has the same is the same, bit for bit."""
        fields = [[list(field.shape), field.dtype] for field in self.fields]
        about = {"kind": self.kind, "parameters": self.parameters, "fields": fields, "code": self.code()}
        return canonical_digest(about)


def code_digest(files: Iterable[Path], distributions: Iterable[str]) -> str:
    """SHA-256 of source files and of the installed versions of libraries; one that is not installed has none."""
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return canonical_digest({"files": found, "libraries": {name: _version(name) for name in distributions}})


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def packed(arrays: Iterable[NDArray[Any]], fields: Iterable[Field]) -> bytes:
    """A record's bytes; raises ValueError where an array is not as its field says."""
    parts = []
    for array, field in zip(arrays, fields, strict=True):
        if array.shape != field.shape or array.dtype != np.dtype(field.dtype):
            raise ValueError(f"{array.dtype} {array.shape} where {field.dtype} {field.shape} is meant")
        parts.append(np.ascontiguousarray(array).tobytes())
    return b"".join(parts)
