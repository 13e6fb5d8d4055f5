"""What one backward pass leaves of every layer: enough for each patient's gradient norm, and then for the clipped sum.

The gradient of one sample at a weight that is applied T times is Σ_t δ_t a_tᵀ, of what came in (a) and the gradient at
what went out (δ). From those alone come its norm (Goodfellow 2015; Li et al. 2022, "ghost norm"; Bu et al. 2022 for
convolutions) and, once the clipping factors are known, the sum over samples Σ_i c_i Σ_t δ_it a_itᵀ as one product (Bu
et al. 2023, "book-keeping"). So one backward pass is enough, it forms no gradient of weights, and only where it
is cheaper is a sample's gradient formed.

**Why the norms may be trusted.** Three kinds of entry are kept:

* rows: a sample's gradient, formed in the model's own precision from this sample alone. The rows are what is summed, so
  rounding in forming them does not matter. Norms are taken in pieces of ``_SEGMENT`` numbers, whose squares are added
  in float32 (an error below 2^-20 of the norm, of which ``SLACK`` has room) and over pieces in float64.
* products: a and δ as they were, and all arithmetic in float64, where the products of float32 are exact. With a
  patient's reach r = Σ_t ‖a_t‖‖δ_t‖, which bounds what cancels, the Gram sum Σ_st (a_s·a_t)(δ_s·δ_t) is below the true
  squared norm by at most γ·r², γ = (2T + p + d) · 2^-52 (Higham 2002, section 3.1), which is added. Where so much
  cancels that rounding could matter, it is this that makes the norm too large, never too small.
* scattered: as rows, of an embedding, where most of a row is zero.

**Why the sum may be trusted.** A sum in floating point depends on all its terms. In float64 one of K terms is off by at
most K · 2^-53 · Σ_i c_i·r_i (r_i of all layers: their root sum of squares; of rows, the norm); and where patients have
several rows, the shape in which one's Gram sum is taken comes from the others too, which can shift its factor by γ·(r_i
/ norm)². A patient's factor is such that c_i·r_i never exceeds ``REACH`` times the bound, and K stays below ``_TERMS``.
``ERROR`` is what that comes to; ``lattice.py`` has it in the sensitivity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium_client.training.rows import filled

SLACK = 1.0 + 1e-6
"""Norms are taken as so much larger than they come out."""

REACH = 2.0**6
"""Most that a clipped patient's reach may be, in bounds."""

_TERMS = 2**15
"""Most terms of one coordinate of a sum that is taken at once."""

ERROR = 2.0**-26
"""By how much one more patient can shift the rounding of the sum of all others, in bounds, for each patient that is in
it: by 2 · ``_TERMS`` · 2^-53 · ``REACH`` the terms', by γ · ``REACH``² its factor (γ up to 2^-39), and by 2^-53 for
each physical batch (of up to 2^20) when their sums are added."""

_SEGMENT = 32
_ULP = 2.0**-52

_COLUMNS = {"cpu": 2**10, "cuda": 2**20}
"""Numbers of each row computed at a time: what fits a processor's cache, what fills an accelerator."""

_FORMED, _FORMING, _SUMMING, _GRAM = 2.2, 1 / 60, 0.045, 0.13
"""Nanoseconds for each number of a gradient on one core of a 2020s server processor: to have it formed, norm and sum
included; for each application more to form it, or to do without; and for each multiplication in a Gram matrix."""


def forms_rows(rows: int, steps: int, outputs: int, inputs: int) -> bool:
    """Whether forming each row's gradient ``[p, d]`` of T applications is cheaper than doing without.

    From sizes alone, never by trying: what is computed must be the same in every run.
    """
    if rows * steps > _TERMS:
        return True
    numbers = outputs * inputs
    formed = numbers * (_FORMED + steps * _FORMING)
    return formed < numbers * steps * _SUMMING + steps * steps * (outputs + inputs) * _GRAM


class Owners:
    """Whose each row of a physical batch is."""

    def __init__(self, owners: Tensor, device: torch.device) -> None:
        """``owners``: int64 ``[n]`` on the CPU: 0, 1, … without gaps, in order; the first n rows' patients. What is
        below is filling and counts for nothing. A patient's gradient is the mean of its rows'."""
        self.rows = len(owners)
        numbers = torch.bincount(owners)
        self.patients = len(numbers)
        self.grouped = self.patients != self.rows
        self.most = int(numbers.max()) if self.grouped else 1
        """Most rows of one patient."""
        starts = torch.cumsum(numbers, 0) - numbers
        slots = owners * self.most + torch.arange(len(owners)) - starts[owners]
        self.of = owners.to(device)
        self._weights, self._slots = (1.0 / numbers.double())[owners].to(device), slots.to(device)

    def mean(self, rows: Tensor) -> Tensor:
        """Rows ``[B, n]`` as patients ``[P, n]``."""
        rows = rows[: self.rows].to(_wide(rows))
        if not self.grouped:
            return rows
        sums = rows.new_zeros((self.patients, rows.shape[1]))
        return sums.index_add_(0, self.of, rows * self._weights[:, None].to(rows.dtype))

    def kept(self, rows: Tensor) -> Tensor:
        """Rows ``[B, T, …]`` without filling: of grouped rows those that are left, ``[n, T, …]``; else with zeros in
        its place, ``[B, T, …]``, so that shapes do not depend on how many there are."""
        if self.grouped:
            return rows[: self.rows]
        return rows if len(rows) == self.rows else filled(rows[: self.rows], len(rows))

    def weighted(self, deltas: Tensor) -> Tensor:
        """``kept`` deltas ``[B, T, p]`` such that a patient's gradient is the sum over its rows."""
        deltas = self.kept(deltas)
        return deltas.double() * self._weights[:, None, None] if self.grouped else deltas

    def beside(self, rows: Tensor) -> Tensor:
        """Rows ``[n, T, …]`` of a patient as further applications of the same weight: ``[P, R·T, …]``."""
        if not self.grouped:
            return rows
        slots = rows.new_zeros((self.patients * self.most, *rows.shape[1:]))
        slots[self._slots] = rows
        return slots.view(self.patients, self.most * rows.shape[1], rows.shape[2])

    def each(self, patients: Tensor, rows: int) -> Tensor:
        """Numbers of patients ``[P]`` as of the ``rows`` that were ``kept``; 0 for filling."""
        if self.grouped:
            return patients[self.of]
        return patients if rows == self.rows else filled(patients, rows)


class Tape:
    """Entries of one backward pass over one physical batch; ``open`` begins the next."""

    def __init__(self) -> None:
        self._owners: Owners | None = None
        self._entries: list[_Entry] = []
        self._chosen: list[_Rows] = []

    def open(self, owners: Owners) -> None:
        """Forget everything, and record what comes."""
        self._entries, self._chosen, self._owners = [], [], owners

    @property
    def owners(self) -> Owners:
        """Of the physical batch. Raises RuntimeError where none is open."""
        if self._owners is None:
            raise RuntimeError("no physical batch is open: its gradients were used already, or were never asked for")
        return self._owners

    def close(self) -> None:
        """Forget everything: what was used is not used twice."""
        self._entries, self._chosen, self._owners = [], [], None

    @property
    def empty(self) -> bool:
        """Whether no layer has left anything."""
        return not self._entries

    # -- what layers leave

    def rows(self, parameter: Tensor, gradients: Tensor) -> None:
        """Per-sample gradients ``[B, *parameter.shape]``."""
        if parameter.requires_grad and self.owners.rows:
            self._entries.append(_Rows((parameter,), self.owners.mean(gradients.flatten(1))))

    def product(self, weights: tuple[Tensor, ...], inputs: Tensor, deltas: Tensor) -> None:
        """Gradients deltas[i]ᵀ inputs[i] of inputs ``[B, T, d]`` and deltas ``[B, T, p]``; the columns of ``[p, d]``
        belong to the weights one after the other."""
        if not self.owners.rows:
            return
        widths = [weight.numel() // deltas.shape[2] for weight in weights]
        if not all(weight.requires_grad for weight in weights):
            parts = zip(weights, torch.split(inputs, widths, dim=2), strict=True)
            kept = [(weight, part) for weight, part in parts if weight.requires_grad]
            if not kept:
                return
            weights, inputs = tuple(weight for weight, _ in kept), torch.cat([part for _, part in kept], dim=2)
        if forms_rows(len(deltas), deltas.shape[1], deltas.shape[2], inputs.shape[2]):
            formed = torch.bmm(deltas.transpose(1, 2), inputs).flatten(1)
            self._entries.append(_Rows(weights, self.owners.mean(formed), deltas.shape[2]))
        else:
            self.factored(weights, inputs, deltas)

    def factored(self, weights: tuple[Tensor, ...], inputs: Tensor, deltas: Tensor) -> None:
        """``product`` of trainable weights where the caller knows that it is cheaper not to form any gradient."""
        if self.owners.rows:
            self._entries.append(_Product(weights, self.owners.kept(inputs), self.owners.weighted(deltas), self.owners))

    def scattered(self, parameter: Tensor, places: Tensor, gradients: Tensor, skipped: int | None) -> None:
        """Gradients ``[B, T, e]`` at the rows ``places`` int64 ``[B, T]`` of a parameter ``[V, e]``; what is at the row
        ``skipped`` is none."""
        if not parameter.requires_grad or not self.owners.rows:
            return
        owners, entries = self.owners, parameter.shape[0]
        places, gradients = places[: owners.rows], owners.weighted(gradients)[: owners.rows]
        unique, inverse = torch.unique((owners.of[:, None] * entries + places).flatten(), return_inverse=True)
        values = gradients.new_zeros((len(unique), parameter.shape[1]), dtype=_wide(gradients))
        values.index_add_(0, inverse, gradients.flatten(0, 1).to(values.dtype))
        at, patients = unique % entries, torch.div(unique, entries, rounding_mode="floor")
        if skipped is not None:
            values.masked_fill_((at == skipped)[:, None], 0.0)
        self._entries.append(_Scattered((parameter,), values, patients, at, owners.patients))

    def replace(self, rows: Tensor, gradients: dict[Tensor, Tensor]) -> None:
        """Give some patients chosen gradients in place of their own, as an audit's canaries have.

        Args:
            rows: int64 ``[k]``, all rows of each such patient.
            gradients: ``[n, numel]`` for every parameter, zero in all other rows; filling has none.
        """
        patients = self.owners.of[rows]
        for entry in self._entries:
            entry.clear(patients)
        self._chosen = [_Rows((parameter,), self.owners.mean(values)) for parameter, values in gradients.items()]

    # -- what comes of it

    @torch.no_grad()
    def factors(self, bound: float) -> Tensor:
        """For each of P patients the factor in [0, 1] that brings its gradient to norm ``bound`` or less: float64
        ``[P]``; for one that has a number that is not finite, 0."""
        self._merge()
        squares = reaches = torch.zeros((), dtype=torch.float64)
        for entry in [*self._entries, *self._chosen]:
            square, reach = entry.squares()
            squares, reaches = squares + square, reaches + reach
        factors = torch.minimum(bound / (squares.sqrt() * SLACK), REACH * bound / reaches.sqrt()).clamp(max=1.0)
        return torch.where(torch.isfinite(squares) & torch.isfinite(reaches), factors, torch.zeros_like(factors))

    @torch.no_grad()
    def add_up(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        """Add the patients' gradients, each times its factor, to ``totals``: flat float64 ``[numel]`` by parameter."""
        dropped = factors == 0
        clean = factors.device.type == "cpu" and not bool(dropped.any())
        for entry in [*self._entries, *self._chosen]:
            if not clean:
                entry.drop(dropped)
            entry.add_up(factors, totals)

    @torch.no_grad()
    def gradients(self) -> dict[Tensor, Tensor]:
        """Every patient's gradient, formed: float64 ``[P, numel]`` by parameter, for tests of a few samples."""
        self._merge()
        found: dict[Tensor, Tensor] = {}
        for entry in [*self._entries, *self._chosen]:
            for parameter, part in zip(entry.weights, entry.formed(), strict=True):
                found[parameter] = part.double() + found.get(parameter, 0.0)
        return found

    def _merge(self) -> None:
        """Entries of one parameter become one: a sample's gradient at a tied weight is the sum of them."""
        users: dict[Tensor, list[_Entry]] = {}
        for entry in self._entries:
            for weight in entry.weights:
                users.setdefault(weight, []).append(entry)
        if all(len(each) == 1 for each in users.values()):
            return
        shared = {id(entry) for each in users.values() if len(each) > 1 for entry in each}
        alone = [entry for entry in self._entries if id(entry) not in shared]
        formed: dict[Tensor, Tensor] = {}
        for entry in self._entries:
            if id(entry) in shared:
                for weight, part in zip(entry.weights, entry.formed(), strict=True):
                    formed[weight] = part if weight not in formed else formed[weight] + part
        self._entries = [*alone, *(_Rows((weight,), part) for weight, part in formed.items())]


@dataclass
class _Rows:
    """Gradients of patients ``[P, n]``: of one parameter, or of several that are columns of ``[p, d]``."""

    weights: tuple[Tensor, ...]
    values: Tensor
    outputs: int = 1

    def squares(self) -> tuple[Tensor, Tensor]:
        found = _row_squares(self.values)
        return found, found

    def clear(self, patients: Tensor) -> None:
        self.values[patients] = 0.0

    def drop(self, patients: Tensor) -> None:
        self.values.masked_fill_(patients[:, None], 0.0)

    def add_up(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        if len(self.weights) == 1:
            return _add_rows(totals[self.weights[0]], self.values, factors)
        total = torch.zeros(self.values.shape[1], dtype=torch.float64, device=self.values.device)
        _add_rows(total, self.values, factors)
        _add_columns(totals, self.weights, total.view(self.outputs, -1))

    def formed(self) -> list[Tensor]:
        return _cut(self.weights, self.values.view(len(self.values), self.outputs, -1))


@dataclass
class _Product:
    """Inputs ``[n, T, d]`` and deltas ``[n, T, p]`` of n rows."""

    weights: tuple[Tensor, ...]
    inputs: Tensor
    deltas: Tensor
    owners: Owners

    def squares(self) -> tuple[Tensor, Tensor]:
        inputs, deltas = self.owners.beside(self.inputs.double()), self.owners.beside(self.deltas.double())
        steps, patients = inputs.shape[1], self.owners.patients
        reach = (inputs.square().sum(2) * deltas.square().sum(2)).sqrt().sum(1).square()[:patients]
        if steps == 1:
            return reach, reach
        together = torch.bmm(inputs, inputs.transpose(1, 2)).mul_(torch.bmm(deltas, deltas.transpose(1, 2)))
        error = (2 * steps + inputs.shape[2] + deltas.shape[2]) * _ULP
        return together.sum(2).sum(1)[:patients].clamp_(min=0.0) + error * reach, reach

    def clear(self, patients: Tensor) -> None:
        chosen = torch.zeros(self.owners.patients, dtype=torch.bool, device=patients.device)
        chosen[patients] = True
        self.drop(chosen)

    def drop(self, patients: Tensor) -> None:
        self._keep(self.owners.each(~patients, len(self.inputs)))

    def _keep(self, rows: Tensor) -> None:
        shape = (-1, 1, 1)
        nothing = self.inputs.new_zeros(())
        self.inputs = torch.where(rows.view(shape), self.inputs, nothing)
        self.deltas = torch.where(rows.view(shape), self.deltas, nothing.to(self.deltas.dtype))

    def add_up(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        deltas = (self.deltas.double() * self.owners.each(factors, len(self.deltas))[:, None, None]).flatten(0, 1)
        inputs = self.inputs.double().flatten(0, 1)
        if len(self.weights) == 1:
            totals[self.weights[0]].view(deltas.shape[1], -1).addmm_(deltas.t(), inputs)
        else:
            _add_columns(totals, self.weights, deltas.t() @ inputs)

    def formed(self) -> list[Tensor]:
        inputs, deltas = self.owners.beside(self.inputs.double()), self.owners.beside(self.deltas.double())
        return _cut(self.weights, torch.bmm(deltas.transpose(1, 2), inputs)[: self.owners.patients])


@dataclass
class _Scattered:
    """Values ``[u, e]`` of patients ``[u]`` at the rows ``at`` ``[u]`` of a parameter ``[V, e]``."""

    weights: tuple[Tensor]
    values: Tensor
    owners: Tensor
    at: Tensor
    patients: int

    def squares(self) -> tuple[Tensor, Tensor]:
        found = torch.zeros(self.patients, dtype=torch.float64, device=self.values.device)
        found.index_add_(0, self.owners, _row_squares(self.values))
        return found, found

    def clear(self, patients: Tensor) -> None:
        self.values[torch.isin(self.owners, patients)] = 0.0

    def drop(self, patients: Tensor) -> None:
        self.values.masked_fill_(patients[self.owners, None], 0.0)

    def add_up(self, factors: Tensor, totals: dict[Tensor, Tensor]) -> None:
        (weight,) = self.weights
        totals[weight].view(weight.shape).index_add_(0, self.at, self.values.double() * factors[self.owners, None])

    def formed(self) -> list[Tensor]:
        (weight,) = self.weights
        found = self.values.new_zeros((self.patients, *weight.shape))
        found[self.owners, self.at] = self.values
        return [found.flatten(1)]


_Entry = _Rows | _Product | _Scattered


def _wide(tensor: Tensor) -> torch.dtype:
    """Never less than float32."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32


def _row_squares(rows: Tensor) -> Tensor:
    """Squared norm of each row of ``[P, n]``: float64 ``[P]``."""
    if rows.device.type != "cpu":
        return _wide_squares(rows)
    whole = rows.shape[1] // _SEGMENT * _SEGMENT
    segments = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, _SEGMENT), dim=2)
    segments = segments.double()
    found: Tensor = torch.linalg.vecdot(segments, segments)
    rest = rows[:, whole:].double()
    found += torch.linalg.vecdot(rest, rest)
    if torch.isfinite(found).all():
        return found
    return _wide_squares(rows)  # float32 had no room


def _wide_squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _add_rows(total: Tensor, rows: Tensor, factors: Tensor) -> None:
    """Add Σ_i factors[i] · rows[i] to a flat float64 ``[n]``."""
    width = _COLUMNS[rows.device.type]
    for start in range(0, rows.shape[1], width):
        total[start : start + width].addmv_(rows[:, start : start + width].double().t(), factors)


def _add_columns(totals: dict[Tensor, Tensor], weights: tuple[Tensor, ...], total: Tensor) -> None:
    """Add the columns of ``[p, d]`` by weight."""
    widths = [weight.numel() // total.shape[0] for weight in weights]
    for weight, part in zip(weights, torch.split(total, widths, dim=1), strict=True):
        totals[weight].view(part.shape).add_(part)


def _cut(weights: tuple[Tensor, ...], formed: Tensor) -> list[Tensor]:
    """The columns of ``[P, p, d]`` by weight, each ``[P, numel]``."""
    widths = [weight.numel() // formed.shape[1] for weight in weights]
    return [part.flatten(1) for part in torch.split(formed, widths, dim=2)]
