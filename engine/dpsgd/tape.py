"""Tape of a backward pass: records of every layer, from which come each patient's gradient norm and the clipped sum.

The gradient of one sample at a weight that is applied T times is Σ_t δ_t a_tᵀ, of what came in (a) and the gradient at
what went out (δ). From those alone come its norm (Goodfellow 2015; Li et al. 2022, "ghost norm"; Bu et al. 2022 for
convolutions) and, once the clipping factors are known, the sum over samples Σ_i c_i Σ_t δ_it a_itᵀ as one product (Bu
et al. 2023, "book-keeping"). So one backward pass is enough, it forms no gradient of weights, and only where it
is cheaper is a sample's gradient formed.

**Why the norms may be trusted.** There are three kinds of record (``layer_records``):

* ``PerSampleGrad``: a sample's gradient, formed in the model's own precision from this sample alone. These numbers are
  what is summed, so rounding in forming them does not matter. Norms of n numbers are taken in float64, where the
  squares of float32 are exact: an error below n · 2^-53 of the norm, for which ``SLACK`` has room.
* ``OuterProduct``: a and δ as they were (of convolutions the inputs, whose patches are the a_t); arithmetic in float64,
  where the products of float32 are exact. With a patient's reach r = Σ_t ‖a_t‖‖δ_t‖, which bounds what cancels, the
  Gram sum Σ_st (a_s·a_t)(δ_s·δ_t) is below the true squared norm by at most γ·r², γ = (2T + p + d) · 2^-52 (Higham
  2002, section 3.1; twice what any order of the sums needs, which also covers the rounding error of r itself, computed
  from the Gram matrices' diagonals). γ·r² is added to the squared norm: where so much cancels that rounding could
  matter, the norm comes out too large, never too small.
* ``SparseGrad``: a sample's gradient at an embedding, only the rows that were looked up. Padding, which keeps shapes
  independent of the data, is zero: adding it is exact.

**Why the sum may be trusted.** A sum in floating point depends on all its terms. In float64 one of K terms is off by at
most K · 2^-53 · Σ_i c_i·r_i (r_i of all layers: their root sum of squares; of rows, the norm); and where patients have
several rows, the shape in which one's Gram sum is taken comes from the others too, which can shift its factor by γ·(r_i
/ norm)². A patient's factor is such that c_i·r_i never exceeds ``REACH`` times the bound, and K stays below ``_TERMS``.
``ERROR`` is what that comes to; ``lattice.py`` has it in the sensitivity. The kind of record is chosen from layer sizes
and study parameters only (``Tape.materializes``), never from the sampled data, because clipping factors differ between
kinds.

In this file a and δ are a layer's inputs and output gradients, T the number of times that its weight is applied to a
sample, p and d its outputs and inputs, r a patient's reach, c its clipping factor, K a number of terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dpsgd.isolation import ROWS
from dpsgd.layer_records import LayerRecord, OuterProduct, PerSampleGrad, SparseGrad
from dpsgd.patches import ConvolutionRecord, Geometry
from dpsgd.row_owners import RowOwners, at_least_float32
from dpsgd.row_randomness import RowRandomness
from dpsgd.workspace import Workspace

MARKS = "marks"
"""Name of the total of the patients' marks, beside those of the parameters (``adaptive``)."""

Turn = Callable[[Iterable[object]], AbstractContextManager[None]]
"""Context in which something may be added to these totals: at once, or after others (``side_by_side``)."""


def at_once(totals: Iterable[object]) -> AbstractContextManager[None]:
    """``Turn`` of whoever adds alone."""
    del totals
    return nullcontext()


SLACK = 1.0 + 1e-6
"""Factor by which computed norms are enlarged, so that none is too small."""

REACH = 2.0**6
"""Upper limit of a clipped patient's reach, in multiples of the bound."""

_TERMS, _DIMENSIONS = 2**15, 2**13
"""Upper limits assumed by the error bound: number of terms that are accumulated in one float64 sum; 2T + p + d of a
Gram matrix whose shape depends on several patients."""

ERROR = 2.0**-26
"""Shift of the rounding of the sum of all others by one more patient, in multiples of the bound, for each patient in
the sum: by 2 · ``_TERMS`` · 2^-53 · ``REACH`` the terms', by γ · ``REACH``² its factor (γ up to ``_DIMENSIONS`` ·
2^-52), and by 2^-53 for each physical batch (of up to 2^20) when their sums are added."""

_FORMED, _FORMING, _SUMMING, _GRAM = 2.2, 1 / 60, 0.045, 0.13
"""Cost model, in nanoseconds for each number on one core of a 2020s server processor: ``_FORMED`` to form a gradient,
norm and sum included; ``_FORMING`` more for each application of the weight when forming; ``_SUMMING`` for each
application otherwise; ``_GRAM`` for each multiplication in a Gram matrix."""


def materializing_is_cheaper(
    rows: int, steps: int, outputs: int, inputs: int, cost_factored: float | None = None
) -> bool:
    """Compare the cost of forming each row's gradient ``[p, d]`` of T applications with that of keeping the factors.

    ``cost_factored``: nanoseconds for each row without forming; None: what Gram matrices and products of ``[T, p]`` and
    ``[T, d]`` take.

    From sizes alone, never by trying: what is computed must be the same in every run.
    """
    if rows * steps > _TERMS:
        return True
    numbers = outputs * inputs
    formed = numbers * (_FORMED + steps * _FORMING)
    if cost_factored is None:
        cost_factored = numbers * steps * _SUMMING + steps * steps * (outputs + inputs) * _GRAM
    return formed < cost_factored


class Tape:
    """Records of one backward pass over one microbatch; ``open`` begins the next."""

    def __init__(self) -> None:
        self._owners: RowOwners | None = None
        self._records: list[LayerRecord] = []
        self._chosen: list[PerSampleGrad] = []
        self._randomness: RowRandomness | None = None
        self._workspace = Workspace()

    def open(self, owners: RowOwners, seeds: Tensor | None = None) -> None:
        """Forget everything, and record what comes.

        Args:
            owners: patients of the batch's rows.
            seeds: int64 ``[B]`` on the CPU, for layers that draw at random: each row's own, wherever the row stands.
        """
        self._records, self._chosen, self._owners = [], [], owners
        self._randomness = None if seeds is None else RowRandomness(seeds)
        self._workspace.reset()

    @property
    def owners(self) -> RowOwners:
        """Patients of the physical batch's rows. Raises RuntimeError where none is open."""
        if self._owners is None:
            raise RuntimeError("no physical batch is open: its gradients were used already, or were never asked for")
        return self._owners

    def dropout(
        self, inputs: Tensor, probability: float, whole_from: int | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Inputs ``[B, …]`` with numbers set to 0 at random, and the others divided by what share is left.

        Args:
            inputs: the first dimension is the batch.
            probability: with which a number is dropped.
            whole_from: dimensions from here on are dropped together; None: each number by itself.
            rows: int64 ``[B]``, the row of the batch that each of ``inputs`` is; None: in order.

        Raises:
            RuntimeError: rows have no seeds.
        """
        if probability == 0.0:
            return inputs
        if self._randomness is None:
            raise RuntimeError("a layer draws at random, and the rows of this batch have no seeds (Tape.open)")
        shape = tuple(inputs.shape[1:whole_from])
        kept = self._randomness.kept(shape, 1.0 - probability, inputs.device)
        kept = kept if rows is None else kept[rows]
        scale = 0.0 if probability == 1.0 else 1.0 / (1.0 - probability)
        return inputs * (kept.to(inputs.dtype) * scale).view(*kept.shape, *[1] * (inputs.dim() - kept.dim()))

    def close(self) -> None:
        """Forget everything: what was used is not used twice."""
        self._records, self._chosen, self._owners = [], [], None

    @property
    def opened(self) -> bool:
        """True while a physical batch is open."""
        return self._owners is not None

    @property
    def empty(self) -> bool:
        """True where no layer has recorded anything."""
        return not self._records

    def materializes(self, steps: int, outputs: int, inputs: int, cost_factored: float | None = None) -> bool:
        """True where per-sample gradients are formed: it is cheaper, or a Gram matrix would be too large.

        The forms are not clipped alike (of a product the reach is held too), so nothing of the choice may come from who
        was drawn: it is made for the most rows that a patient of the study may have, and the largest piece. (Not so in
        ``opacus_mode``, whose batches have as many rows as were drawn, nor of packed series, whose T is the longest's;
        no study has either.)
        """
        limit = self.owners.limit
        large = limit > 1 and 2 * steps * limit + outputs + inputs > _DIMENSIONS
        rows = max(self.owners.batch, 2 * ROWS, 1 << (limit - 1).bit_length())
        return large or materializing_is_cheaper(rows, steps, outputs, inputs, cost_factored)

    def _has_rows(self, left: Tensor) -> bool:
        """True where any row counts. Raises RuntimeError where a layer's record has not one row for each sample."""
        if len(left) != self.owners.batch:
            raise RuntimeError(
                f"a layer's gradients have {len(left)} rows and the batch has {self.owners.batch}: the first dimension "
                "of what a layer takes and gives must be the batch"
            )
        return self.owners.rows > 0

    # -- recording, by layers

    def record_gradients(self, parameter: Tensor, gradients: Tensor) -> None:
        """Per-sample gradients ``[B, *parameter.shape]``."""
        if self._has_rows(gradients) and parameter.requires_grad:
            self._records.append(PerSampleGrad((parameter,), self.owners.mean(gradients.flatten(1))))

    def record_outer_product(self, weights: tuple[Tensor, ...], inputs: Tensor, deltas: Tensor) -> None:
        """Gradients deltas[i]ᵀ inputs[i] of inputs ``[B, T, d]`` and deltas ``[B, T, p]``; the columns of ``[p, d]``
        belong to the weights one after the other."""
        if not self._has_rows(inputs) or not self._has_rows(deltas):
            return
        widths = [weight.numel() // deltas.shape[2] for weight in weights]
        if not all(weight.requires_grad for weight in weights):
            parts = zip(weights, torch.split(inputs, widths, dim=2), strict=True)
            kept = [(weight, part) for weight, part in parts if weight.requires_grad]
            if not kept:
                return
            weights, inputs = tuple(weight for weight, _ in kept), torch.cat([part for _, part in kept], dim=2)
        if self.materializes(deltas.shape[1], deltas.shape[2], inputs.shape[2]):
            formed = self._workspace.take(inputs, (len(inputs), deltas.shape[2], inputs.shape[2]))
            torch.bmm(deltas.transpose(1, 2), inputs, out=formed)
            self._records.append(PerSampleGrad(weights, self.owners.mean(formed.flatten(1)), deltas.shape[2]))
        else:
            self.record_factors(weights, inputs, deltas)

    def record_factors(self, weights: tuple[Tensor, ...], inputs: Tensor, deltas: Tensor) -> None:
        """``product`` of trainable weights where the caller knows that it is cheaper not to form any gradient."""
        if self._has_rows(inputs) and self._has_rows(deltas):
            self._records.append(
                OuterProduct(weights, self.owners.without_filling(inputs), self.owners.weighted(deltas), self.owners)
            )

    def record_convolution(self, weight: Tensor, geometry: Geometry, inputs: Tensor, deltas: Tensor) -> None:
        """``factored`` of a convolution's weight ``[O, C, *kernel]``, inputs ``[B, C, …]`` and deltas ``[B, O, …]``."""
        if self._has_rows(inputs) and self._has_rows(deltas):
            kept = self.owners.without_filling(inputs), self.owners.weighted(deltas)
            self._records.append(ConvolutionRecord((weight,), *kept, self.owners, geometry))

    def record_sparse(self, parameter: Tensor, places: Tensor, gradients: Tensor, skipped: int | None) -> None:
        """Gradients ``[B, T, e]`` at the rows ``places`` int64 ``[B, T]`` of a parameter ``[V, e]``; what is at the row
        ``skipped`` is none."""
        if not self._has_rows(gradients) or not parameter.requires_grad:
            return
        owners, entries = self.owners, parameter.shape[0]
        # Always float64, so that a patient's precision cannot depend on whether another patient has several rows.
        places, gradients = places[: owners.rows], owners.weighted(gradients.double())[: owners.rows]
        # As many rows as were looked up, whichever they are: no shape waits for the device. What one patient has at one
        # place is in the first of its rows, and the others are zero.
        keys, order = torch.sort((owners.patient_of[:, None] * entries + places).flatten(), stable=True)
        values = gradients.new_zeros((len(keys), parameter.shape[1]), dtype=at_least_float32(gradients))
        values.index_add_(0, torch.searchsorted(keys, keys), gradients.flatten(0, 1)[order].to(values.dtype))
        at, patients = keys % entries, torch.div(keys, entries, rounding_mode="floor")
        if skipped is not None:
            values.masked_fill_((at == skipped)[:, None], 0.0)
        self._records.append(SparseGrad((parameter,), values, patients, at, owners.patients))

    def replace(self, rows: Tensor, gradients: dict[Tensor, Tensor]) -> None:
        """Give some patients chosen gradients in place of their own, as an audit's canaries have.

        Args:
            rows: int64 ``[k]``, all rows of each such patient.
            gradients: ``[n, numel]`` for every parameter, zero in all other rows; filling has none.
        """
        patients = self.owners.patient_of[rows]
        for record in self._records:
            record.clear(patients)
        self._chosen = [
            PerSampleGrad((parameter,), self.owners.mean(values)) for parameter, values in gradients.items()
        ]

    # -- norms, clipping factors, sums

    def tensors_of(self, patient: int) -> list[Tensor]:
        """Tensors recorded of one patient: its norm and its part of the sum are computed from these alone."""
        return [part for record in self._records for part in record.tensors_of(patient)]

    def factors(self, bound: float) -> Tensor:
        """For each of P patients the factor in [0, 1] that brings its gradient to norm ``bound`` or less: float64
        ``[P]``; for one that has a number that is not finite, 0."""
        return self.ratios(bound).clamp(max=1.0)

    @torch.no_grad()
    def ratios(self, bound: float) -> Tensor:
        """``factors`` before they are held to 1: above it the gradient is shorter than ``bound``; infinite where there
        is none."""
        self._merge()
        squares = reaches = torch.zeros((), dtype=torch.float64)
        for record in [*self._records, *self._chosen]:
            square, reach = record.squares()
            squares, reaches = squares + square, reaches + reach
        ratios = torch.minimum(bound / (squares.sqrt() * SLACK), REACH * bound / reaches.sqrt())
        return torch.where(torch.isfinite(squares) & torch.isfinite(reaches), ratios, torch.zeros_like(ratios))

    @torch.no_grad()
    def add_weighted_sum(self, factors: Tensor, totals: dict[Tensor, Tensor], turn: Turn = at_once) -> None:
        """Add the patients' gradients, each times its factor, to ``totals``: flat ``[numel]`` by parameter, in their
        ``turn``. Each record's sum is taken in float64 and added in its total's precision (float64 where a ``Lattice``
        holds, float32 in Opacus's mode), and then the record is forgotten."""
        dropped = factors == 0
        clean = factors.device.type == "cpu" and not bool(dropped.any())
        left = [*self._chosen[::-1], *self._records[::-1]]
        self._records, self._chosen = [], []
        while left:
            record = left.pop()
            if not clean:
                record.drop(dropped)
            with turn(record.weights):
                record.add_weighted_sum(factors, totals)

    @torch.no_grad()
    def gradients(self) -> dict[Tensor, Tensor]:
        """Every patient's gradient, formed: float64 ``[P, numel]`` by parameter, for tests of a few samples."""
        self._merge()
        found: dict[Tensor, Tensor] = {}
        for record in [*self._records, *self._chosen]:
            for parameter, part in zip(record.weights, record.per_sample(), strict=True):
                found[parameter] = part.double() + found.get(parameter, 0.0)
        return found

    def _merge(self) -> None:
        """Entries of one parameter become one: a sample's gradient at a tied weight is the sum of them, rows."""
        users: dict[Tensor, list[LayerRecord]] = {}
        for record in self._records:
            for weight in record.weights:
                users.setdefault(weight, []).append(record)
        if all(len(each) == 1 for each in users.values()):
            return
        shared = {id(record) for each in users.values() if len(each) > 1 for record in each}
        alone = [record for record in self._records if id(record) not in shared]
        formed: dict[Tensor, Tensor] = {}
        for record in self._records:
            if id(record) in shared:
                for weight, part in zip(record.weights, record.per_sample(), strict=True):
                    formed[weight] = part if weight not in formed else formed[weight] + part
        self._records = [*alone, *(PerSampleGrad((weight,), part) for weight, part in formed.items())]
