"""Neighbour test: with the study's model on this machine, no record's result may depend on others, to the last bit.

What clipping and counts bound rests on it (``dpsgd/isolation.py``): a library's kernels may go by the number of rows,
by a row's place, by a matrix's address. MKL is told not to (``dpsgd/blas.py``). No other library can be told, so none
is trusted: on every machine, whatever it computes with, the study's model is run on invented records, each held against
itself alone, at other places and beside others. What was found is kept (``machine.py``).

The first weights are the study's own. The others are crafted: the last layer's are a hundred million times what they
were, and cancel, so that what is left of a logit is rounding alone, and the last bit of anything shows in everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from consilium_client.data.dataset import ArrayDataset, Dataset
from consilium_client.data.patients import Draw
from consilium_client.training import evaluation, invented
from consilium_client.training.microbatches import Batch, Chunking
from consilium_client.training.steps import accumulate
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.models.vector import load_vector, pack, to_vector
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.device import exact_arithmetic
from dpsgd.engines import Engine
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.tape import ERROR

_SCALE = 1e8
_BOUND = 1.0
_ALONE = 4
"""Patients tested where each has a microbatch alone."""

Vector = npt.NDArray[np.floating[Any]]


def dependence(study: Study, device: torch.device, engine: Engine, rows: int) -> str:
    """Dependence of a record on those beside it in microbatches of ``rows`` rows, in words; empty where there is none.

    Takes some eight passes of a microbatch. On one machine the result is always the same: all seeds are fixed.
    """
    data = _records(study, rows)
    for weights in _weights(study, data):
        found = _of_gradients(study, weights, data, device, engine, rows)
        found = found or _of_counts(study, weights, data, device, rows)
        if found:
            return found
    return ""


def _records(study: Study, rows: int) -> ArrayDataset:
    """A microbatch of patients with one record each, one of them of NaN and one of too large numbers; and
    where patients may have several, some who do."""
    copies = study.training.augment_multiplicity
    single = max(2, rows // copies) if rows > 1 else _ALONE
    several = [2, min(3, study.training.records_per_patient)] if study.training.records_per_patient > 1 else []
    data = invented.records(study, [1] * single + several)
    for numbers in data.inputs:
        if np.issubdtype(numbers.dtype, np.floating):
            numbers[single // 2] = np.nan
            numbers[single - 1] *= np.float32(1e30)
    return data


def _weights(study: Study, data: Dataset) -> Iterator[Vector]:
    model = build(study)
    yield to_vector(model)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not heads:  # such as a segmentation's, whose last layer is a convolution: its first weights alone
        return
    head = heads[-1]
    given: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model.eval()(*_inputs(data, 1))
        hook.remove()
        draw = torch.Generator().manual_seed(0)
        head.weight.copy_(torch.randn(head.weight.shape, generator=draw) * _SCALE)
        if head.bias is not None:
            first = given[0].flatten(0, -2)[0]
            head.bias.copy_(-(first.double() @ head.weight.double().t()))
    yield to_vector(model)


def _inputs(data: Dataset, count: int) -> list[Tensor]:
    return [torch.from_numpy(part) for part in data.take(np.arange(count)).inputs]


def _orders(count: int) -> list[npt.NDArray[np.int64]]:
    """Orders to compute patients in: all of them; two halves, so that each is at another place; and a few alone."""
    mixed = np.random.default_rng(0).permutation(count)
    first, second = mixed[: count // 2], mixed[count // 2 :]
    return [np.arange(count), first, second, second[:1]]


def _of_gradients(study: Study, weights: Vector, data: Dataset, device: torch.device, engine: Engine, rows: int) -> str:
    step, whole = _Step(study, weights, device, engine, rows), _orders(data.patient_count)
    seen, total = step(data, whole[0])
    sums = []
    for order in whole[1:]:
        found, part = step(data, order)
        if any(seen[patient] != left for patient, left in found.items()):
            return "a record's gradient depends on the records beside it"
        sums.append(part)
    moved = (sums[0] + sums[1] - total).norm()
    if not float(moved) <= data.patient_count * ERROR * _BOUND / step.unit + 2 * len(total) ** 0.5:
        return "the sum of some patients depends on the others by more than rounding"
    return ""


def _of_counts(study: Study, weights: Vector, data: Dataset, device: torch.device, rows: int) -> str:
    model, whole = pack(weights.astype(np.float32), study), _orders(len(data))
    found = evaluation.measured(model, study, data, device, whole[0], rows)
    for order in whole[1:]:
        if not np.array_equal(evaluation.measured(model, study, data, device, order, rows), found[order], True):
            return "a record's prediction depends on the records beside it"
    return ""


class _Step:
    """The private sum of some patients, again and again from the same weights."""

    def __init__(self, study: Study, weights: Vector, device: torch.device, engine: Engine, rows: int) -> None:
        model = build(study)
        load_vector(model, weights)
        self._study, self._device, self._rows = study, device, rows
        self._model = engines.wrap(model.to(device).train(), engine, study.training.precision)
        self._loss = task.of(study).loss(study, device)
        self._optimizer = PrivateOptimizer(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0),
            self._model.tape,
            clipping_norm=_BOUND,
            noise_multiplier=0.0,
            expected_batch=1,
            noise=Noise(bytes(32)),
        )
        self._limit = study.training.records_per_patient * study.training.augment_multiplicity
        self.unit = self._optimizer.lattice.step

    def __call__(self, data: Dataset, patients: npt.NDArray[np.int64]) -> tuple[dict[int, bytes], Tensor]:
        """Recorded tensors of each patient, and the clipped sum in steps of the lattice."""
        seen: dict[int, bytes] = {}

        def see(records: npt.NDArray[np.int64]) -> None:
            of = data.patients[records]
            for number, patient in enumerate(of[np.sort(np.unique(of, return_index=True)[1])].tolist()):
                seen[patient] = _digest(self._model.tape.tensors_of(number))

        parts = [np.flatnonzero(data.patients == patient) for patient in patients]
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        drawn, same = Draw(np.concatenate(parts), owners), _OneMove()
        with exact_arithmetic():
            batch = Batch(self._study, data, drawn, self._device, same, Chunking(self._rows, fixed=True))  # type: ignore[arg-type]
            pieces = batch.padded_microbatches(self._rows)
            accumulate(self._model, self._optimizer, self._loss, pieces, see, self._limit)
            total = self._optimizer.summed()
            self._optimizer.forget()
        return seen, total.cpu()


class _OneMove:
    """Random generator that gives every image the same turn and shift."""

    def uniform(self, low: float, high: float, size: Any) -> Vector:
        """Stand-in for ``Generator.uniform``."""
        return np.full(size, low + 0.3 * (high - low))


def _digest(left: list[Tensor]) -> bytes:
    """Digest of numbers, equal for float32 and float64 of the same values, and for 0 and -0."""
    hashing = hashlib.blake2b()
    for tensor in left:
        numbers = torch.nan_to_num(tensor.detach(), nan=1.5e38, posinf=2.5e38, neginf=-2.5e38).cpu() + 0.0
        if numbers.dtype != torch.float64 or torch.equal(numbers.float().double(), numbers):
            numbers = numbers.float()
        hashing.update(numbers.contiguous().numpy().tobytes())
    return hashing.digest()
