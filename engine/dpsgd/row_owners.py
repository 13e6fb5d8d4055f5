"""Row owners: map each row of a microbatch to its patient, and average a patient's rows into one gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd.device import onto
from dpsgd.isolation import filled


class RowOwners:
    """Patient of each row of a microbatch."""

    def __init__(
        self, owners: Tensor, device: torch.device, batch: int | None = None, limit: int | None = None
    ) -> None:
        """A patient's gradient is the mean of its rows'.

        Args:
            owners: int64 ``[n]`` on the CPU: 0, 1, … without gaps, in order; the first n rows' patients.
            device: where the rows are.
            batch: rows in all; what is below the first n is filling and counts for nothing.
            limit: most rows that a patient may have, by the study and not by who was drawn; None: all of the batch.

        Raises:
            RuntimeError: a patient has more.
        """
        self.rows = len(owners)
        self.batch = self.rows if batch is None else batch
        self.limit = self.batch if limit is None else limit
        numbers = torch.bincount(owners)
        if len(numbers) and int(numbers.max()) > self.limit:
            raise RuntimeError(f"a patient has {int(numbers.max())} rows in a step, and the study allows {self.limit}")
        self.patients = len(numbers)
        self.grouped = self.patients != self.rows
        self.most = int(numbers.max()) if self.grouped else 1
        """Most rows of one patient."""
        starts = torch.cumsum(numbers, 0) - numbers
        slots = owners * self.most + torch.arange(len(owners)) - starts[owners]
        self.patient_of = onto(owners, device)
        self._weights, self._slots = onto((1.0 / numbers.double())[owners], device), onto(slots, device)

    def mean(self, rows: Tensor) -> Tensor:
        """Rows ``[B, n]`` as patients ``[P, n]``."""
        rows = rows[: self.rows].to(at_least_float32(rows))
        if not self.grouped:
            return rows
        sums = rows.new_zeros((self.patients, rows.shape[1]))
        return sums.index_add_(0, self.patient_of, rows * self._weights[:, None].to(rows.dtype))

    def without_filling(self, rows: Tensor) -> Tensor:
        """Rows ``[B, T, …]`` without filling: of grouped rows those that are left, ``[n, T, …]``; else with zeros in
        its place, ``[B, T, …]``, so that shapes do not depend on how many there are."""
        if self.grouped:
            return rows[: self.rows]
        return rows if len(rows) == self.rows else filled(rows[: self.rows], len(rows))

    def weighted(self, deltas: Tensor) -> Tensor:
        """``kept`` deltas ``[B, T, …]`` such that a patient's gradient is the sum over its rows."""
        deltas = self.without_filling(deltas)
        return deltas.double() * self._weights.view(-1, *[1] * (deltas.dim() - 1)) if self.grouped else deltas

    def by_patient(self, rows: Tensor) -> Tensor:
        """Rows ``[n, T, …]`` of a patient as further applications of the same weight: ``[P, R·T, …]``."""
        if not self.grouped:
            return rows
        slots = rows.new_zeros((self.patients * self.most, *rows.shape[1:]))
        slots[self._slots] = rows
        return slots.view(self.patients, self.most * rows.shape[1], rows.shape[2])

    def to_rows(self, patients: Tensor, rows: int) -> Tensor:
        """Numbers of patients ``[P]`` as of the ``rows`` of ``without_filling``; 0 for filling."""
        if self.grouped:
            return patients[self.patient_of]
        return patients if rows == self.rows else filled(patients, rows)


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Never less than float32."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32
