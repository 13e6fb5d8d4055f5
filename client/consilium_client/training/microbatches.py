"""Microbatches: the records of a step, split into the physical batches in which they are computed.

Preparing a microbatch (taking its records, moving its images, padding, copying) is work of the host's. On a GPU a
worker thread prepares the next one, of the next step too, while the present one is computed; on the CPU that would only
take time from the computing, and microbatches are prepared in turn. The result is the same: all draws are made in the
order of the microbatches, and a step that begins again in smaller ones moves its images as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from consilium_client.data.dataset import Dataset
from consilium_client.data.patients import Draw
from consilium_shared import task
from consilium_shared.study import Study
from consilium_shared.task import Augmentation
from dpsgd.device import onto
from dpsgd.isolation import ROWS, filled, one_thread, thread_beside


class Microbatch(NamedTuple):
    """Physical batch: the model's inputs, the targets, the patient of each row (as of ``RowOwners``), and the number of
    the record that each row shows. Inputs and targets may have padding below the records' rows."""

    inputs: tuple[torch.Tensor, ...]
    targets: tuple[torch.Tensor, ...]
    owners: torch.Tensor
    records: npt.NDArray[np.int64]


class Chunking(NamedTuple):
    """Split of a step into microbatches: of at most ``size`` records, but every patient whole. ``fixed``: each is
    padded to ``size`` rows, a power of two. A patient with more records has a microbatch of its own, padded to the next
    power of two: so nothing about a microbatch's shape comes from other patients. ``alone``: so has each patient."""

    size: int
    fixed: bool
    alone: bool = False


class _Chunk(NamedTuple):
    """The rows from ``start`` to ``end`` of a step's, as a microbatch of ``rows``."""

    start: int
    end: int
    rows: int


class _Transfer:
    """A microbatch that is being copied to the device."""

    def __init__(self, microbatch: Microbatch, device: torch.device) -> None:
        """Notes the copy's place in its stream; to be called by the thread that makes it."""
        self._microbatch, self._device = microbatch, device
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def here(self) -> Microbatch:
        """Microbatch for use by the caller's stream from here on."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._event)
            for tensor in (*self._microbatch.inputs, *self._microbatch.targets):
                tensor.record_stream(stream)  # else its memory were free for the next copy once it is dropped
        return self._microbatch


class Prefetch(NamedTuple):
    """Worker thread that prepares microbatches; ``then`` is called with the chunking after a batch's last one."""

    thread: Executor
    then: Callable[[Chunking], None]


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
        records: Dataset,
        draw: Draw,
        device: torch.device,
        generator: np.random.Generator,
        chunking: Chunking = Chunking(ROWS, fixed=True),
        prefetch: Prefetch | None = None,
    ) -> None:
        """``chunking``: by which augmentation is drawn, also where microbatches are then cut otherwise."""
        copies = study.training.augment_multiplicity
        self._records, self._owners = draw.records.repeat(copies), draw.owners.repeat(copies)
        self._source, self._device, self._prefetch = records, device, prefetch
        self._augmentation = task.of(study).augmentation(study)
        self._moves = () if self._augmentation is None else self._drawn(chunking, generator, self._augmentation)
        self._begun: tuple[_Chunk, Future[_Transfer]] | None = None

    def microbatches(self, size: int) -> Iterator[Microbatch]:
        """At most ``size`` records in each, but every patient whole: a microbatch has at least one patient."""
        return self._prepared(Chunking(size, fixed=False))

    def padded_microbatches(self, size: int) -> Iterator[Microbatch]:
        """``microbatches``, each padded (``Chunking``)."""
        return self._prepared(Chunking(size, fixed=True))

    def single_patients(self, size: int) -> list[Callable[[], Microbatch]]:
        """Functions that each prepare the padded microbatch of one patient, to be called in turn: where one breaks off,
        the others are still there."""
        return [partial(self._now, chunk) for chunk in self._chunks(Chunking(size, fixed=True, alone=True))]

    def _drawn(
        self, chunking: Chunking, generator: np.random.Generator, augmentation: Augmentation
    ) -> tuple[npt.NDArray[np.float64], ...]:
        """Augmentations of all records, drawn microbatch by microbatch; filling rows take their draws too."""
        parts = [
            tuple(each[: end - start] for each in augmentation.draw(rows, generator))
            for start, end, rows in self._chunks(chunking)
        ]
        return tuple(np.concatenate(each) for each in zip(*parts, strict=True))

    def _chunks(self, chunking: Chunking) -> list[_Chunk]:
        found: list[_Chunk] = []
        start, ends = 0, np.append(np.flatnonzero(np.diff(self._owners)) + 1, len(self._owners))
        while start < len(self._owners):
            fits = ends[(ends > start) & (ends <= start + chunking.size)]
            end = int(fits[-1] if len(fits) and not chunking.alone else ends[ends > start][0])
            count = end - start
            found.append(
                _Chunk(start, end, max(chunking.size, 1 << (count - 1).bit_length()) if chunking.fixed else count)
            )
            start = end
        return found

    def _prepared(self, chunking: Chunking) -> Iterator[Microbatch]:
        chunks, prefetch = self._chunks(chunking), self._prefetch
        for number, chunk in enumerate(chunks):
            microbatch = self._now(chunk)
            if prefetch is not None and number + 1 < len(chunks):
                self._begin(chunks[number + 1], prefetch)
            elif prefetch is not None:
                prefetch.then(chunking)
            yield microbatch
        if prefetch is not None and not chunks:
            prefetch.then(chunking)

    def _now(self, chunk: _Chunk) -> Microbatch:
        if self._prefetch is not None:
            return self._taken(chunk, self._prefetch)
        with one_thread():
            return self._microbatch(chunk)

    def begin(self, chunking: Chunking, prefetch: Prefetch) -> None:
        """Begin to prepare the first of these microbatches."""
        for chunk in self._chunks(chunking)[:1]:
            self._begin(chunk, prefetch)

    def _begin(self, chunk: _Chunk, prefetch: Prefetch) -> None:
        self._begun = chunk, prefetch.thread.submit(self._copied, chunk)

    def _taken(self, chunk: _Chunk, prefetch: Prefetch) -> Microbatch:
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] != chunk:  # the step begins again in other microbatches
            wait([begun[1]])
            begun = None
        future = prefetch.thread.submit(self._copied, chunk) if begun is None else begun[1]
        return future.result().here()

    def _copied(self, chunk: _Chunk) -> _Transfer:
        return _Transfer(self._microbatch(chunk), self._device)

    def _microbatch(self, chunk: _Chunk) -> Microbatch:
        start, end, rows = chunk
        drawn = self._records[start:end]
        inputs, targets = (
            tuple(filled(torch.from_numpy(each), rows) for each in part) for part in self._source.take(drawn)
        )
        if self._augmentation is not None:  # of rows that are filled up too: it rounds as a model's kernels do
            moves = tuple(_padded(each[start:end], rows) for each in self._moves)
            inputs, targets = self._augmentation.apply(inputs, targets, moves)
        return Microbatch(
            tuple(onto(each, self._device) for each in inputs),
            tuple(onto(each, self._device) for each in targets),
            torch.from_numpy(self._owners[start:end] - self._owners[start]),
            drawn,
        )


def _padded(moves: npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.float64]:
    """Moves ``[n, …]``, and none at all for the others of ``rows``."""
    return np.pad(moves, [(0, rows - len(moves)), *[(0, 0)] * (moves.ndim - 1)])


class Batches:
    """The batches of a round, one for each draw, to be gone through once inside of ``with``: at its end no thread is
    left."""

    def __init__(
        self,
        study: Study,
        records: Dataset,
        draws: Iterable[Draw],
        device: torch.device,
        generator: np.random.Generator,
        chunking: Chunking,
        prefetch: bool | None = None,
    ) -> None:
        """``generator``: of augmentation, for nobody else meanwhile; ``chunking``: as of ``Batch``; ``prefetch``:
        whether a worker thread prepares what comes next; None: where a GPU computes."""
        self._draws = iter(draws)
        self._about = study, records, device, generator, chunking
        self._thread: ThreadPoolExecutor | None = None
        self._coming: Future[Batch | None] | None = None
        if device.type == "cuda" if prefetch is None else prefetch:
            self._thread = thread_beside("microbatches")
            if device.type == "cuda":  # whose copies wait for nothing that is computed
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._thread.submit(torch.cuda.set_stream, stream).result()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *about: object) -> None:
        """Wait for the microbatch being prepared, and drop it."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Batch | None:
        coming, self._coming = self._coming, None
        return self._made() if coming is None else coming.result()

    def _made(self) -> Batch | None:
        draw, (study, records, device, generator, chunking) = next(self._draws, None), self._about
        if draw is None:
            return None
        prefetch = None if self._thread is None else Prefetch(self._thread, self._follow)
        return Batch(study, records, draw, device, generator, chunking, prefetch)

    def _follow(self, chunking: Chunking) -> None:
        """Begin to prepare the next batch, split into microbatches as the last one was."""
        if self._coming is None and self._thread is not None:
            self._coming = self._thread.submit(self._begun, chunking, self._thread)

    def _begun(self, chunking: Chunking, thread: ThreadPoolExecutor) -> Batch | None:
        batch = self._made()
        if batch is not None:
            batch.begin(chunking, Prefetch(thread, self._follow))
        return batch
