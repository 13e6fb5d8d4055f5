"""Clip each patient's gradient, add the noise, scale: the private gradient of one step.

Opacus measures per-sample gradients and keeps the order of calls (``DPOptimizer``); its clipping and noise are replaced
where they fall short: a sample whose gradient is not finite would poison the step, norms in float32 come out up to 4e-5
too small, and the noise generator is predictable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from opacus.optimizers import DPOptimizer

from consilium_client.training.noise import Noise

_SLACK = 1.0 + 1e-6
"""Covers the rounding of the scaled float32 gradient, so that its true norm stays below the bound."""


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """A torch optimizer whose every step sees (Σ clipped gradients + N(0, (noise × bound)²)) / expected batch.

    One row of ``grad_sample`` is one patient, because a step draws at most one record of a patient.
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
        """``after`` is called on each step when the private gradient stands in ``.grad``: post-processing."""
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        self._noise = noise
        if after is not None:
            self.attach_step_hook(lambda _: after())

    def accumulate(self) -> None:
        """Clip the samples of one physical batch and keep their sum for the step that follows."""
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
        """Add to ``summed_grad`` every sample's gradient, scaled to norm at most the bound; drop what is not finite."""
        gradients = self.grad_samples  # raises when a parameter has none: no parameter escapes the norm
        factors = clipping_factors(gradients, self.max_grad_norm)
        for parameter, gradient in zip(self.params, gradients, strict=True):
            if hasattr(parameter.grad_sample, "_processed"):
                raise RuntimeError("a per-sample gradient was about to be used twice")
            rows = gradient.masked_fill(_over(factors == 0, gradient), 0.0)  # 0 × NaN would be NaN
            clipped = torch.einsum("i,i...", factors.to(rows.dtype), rows)
            parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad + clipped
            parameter.grad_sample._processed = True

    def add_noise(self) -> None:
        """Set ``grad`` to the sum plus noise. The noise is drawn and added in float64."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad.double()
            if deviation > 0:
                drawn = torch.from_numpy(self._noise.standard_normal(total.numel())).to(total.device)
                total = total + deviation * drawn.view_as(total)
            parameter.grad = total.to(parameter.dtype)
            parameter.summed_grad = None  # used once


def clipping_factors(gradients: Iterable[torch.Tensor], bound: float) -> torch.Tensor:
    """For each of B samples the factor in [0, 1] that brings its gradient's norm to at most ``bound``: float64 ``[B]``.

    Args:
        gradients: one tensor ``[B, ...]`` for each parameter.
        bound: the L2 norm over all parameters together.

    A sample with a gradient that is not finite gets 0.
    """
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1)
    factors = (bound / (norm * _SLACK)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), factors, torch.zeros_like(factors))


def _over(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask ``[B]`` shaped to lie over ``like`` ``[B, ...]``."""
    return rows.view(-1, *[1] * (like.dim() - 1))
