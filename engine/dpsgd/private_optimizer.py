"""Private gradient of one step: clip each patient's gradient, sum up, add the noise, scale.

Opacus keeps the order of calls (``DPOptimizer``): clip and add up each physical batch, and once for all of them add
noise, scale, step. What is clipped comes from a ``Tape``, whose norms are never too small and which drops a patient
whose gradient is not finite; the noise is our own, which nobody can predict.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from opacus.optimizers import DPOptimizer

from dpsgd.adaptive import GRADIENT, MARK, AdaptiveClipping, following, marks
from dpsgd.isolation import thread_beside
from dpsgd.lattice import Lattice
from dpsgd.noise import Noise
from dpsgd.tape import MARKS, Tape, Turn, at_once


class _Sums(dict[torch.Tensor, torch.Tensor]):
    """Flat totals by parameter, in its precision. A total is made, as zeros, when it is first asked for: by then the
    tape has let go of other parameters' records, so less memory is in use at once."""

    def __missing__(self, parameter: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        found = self[parameter] = parameter.new_zeros(parameter.numel())
        return found


class TapeOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, which takes clipped sums from a tape in place of per-sample gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, tape: Tape, **about: object) -> None:
        """``about``: arguments of ``DPOptimizer``."""
        super().__init__(optimizer, **about)
        self.tape = tape

    @property
    def bound(self) -> float:
        """L2 norm to which a patient's gradient is clipped."""
        return float(self.max_grad_norm)

    @property
    def accumulated_iterations(self) -> int:
        """Number of backward passes in a physical batch: always one."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Add every patient's clipped gradient to ``summed_grad``."""
        sums = _Sums({p: p.summed_grad.view(-1) for p in self.params if p.summed_grad is not None})
        self.add_clipped(sums, 1.0)
        for parameter in self.params:
            parameter.summed_grad = sums[parameter].view(parameter.shape)

    def add_clipped(
        self, totals: dict[torch.Tensor, torch.Tensor], scale: float, tape: Tape | None = None, turn: Turn = at_once
    ) -> torch.Tensor:
        """Add a tape's clipped gradients, times ``scale``, to flat ``totals`` in their ``turn``; the tape is closed.

        Args:
            tape: the optimizer's own where none is given.

        Returns:
            ``Tape.ratios``, float64 ``[P]``.

        Raises:
            RuntimeError: a parameter has a gradient that is not on the tape.
        """
        stray = [parameter for parameter in self.params if parameter.grad is not None]
        if stray:
            raise RuntimeError(
                f"a parameter of shape {tuple(stray[0].shape)} has a gradient from outside of its layer, or of a step "
                "before: zero_grad() was not called"
            )
        tape = self.tape if tape is None else tape
        if tape.empty:
            tape.close()
            return torch.zeros(0, dtype=torch.float64)
        ratios = tape.ratios(self.bound)
        tape.add_weighted_sum(ratios.clamp(max=1.0) * scale, totals, turn)
        tape.close()
        return ratios

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip; and unless this is a part of a step, add the noise and scale."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        for parameter in self.params:
            parameter.summed_grad = None  # it was released: in no later sum
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and unless a step is under way its sum."""
        for parameter in self.params:
            parameter.grad_sample = None
            if not self._is_last_step_skipped:
                parameter.summed_grad = None
        self.original_optimizer.zero_grad(set_to_none)


class PrivateOptimizer(TapeOptimizer):
    """A torch optimizer whose every step sees (Σ clipped gradients + N(0, (noise × bound)²)) / expected batch.

    One term of the sum is one patient: the mean gradient of its records in the step, clipped. The sum is rounded to the
    ``lattice``. With adaptive clipping each patient's mark is in it, the bound is another one after each step, and what
    the torch optimizer sees is in units of the bound, so that the length of a step does not follow it.

    A step is ``begin``, then ``accumulate`` for each microbatch on the tape, then ``finish`` once. ``leave_out`` drops
    passes that broke off; ``forget`` drops the sum so far too, and keeps the noise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tape: Tape,
        *,
        clipping_norm: float,
        noise_multiplier: float,
        expected_batch: int,
        noise: Noise,
        expected: float | None = None,
        adaptive: AdaptiveClipping | None = None,
        after: Callable[[], None] | None = None,
        lattice: Lattice | None = None,
        limit: int | None = None,
        empty: int = 0,
    ) -> None:
        """``clipping_norm``: with ``adaptive``, that of the first step. ``expected_batch``: divides the sum.
        ``expected``: upper bound of the patients that a step expects, where above ``expected_batch``. ``after``: called
        in each step once the private gradient is in ``.grad``; it may only post-process that. ``lattice``:
        that of a study that says on which grid its sums lie; not with ``adaptive``. ``limit``: largest absolute
        coordinate of the sum in steps of the lattice, cut off before the noise, which brings no two sums further apart.
        ``empty``: so many numbers more in ``released``, of noise alone; with a given lattice.

        Raises:
            ConfigurationError: noise, bound or batch beyond what the lattice takes.
        """
        super().__init__(
            optimizer,
            tape,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_batch,
            loss_reduction="mean",
        )
        parameters = sum(p.numel() for p in self.params)
        self._adaptive = adaptive
        self._noise = noise
        # All flat, in steps of the lattice: the sum of the step under way, its noise (`_drawn`), and the last private
        # gradient. After the parameters' coordinates comes the sum of marks, or come the empty coordinates.
        size = parameters + (adaptive is not None) + empty
        self._sum = torch.zeros(size, dtype=torch.float64, device=self.params[0].device)
        self._expected = float(expected_batch) if expected is None else expected
        given = lattice is not None
        self.lattice = lattice or Lattice.of(clipping_norm, noise_multiplier, len(self._sum), self._expected)
        self._limit = limit
        self.released = self._sum.clone() if given else None
        """Numbers that the last step released, whole steps of the grid: float64 ``[d + empty]``; of a given lattice."""
        parts = torch.split(self._sum[:parameters], [p.numel() for p in self.params])
        self._parts = dict(zip(self.params, parts, strict=True))
        self._drawn = torch.zeros_like(self._sum)
        self._drawing: Future[None] | None = None
        self._beside = thread_beside("noise")
        self._gradient = torch.zeros(parameters, dtype=self.params[0].dtype, device=self.params[0].device)
        self._marks = self._sum[parameters:].clone()
        if after is not None:
            self.attach_step_hook(lambda _: after())

    def begin(self) -> None:
        """Begin a step: another thread draws its noise, which depends on no data, while gradients are computed."""
        if self._drawing is None:
            self._drawing = self._beside.submit(self._draw)

    def _draw(self) -> None:
        self._drawn.zero_()
        deviation = self.noise_multiplier * self.max_grad_norm
        if deviation > 0:
            self._noise.add_to(self._drawn, deviation / self.lattice.step)

    def forget(self) -> None:
        """Begin the step under way again, with the same noise."""
        self.leave_out()
        self._sum.zero_()

    def leave_out(self) -> None:
        """Drop the patients on the tape, whose passes broke off; some of their clipped gradients may be in the sum."""
        self.tape.close()
        self._step_skip_queue.clear()
        self.zero_grad(set_to_none=True)

    def summed(self) -> torch.Tensor:
        """Sum so far, without noise, in steps of the lattice: for a machine's test on invented records."""
        return self._sum.round()

    def accumulate(self) -> None:
        """Clip the patients on the tape and keep their sum for the step that follows."""
        self.signal_skip_step(True)
        self.step()
        self.zero_grad(set_to_none=True)

    def finish(self) -> None:
        """Add the noise, once, to what was accumulated (nothing, for an empty batch) and step."""
        self.tape.close()
        self.step()
        self.zero_grad(set_to_none=True)
        if self._adaptive is not None:
            self._follow(self._adaptive)

    def _follow(self, adaptive: AdaptiveClipping) -> None:
        """Take the bound of the next step from the sum of marks that was released: the one number a step waits for."""
        total, batch = float(self._marks) / (MARK * self.lattice.row_bound), self.expected_batch_size
        self.max_grad_norm = following(self.clipping_norm, total, batch, adaptive)
        self.lattice = Lattice.of(self.clipping_norm, self.noise_multiplier, len(self._sum), self._expected)

    def clip_and_accumulate(self) -> None:
        """Add every patient's clipped gradient; drop one that is not finite."""
        self.add_piece(self.tape, at_once)

    def add_piece(self, tape: Tape, turn: Turn) -> None:
        """Add the clipped gradients of the patients on a tape to the sum, in the piece's ``turn``.

        Several threads may do so at the same time, each with a tape of its own.
        """
        if tape.empty:
            tape.close()
            return
        ratios = self.add_clipped(self._parts, 1.0 / self.lattice.step, tape, turn)
        if self._adaptive is not None:
            most = MARK * self.lattice.row_bound / self.lattice.step
            found = marks(ratios, self._adaptive).sum()
            with turn((MARKS,)), torch.no_grad():
                self._sum[-1:].add_(found, alpha=most)

    @property
    def clipping_norm(self) -> float:
        """Clipping norm of the step that is under way, or follows."""
        return float(self.max_grad_norm)

    @property
    def longest(self) -> float:
        """Largest norm of a patient's clipped gradient in the sum that the torch optimizer sees, before the mean."""
        return self.clipping_norm if self._adaptive is None else 1.0

    @property
    def bound(self) -> float:
        """L2 bound on a clipped gradient: the clipping norm, less what rounding and a mark may add."""
        return self.lattice.row_bound * (1.0 if self._adaptive is None else GRADIENT)

    def add_noise(self) -> None:
        """Set ``grad`` to the rounded sum plus noise, and begin the next sum."""
        self.begin()
        assert self._drawing is not None  # noqa: S101  (begin gave it)
        self._drawing.result()
        self._drawing = None
        self._sum.round_()
        if self._limit is not None:
            self._sum.clamp_(-self._limit, self._limit)
        released = self._sum.add_(self._drawn)
        if self.released is not None:
            self.released.copy_(released)
        unit = self.lattice.step * self.longest / self.clipping_norm
        self._gradient.copy_(released[: len(self._gradient)].mul_(unit))
        self._marks.copy_(released[len(self._gradient) :]).mul_(self.lattice.step)
        parts = torch.split(self._gradient, [p.numel() for p in self.params])
        for parameter, part in zip(self.params, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._sum.zero_()
