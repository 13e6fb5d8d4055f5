"""The records of a step as the physical batches in which they are computed, prepared ahead where a GPU computes.

Preparing a piece (taking its records, moving its images, filling it up, copying it) is work of the host's. On a GPU a
thread of its own does it for the next piece, of the next step too, while the present one is computed; on the CPU it
would only take time from the computing, and is done in turn. What comes of it is the same: all draws are made in the
order of the pieces, and a step that begins again in smaller ones moves its images as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from consilium_client.data.patients import Draw
from consilium_client.data.records import Records
from consilium_client.training import augmentation
from consilium_client.training.augmentation import Moves
from consilium_shared.study import Study
from dpsgd.device import onto
from dpsgd.rows import ROWS, filled, one_thread, thread_beside


class Piece(NamedTuple):
    """A physical batch: the model's inputs, the classes, whose each row is (``owners.Owners``), and which record of all
    it shows. Inputs and classes may have rows of filling below those of the records."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    owners: torch.Tensor
    records: npt.NDArray[np.int64]


class Split(NamedTuple):
    """Split of a step into pieces: of at most ``size`` records, but every patient whole; ``fixed``: each filled up to
    ``size`` rows, a power of two. A patient with more records has a piece of its own, then of the next power of two: so
    nothing about a piece's shape comes from other patients. ``alone``: so has each patient."""

    size: int
    fixed: bool
    alone: bool = False


class _Place(NamedTuple):
    """The rows from ``start`` to ``end`` of a step's, as a piece of ``rows``."""

    start: int
    end: int
    rows: int


class _Copied:
    """A piece that is being copied to the device."""

    def __init__(self, piece: Piece, device: torch.device) -> None:
        """By the thread whose stream copies it."""
        self._piece, self._device = piece, device
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def here(self) -> Piece:
        """For what the caller's stream computes from here on."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._event)
            for tensor in (*self._piece.inputs, self._piece.labels):
                tensor.record_stream(stream)  # else its memory were free for the next copy once it is dropped
        return self._piece


class Ahead(NamedTuple):
    """The thread that prepares pieces, and whom to tell, when a batch's last one was handed out, how it was cut."""

    thread: Executor
    then: Callable[[Split], None]


class Batch:
    """The records of one step, on the device, a physical batch at a time.

    With ``training.augment_multiplicity`` K a record is K rows of its patient, each augmented by its own draw (De et
    al. 2022, section 3.2). The accountant's event stays what it was: a patient's gradient is the mean over all its
    rows, and that one vector is clipped. So the patient still moves a step's sum by at most the clipping norm, however
    many rows it has; who is drawn, and the noise, do not depend on K.
    """

    def __init__(
        self,
        study: Study,
        records: Records,
        draw: Draw,
        device: torch.device,
        generator: np.random.Generator,
        split: Split = Split(ROWS, fixed=True),
        ahead: Ahead | None = None,
    ) -> None:
        """``split``: by which augmentation is drawn, also where pieces are then cut otherwise."""
        copies = study.training.augment_multiplicity
        self._records, self._owners = draw.records.repeat(copies), draw.owners.repeat(copies)
        self._source, self._device, self._ahead = records, device, ahead
        self._moves = self._drawn(split, generator) if study.training.augment == "light" else None
        self._begun: tuple[_Place, Future[_Copied]] | None = None

    def pieces(self, size: int) -> Iterator[Piece]:
        """At most ``size`` records in each, but every patient whole: a piece has at least one patient."""
        return self._prepared(Split(size, fixed=False))

    def fixed_pieces(self, size: int) -> Iterator[Piece]:
        """``pieces``, each filled up (``Split``)."""
        return self._prepared(Split(size, fixed=True))

    def alone(self, size: int) -> list[Callable[[], Piece]]:
        """Functions that prepare each of ``fixed_pieces`` of one patient each, to be called in turn: where one breaks
        off, the others are still there."""
        return [partial(self._now, place) for place in self._places(Split(size, fixed=True, alone=True))]

    def _drawn(self, split: Split, generator: np.random.Generator) -> Moves:
        """The moves of all records, drawn piece by piece; filling takes its draws too."""
        parts = [Moves(np.zeros(0), np.zeros((0, 2)))]
        for start, end, rows in self._places(split):
            parts.append(augmentation.draw(rows, generator).part(0, end - start, end - start))
        return Moves(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _places(self, split: Split) -> list[_Place]:
        found: list[_Place] = []
        start, ends = 0, np.append(np.flatnonzero(np.diff(self._owners)) + 1, len(self._owners))
        while start < len(self._owners):
            fits = ends[(ends > start) & (ends <= start + split.size)]
            end = int(fits[-1] if len(fits) and not split.alone else ends[ends > start][0])
            count = end - start
            found.append(_Place(start, end, max(split.size, 1 << (count - 1).bit_length()) if split.fixed else count))
            start = end
        return found

    def _prepared(self, split: Split) -> Iterator[Piece]:
        places, ahead = self._places(split), self._ahead
        for number, place in enumerate(places):
            piece = self._now(place)
            if ahead is not None and number + 1 < len(places):
                self._begin(places[number + 1], ahead)
            elif ahead is not None:
                ahead.then(split)
            yield piece
        if ahead is not None and not places:
            ahead.then(split)

    def _now(self, place: _Place) -> Piece:
        if self._ahead is not None:
            return self._taken(place, self._ahead)
        with one_thread():
            return self._piece(place)

    def begin(self, split: Split, ahead: Ahead) -> None:
        """Have the first of these pieces prepared."""
        for place in self._places(split)[:1]:
            self._begin(place, ahead)

    def _begin(self, place: _Place, ahead: Ahead) -> None:
        self._begun = place, ahead.thread.submit(self._copied, place)

    def _taken(self, place: _Place, ahead: Ahead) -> Piece:
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] != place:  # the step begins again in other pieces
            wait([begun[1]])
            begun = None
        future = ahead.thread.submit(self._copied, place) if begun is None else begun[1]
        return future.result().here()

    def _copied(self, place: _Place) -> _Copied:
        return _Copied(self._piece(place), self._device)

    def _piece(self, place: _Place) -> Piece:
        start, end, rows = place
        drawn = self._records[start:end]
        inputs = [filled(torch.from_numpy(self._source.inputs[drawn]), rows)]
        if self._moves is not None:  # of rows that are filled up too: it rounds as a model's kernels do
            inputs = [augmentation.light(inputs[0], self._moves.part(start, end, rows))]
        if self._source.statics is not None:
            inputs.append(filled(torch.from_numpy(self._source.statics[drawn]), rows))
        return Piece(
            tuple(onto(each, self._device) for each in inputs),
            onto(filled(torch.from_numpy(self._source.labels[drawn]), rows), self._device),
            torch.from_numpy(self._owners[start:end] - self._owners[start]),
            drawn,
        )


class Batches:
    """The batches of a round, one for each draw, to be gone through once inside of ``with``: at its end no thread is
    left."""

    def __init__(
        self,
        study: Study,
        records: Records,
        draws: Iterable[Draw],
        device: torch.device,
        generator: np.random.Generator,
        split: Split,
        ahead: bool | None = None,
    ) -> None:
        """``generator``: of augmentation, for nobody else meanwhile; ``split``: as of ``Batch``; ``ahead``: whether a
        thread prepares what comes next; None: where a GPU computes."""
        self._draws = iter(draws)
        self._about = study, records, device, generator, split
        self._thread: ThreadPoolExecutor | None = None
        self._coming: Future[Batch | None] | None = None
        if device.type == "cuda" if ahead is None else ahead:
            self._thread = thread_beside("pieces")
            if device.type == "cuda":  # whose copies wait for nothing that is computed
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._thread.submit(torch.cuda.set_stream, stream).result()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *about: object) -> None:
        """Wait for what is being prepared, and drop it."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Batch | None:
        coming, self._coming = self._coming, None
        return self._made() if coming is None else coming.result()

    def _made(self) -> Batch | None:
        draw, (study, records, device, generator, split) = next(self._draws, None), self._about
        if draw is None:
            return None
        ahead = None if self._thread is None else Ahead(self._thread, self._follow)
        return Batch(study, records, draw, device, generator, split, ahead)

    def _follow(self, split: Split) -> None:
        """Have the next batch begun, for a step that cuts it as the last one was cut."""
        if self._coming is None and self._thread is not None:
            self._coming = self._thread.submit(self._begun, split, self._thread)

    def _begun(self, split: Split, thread: ThreadPoolExecutor) -> Batch | None:
        batch = self._made()
        if batch is not None:
            batch.begin(split, Ahead(thread, self._follow))
        return batch
