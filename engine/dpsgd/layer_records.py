"""Per-layer records of a backward pass; each computes per-patient squared gradient norms and adds its share of the
clipped sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpsgd.isolation import filled
from dpsgd.row_owners import RowOwners

_ULP = 2.0**-52

_WIDE, _WIDEST = 2**17, 2**26
"""Numbers that are float64 at a time: what fits a processor's cache, what fills an accelerator."""

_SHORT = 2**14
"""Rows of fewer numbers are taken several at a time."""

_BLOCK = 2**19
"""Numbers of a product computed at a time."""


@dataclass
class PerSampleGrad:
    """Formed gradients of patients ``[P, n]``: of one parameter, or of several that are columns of ``[p, d]``."""

    weights: tuple[Tensor, ...]
    values: Tensor
    outputs: int = 1

    def tensors_of(self, patient: int) -> list[Tensor]:
        """Tensors of one patient here."""
        return [self.values[patient]]

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the patients' gradients, and squared reaches: float64 ``[P]``."""
        found = row_squares(self.values)
        return found, found

    def clear(self, patients: Tensor) -> None:
        """Leave nothing of these patients: int64 ``[k]``."""
        self.values[patients] = 0.0

    def drop(self, patients: Tensor) -> None:
        """Leave nothing of those that are True: bool ``[P]``."""
        self.values.masked_fill_(patients[:, None], 0.0)

    def add_weighted_sum(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        """Add to the clipped sum, as ``Tape.add_weighted_sum`` has it."""
        if len(self.weights) == 1:
            return _add_rows(totals[self.weights[0]], self.values, factors)
        total = torch.zeros(self.values.shape[1], dtype=torch.float64, device=self.values.device)
        _add_rows(total, self.values, factors)
        _add_columns(totals, self.weights, total.view(self.outputs, -1))

    def per_sample(self) -> list[Tensor]:
        """The patients' gradients at each weight: ``[P, numel]``."""
        return _cut(self.weights, self.values.view(len(self.values), self.outputs, -1))


@dataclass
class OuterProduct:
    """Gradients that are not formed: inputs ``[n, T, d]`` and output gradients ``[n, T, p]`` of n rows."""

    weights: tuple[Tensor, ...]
    inputs: Tensor
    deltas: Tensor
    owners: RowOwners

    def tensors_of(self, patient: int) -> list[Tensor]:
        """Tensors of one patient here."""
        rows = torch.nonzero(self.owners.patient_of == patient).flatten()
        return [self.inputs[rows], self.deltas[rows]]

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the patients' gradients, and squared reaches: float64 ``[P]``."""
        inputs, deltas = self.owners.by_patient(self.inputs.double()), self.owners.by_patient(self.deltas.double())
        if inputs.shape[1] == 1:
            reach = (inputs.square().sum(2) * deltas.square().sum(2)).squeeze(1)[: self.owners.patients]
            return reach, reach
        grams = torch.bmm(inputs, inputs.transpose(1, 2)), torch.bmm(deltas, deltas.transpose(1, 2))
        return self._squares(*grams, inputs.shape[2] + deltas.shape[2])

    def _squares(self, grams: Tensor, others: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """``squares`` of the inputs' and the deltas' Gram matrices ``[P, T, T]``, which are sums of ``terms`` in all.
        The first is used up."""
        reach = (grams.diagonal(dim1=1, dim2=2) * others.diagonal(dim1=1, dim2=2)).sqrt().sum(1).square()
        square = grams.mul_(others).sum(2).sum(1).clamp_(min=0.0)
        reach, square = reach[: self.owners.patients], square[: self.owners.patients]
        return square + (2 * grams.shape[1] + terms) * _ULP * reach, reach

    def clear(self, patients: Tensor) -> None:
        """Leave nothing of these patients: int64 ``[k]``."""
        chosen = torch.zeros(self.owners.patients, dtype=torch.bool, device=patients.device)
        chosen[patients] = True
        self.drop(chosen)

    def drop(self, patients: Tensor) -> None:
        """Leave nothing of those that are True: bool ``[P]``."""
        self._keep(self.owners.to_rows(~patients, len(self.inputs)))

    def _keep(self, rows: Tensor) -> None:
        shape = (-1, *[1] * (self.inputs.dim() - 1))
        nothing = self.inputs.new_zeros(())
        self.inputs = torch.where(rows.view(shape), self.inputs, nothing)
        self.deltas = torch.where(rows.view(shape), self.deltas, nothing.to(self.deltas.dtype))

    def add_weighted_sum(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        """Add to the clipped sum, as ``Tape.add_weighted_sum`` has it."""
        deltas = (self.deltas.double() * self.owners.to_rows(factors, len(self.deltas))[:, None, None]).flatten(0, 1)
        inputs = self.inputs.double().flatten(0, 1)
        if len(self.weights) > 1:
            return _add_columns(totals, self.weights, deltas.t() @ inputs)
        total = totals[self.weights[0]].view(deltas.shape[1], -1)
        size = max(1, _BLOCK // inputs.shape[1])
        for start in range(0, len(total), size):  # each block's sum by itself, and then once to the total
            add(total[start : start + size], deltas[:, start : start + size].t() @ inputs)

    def per_sample(self) -> list[Tensor]:
        """The patients' gradients at each weight: ``[P, numel]``. Of as many rows as the physical batch has with its
        filling, so that the other rows have no influence on how a row is rounded (``isolation``)."""
        inputs, deltas = (filled(side.double(), self.owners.batch) for side in (self.inputs, self.deltas))
        rows = torch.bmm(deltas.transpose(1, 2), inputs)
        if self.owners.grouped:
            sums = rows.new_zeros((self.owners.patients, *rows.shape[1:]))
            rows = sums.index_add_(0, self.owners.patient_of, rows[: self.owners.rows])
        return _cut(self.weights, rows[: self.owners.patients])


@dataclass
class SparseGrad:
    """Sparse gradients of an embedding: values ``[u, e]`` of patients ``[u]`` at the rows ``at`` ``[u]`` of a parameter
    ``[V, e]``. Of several that one patient has at one row, all but one are zero."""

    weights: tuple[Tensor]
    values: Tensor
    owners: Tensor
    at: Tensor
    patients: int

    def tensors_of(self, patient: int) -> list[Tensor]:
        """Tensors of one patient here."""
        rows = self.owners == patient
        return [self.values[rows], self.at[rows]]

    def squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of the patients' gradients, and squared reaches: float64 ``[P]``."""
        found = torch.zeros(self.patients, dtype=torch.float64, device=self.values.device)
        found.index_add_(0, self.owners, row_squares(self.values))
        return found, found

    def clear(self, patients: Tensor) -> None:
        """Leave nothing of these patients: int64 ``[k]``."""
        self.values.masked_fill_(torch.isin(self.owners, patients)[:, None], 0.0)

    def drop(self, patients: Tensor) -> None:
        """Leave nothing of those that are True: bool ``[P]``."""
        self.values.masked_fill_(patients[self.owners, None], 0.0)

    def add_weighted_sum(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        """Add to the clipped sum, as ``Tape.add_weighted_sum`` has it."""
        (weight,) = self.weights
        total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        total.index_add_(0, self.at, self.values.double() * factors[self.owners, None])
        add(totals[weight], total.flatten())

    def per_sample(self) -> list[Tensor]:
        """The patients' gradients at each weight: ``[P, numel]``."""
        (weight,) = self.weights
        found = self.values.new_zeros((self.patients, *weight.shape))
        found.index_put_((self.owners, self.at), self.values, accumulate=True)
        return [found.flatten(1)]


LayerRecord = PerSampleGrad | OuterProduct | SparseGrad


def row_squares(rows: Tensor) -> Tensor:
    """Squared norm of each row of ``[P, n]``: float64 ``[P]``, of a row the same bits whatever the others hold."""
    if rows.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norms.square()
    many, numbers = _WIDE, rows.shape[1]
    wide = rows.new_empty(min(many, rows.numel()), dtype=torch.float64)
    if numbers < _SHORT:
        parts = torch.split(rows, many // max(1, numbers))
        return torch.cat([wide[: each.numel()].view(each.shape).copy_(each).square_().sum(1) for each in parts])
    found = []
    for row in rows:
        squares = rows.new_zeros((), dtype=torch.float64)
        for part in torch.split(row, many):
            here = wide[: len(part)].copy_(
                part
            )  # fixed buffer address: vectorised kernels take different paths depending on alignment
            squares += torch.dot(here, here)
        found.append(squares)
    return torch.stack(found)


def _add_rows(total: Tensor, rows: Tensor, factors: Tensor) -> None:
    """Add Σ_i factors[i] · rows[i] to a flat float64 ``[n]``."""
    width = max(1, (_WIDE if rows.device.type == "cpu" else _WIDEST) // len(rows))
    wide = rows.new_empty(min(width, rows.shape[1]) * len(rows), dtype=torch.float64)
    for part, into in zip(torch.split(rows, width, dim=1), torch.split(total, width), strict=True):
        add(into, torch.mv(wide[: part.numel()].view(part.shape).copy_(part).t(), factors))


def _add_columns(totals: dict[Tensor, Tensor], weights: tuple[Tensor, ...], total: Tensor) -> None:
    """Add the columns of ``[p, d]`` by weight."""
    widths = [weight.numel() // total.shape[0] for weight in weights]
    for weight, part in zip(weights, torch.split(total, widths, dim=1), strict=True):
        add(totals[weight].view(part.shape), part)


def add(total: Tensor, part: Tensor) -> None:
    """Add a float64 sum to a total, in the total's precision."""
    total.add_(part.to(total.dtype))


def _cut(weights: tuple[Tensor, ...], formed: Tensor) -> list[Tensor]:
    """The columns of ``[P, p, d]`` by weight, each ``[P, numel]``."""
    widths = [weight.numel() // formed.shape[1] for weight in weights]
    return [part.flatten(1) for part in torch.split(formed, widths, dim=2)]
