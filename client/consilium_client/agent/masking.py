"""Encoding and masking of a result into the bytes that leave, piece by piece: it is never in memory twice.

The masks depend on the keys alone, so they are made while the site trains, into a file without a name.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_client.state.results import Result
from consilium_shared.protocol.summand import counts_segment, fixed_point, largest_weight
from consilium_shared.secagg import prg, ring
from consilium_shared.secagg.site import Contribution
from consilium_shared.secagg.terms import Segment
from consilium_shared.study import Study

PIECE_BYTES = 4 * prg.TILE

Piece = npt.NDArray[np.unsignedinteger[Any]]


class Masks:
    """The masks of a contribution, made ahead by a thread. Use as a context: the thread ends with it."""

    def __init__(self, contribution: Contribution, folder: Path) -> None:
        """``folder``: in the site's store; the file there has no name, so that a crash leaves nothing."""
        self._segments = contribution.terms.segments
        self._keys = {segment.name: contribution.mask_keys(segment) for segment in self._segments}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the context
        self._ready = 0
        """Bytes of the masks that are in the file, from the first segment's beginning."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._make, name="masks", daemon=True)

    def __enter__(self) -> Masks:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._file.close()

    def add_to(self, piece: Piece, segment: Segment, start: int) -> None:
        """Mask a piece that begins at byte ``start`` of a segment, a multiple of ``PIECE_BYTES``, in place."""
        self._stop.set()  # whoever needs the masks now is faster alone
        at = self._offset(segment) + start
        if at + piece.nbytes <= self._ready:
            np.add(piece, np.frombuffer(os.pread(self._file.fileno(), piece.nbytes, at), dtype=piece.dtype), out=piece)
        else:
            plus, minus = self._keys[segment.name]
            prg.apply(piece, plus, minus, first_tile=start // prg.TILE)

    def _make(self) -> None:
        for segment in self._segments:
            plus, minus = self._keys[segment.name]
            for start, length in _pieces(segment):
                if self._stop.is_set():
                    return
                piece: Piece = np.zeros(length, dtype=ring.DTYPES[segment.bits])
                prg.apply(piece, plus, minus, first_tile=start // prg.TILE)
                try:
                    written = os.pwrite(self._file.fileno(), piece.data, self._offset(segment) + start)
                except OSError:
                    written = 0
                if written != piece.nbytes:  # a full disk: the rest is made when it is needed
                    return
                self._ready = self._offset(segment) + start + piece.nbytes

    def _offset(self, segment: Segment) -> int:
        return sum(each.bytes for each in self._segments[: self._segments.index(segment)])


def masked(result: Result, study: Study, contribution: Contribution, masks: Masks, *, counts: bool) -> Iterator[bytes]:
    """Bytes that leave: the masked vector and the contribution's trailer, in pieces.

    Args:
        counts: whether the result's counts leave too, where it has some; else zeros do.

    Raises:
        DataError: a number that cannot be encoded.
    """
    for segment in contribution.terms.segments:
        for start, length in _pieces(segment):
            piece: Piece = np.empty(length, dtype=ring.DTYPES[segment.bits])
            _encode(result, study, contribution, segment, start // piece.itemsize, piece, counts=counts)
            masks.add_to(piece, segment, start)
            yield piece.tobytes()
    for start in range(0, len(contribution.trailer), PIECE_BYTES):
        yield contribution.trailer[start : start + PIECE_BYTES]


def _encode(
    result: Result,
    study: Study,
    contribution: Contribution,
    segment: Segment,
    start: int,
    out: Piece,
    *,
    counts: bool,
) -> None:
    sites = len(contribution.terms.cohort)
    if segment.name == "update" and result.about.integers:
        out[:] = result.integers(start, out.size)
    elif segment.name == "update":
        scale = result.about.weight / largest_weight(study)
        fixed_point(study, sites).encode(result.update(start, out.size), out, scale)
    elif segment.name == "weight":
        out[0] = result.about.weight
    else:
        numbers = counts_segment(result.counts(), sites, counted=counts and result.about.counted)
        out[:] = numbers[start : start + out.size]


def _pieces(segment: Segment) -> Iterator[tuple[int, int]]:
    """Pieces of a segment: first byte, and number of integers."""
    item = segment.bits // 8
    for start in range(0, segment.bytes, PIECE_BYTES):
        yield start, min(PIECE_BYTES, segment.bytes - start) // item
