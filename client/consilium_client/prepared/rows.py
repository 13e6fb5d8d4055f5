"""Rows over packs: records by number, decrypted when they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.prepared.pack import Pack
from consilium_client.prepared.recipe import Field


class StoredRows:
    """Records that lie in packs. Memory holds where each is, 8 bytes a record, and what is being taken."""

    def __init__(
        self, packs: Sequence[Pack], pack: NDArray[np.int32], slot: NDArray[np.int32], fields: tuple[Field, ...]
    ) -> None:
        """``pack``, ``slot``: int32 ``[N]``, in which pack and where in it each record is."""
        self._packs, self._pack, self._slot = tuple(packs), pack, slot
        self.fields = fields

    def __len__(self) -> int:
        return len(self._pack)

    @property
    def intact(self) -> bool:
        """True while every chunk that was read could be authenticated."""
        return all(pack.intact for pack in self._packs)

    def select(self, positions: NDArray[np.int64]) -> StoredRows:
        """The rows at these positions, in this order."""
        return StoredRows(self._packs, self._pack[positions], self._slot[positions], self.fields)

    def take(self, numbers: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """The arrays ``[n, …]`` of the rows with these numbers; new ones, which the caller may change.

        Raises:
            DamagedPack: a chunk of a file was altered.
        """
        count = len(numbers)
        if len(self.fields) == 1:  # decrypted where it is wanted, without a copy
            (field,) = self.fields
            whole = np.empty((count, *field.shape), dtype=field.dtype)
            self._read(numbers, whole.reshape(count, -1).view(np.uint8))
            return (whole,)
        rows = np.empty((count, sum(field.size for field in self.fields)), dtype=np.uint8)
        self._read(numbers, rows)
        found, start = [], 0
        for field in self.fields:
            part = np.ascontiguousarray(rows[:, start : start + field.size]).view(field.dtype)
            found.append(part.reshape(count, *field.shape))
            start += field.size
        return tuple(found)

    def _read(self, numbers: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        pack = self._pack[numbers]
        for each in np.unique(pack).tolist():
            places = np.flatnonzero(pack == each)
            self._packs[each].read(self._slot[numbers[places]].astype(np.int64), out, places)
