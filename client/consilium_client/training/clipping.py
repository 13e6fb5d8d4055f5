"""Clip each patient's gradient, add the noise, scale: the private gradient of one step.

Opacus measures per-sample gradients and keeps the order of calls (``DPOptimizer``); its clipping and noise are replaced
where they fall short: a sample whose gradient is not finite would poison the step, norms in float32 come out up to 4e-5
too small, sums depend on the order in which they are added, and the noise generator is predictable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from opacus.optimizers import DPOptimizer

from consilium_client.training.lattice import PATIENTS, Lattice
from consilium_client.training.noise import Noise

_COLUMNS = {"cpu": 2**14, "cuda": 2**20}
"""Numbers of each row computed at a time: what fits a processor's cache, what fills an accelerator. Never chosen by
the number of rows, so that what is computed of one patient does not depend on how many others there are."""


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """A torch optimizer whose every step sees (Σ clipped gradients + N(0, (noise × bound)²)) / expected batch.

    One term of the sum is one patient: the mean gradient of its records in the step, clipped, on the ``lattice``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clipping_norm: float,
        noise_multiplier: float,
        expected_batch: int,
        noise: Noise,
        after: Callable[[], None] | None = None,
    ) -> None:
        """``after`` is called on each step when the private gradient stands in ``.grad``: post-processing.

        Raises:
            ConfigurationError: noise or bound beyond what the lattice takes.
        """
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        parameters = sum(p.numel() for p in self.params)
        self.lattice = Lattice.of(clipping_norm, noise_multiplier, parameters)
        self._noise = noise
        # The sum of the step under way, in whole steps of the lattice, flat.
        self._sum = torch.zeros(parameters, dtype=torch.float64, device=self.params[0].device)
        self._in_sum = 0
        self._owners: torch.Tensor | None = None
        if after is not None:
            self.attach_step_hook(lambda _: after())

    def accumulate(self, owners: torch.Tensor | None = None) -> None:
        """Clip the patients of one physical batch and keep their sum for the step that follows.

        Args:
            owners: int64 ``[B]``, whose each row of ``grad_sample`` is: 0, 1, … without gaps, in order. All rows of a
                patient are in one physical batch. None: every row is a patient of its own.
        """
        self._owners = owners
        self.signal_skip_step(True)
        self.step()
        self.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Add the noise, once, to what was accumulated (nothing, for an empty batch) and step."""
        self.accept_empty_batch()
        self.step()
        self.zero_grad(set_to_none=True)

    def accept_empty_batch(self) -> None:
        """Give every parameter the per-sample gradient of no samples."""
        for parameter in self.params:
            parameter.grad_sample = torch.zeros((0, *parameter.shape), dtype=parameter.dtype, device=parameter.device)

    def clip_and_accumulate(self) -> None:
        """Add every patient's gradient, clipped and rounded to the lattice; drop one that is not finite."""
        gradients = self.grad_samples  # raises when a parameter has none: no parameter escapes the norm
        for parameter in self.params:
            if hasattr(parameter.grad_sample, "_processed"):
                raise RuntimeError("a per-sample gradient was about to be used twice")
            parameter.grad_sample._processed = True
        owners, self._owners = self._owners, None
        patients = len(gradients[0]) if owners is None else _count(owners)
        self._in_sum += patients
        if self._in_sum > PATIENTS:
            raise RuntimeError(f"more than {PATIENTS} patients in one step: their sum would not be exact")
        if patients == 0:
            return
        factors = clipping_factors(gradients, self.lattice.row_bound, owners)
        dropped = torch.nonzero(factors == 0).flatten()
        scale = (factors / self.lattice.step).unsqueeze(1)
        for columns, rows in _patient_rows(gradients, owners, patients):
            rows.mul_(scale)
            if len(dropped):
                rows[dropped] = 0.0  # 0 × NaN would be NaN
            self._sum[columns] += rows.round_().sum(dim=0)

    def add_noise(self) -> None:
        """Set ``grad`` to the sum plus noise, and begin the next sum."""
        deviation = self.noise_multiplier * self.max_grad_norm
        if deviation > 0:
            self._noise.add_to(self._sum, deviation / self.lattice.step)
        total = self._sum.mul_(self.lattice.step).to(self.params[0].dtype)
        parts = torch.split(total, [p.numel() for p in self.params])
        for parameter, part in zip(self.params, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._sum.zero_()
        self._in_sum = 0


def clipping_factors(gradients: list[torch.Tensor], bound: float, owners: torch.Tensor | None = None) -> torch.Tensor:
    """For each of P patients the factor in [0, 1] that brings its gradient to norm ``bound`` or less: float64 ``[P]``.

    Args:
        gradients: one tensor ``[B, ...]`` for each parameter.
        bound: the L2 norm over all parameters together.
        owners: as for ``PrivateOptimizer.accumulate``; the gradient of a patient is the mean of its rows.

    A patient with any number that is not finite, in whichever of its records, gets 0.
    """
    patients = len(gradients[0]) if owners is None else _count(owners)
    squares = torch.zeros(patients, dtype=torch.float64, device=gradients[0].device)
    for _, rows in _patient_rows(gradients, owners, patients):
        squares += torch.linalg.vector_norm(rows, dim=1).square_()
    factors = (bound / squares.sqrt()).clamp(max=1.0)
    return torch.where(torch.isfinite(squares), factors, torch.zeros_like(factors))


def _count(owners: torch.Tensor) -> int:
    return int(owners[-1]) + 1 if len(owners) else 0


def _patient_rows(
    gradients: list[torch.Tensor], owners: torch.Tensor | None, patients: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The patients' mean gradients in float64, some columns at a time: where they stand in the sum, and ``[P, n]``.

    What was yielded is overwritten when the next one is asked for.
    """
    records, device = len(gradients[0]), gradients[0].device
    width = min(_COLUMNS[device.type], max(g[0].numel() if len(g) else 0 for g in gradients))
    kept = torch.empty(records * width, dtype=torch.float64, device=device)
    numbers = None if owners is None or patients == records else torch.bincount(owners).unsqueeze(1)
    offset = 0
    for gradient in gradients:
        flat = gradient.flatten(1)
        for start in range(0, flat.shape[1], width):
            part = flat[:, start : start + width]
            rows = kept[: part.numel()].view(part.shape).copy_(part)
            if owners is not None and numbers is not None:
                sums = torch.zeros((patients, part.shape[1]), dtype=torch.float64, device=device)
                rows = sums.index_add_(0, owners, rows).div_(numbers)
            yield slice(offset + start, offset + start + part.shape[1]), rows
        offset += flat.shape[1]
