"""The records of a step as the physical batches in which they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from consilium_client.data.patients import Draw
from consilium_client.data.records import Records
from consilium_client.training import augmentation
from consilium_client.training.rows import filled, one_thread
from consilium_shared.study import Study


class Piece(NamedTuple):
    """A physical batch: the model's inputs, the classes, whose each row is (``owners.Owners``), and which record of all
    it shows. Inputs and classes may have rows of filling below those of the records."""

    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    owners: torch.Tensor
    records: npt.NDArray[np.int64]


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
    ) -> None:
        copies = study.training.augment_multiplicity
        drawn, owners = draw.records.repeat(copies), draw.owners.repeat(copies)
        self._inputs = torch.from_numpy(records.inputs[drawn])
        self._augmentation = generator if study.training.augment == "light" else None
        self._statics = None if records.statics is None else torch.from_numpy(records.statics[drawn])
        self._labels = torch.from_numpy(records.labels[drawn])
        self._owners, self._records = owners, drawn
        self._device = device

    def pieces(self, size: int) -> Iterator[Piece]:
        """At most ``size`` records in each, but every patient whole: a piece has at least one patient."""
        return (self._piece(start, end, end - start) for start, end in self._cuts(size))

    def fixed_pieces(self, size: int) -> Iterator[Piece]:
        """``pieces``, each filled up to ``size`` rows, a power of two. A patient with more records has a piece of its
        own, of the next power of two: so nothing about a piece's shape comes from other patients."""
        cuts = self._cuts(size)
        return (self._piece(start, end, max(size, 1 << (end - start - 1).bit_length())) for start, end in cuts)

    def _cuts(self, size: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        start, ends = 0, np.append(np.flatnonzero(np.diff(self._owners)) + 1, len(self._owners))
        while start < len(self._owners):
            fits = ends[(ends > start) & (ends <= start + size)]
            end = int(fits[-1] if len(fits) else ends[ends > start][0])
            found.append((start, end))
            start = end
        return found

    def _piece(self, start: int, end: int, rows: int) -> Piece:
        part = slice(start, end)
        inputs = [filled(self._inputs[part], rows)]
        if self._augmentation is not None:  # of rows that are filled up too: it rounds as a model's kernels do
            with one_thread():
                inputs = [augmentation.light(inputs[0], self._augmentation)]
        if self._statics is not None:
            inputs.append(filled(self._statics[part], rows))
        return Piece(
            tuple(each.to(self._device) for each in inputs),
            filled(self._labels[part], rows).to(self._device),
            torch.from_numpy(self._owners[part] - self._owners[start]),
            self._records[part],
        )
