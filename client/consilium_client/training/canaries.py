"""One-run audit of a study's plan: the site's own trainer on generated patients and canaries, and nobody's data.

The run takes every private step of the plan through the trainer, as a study's rounds do: sampler, backward pass (the
site's engine), clipping, noise, optimizer, device. Two things differ. The patients are generated, so nothing that
comes out says anything about anybody: it costs no budget and may leave. And among them are canaries, each put in by a
fair coin (Steinke, Nasr & Jagielski 2023, algorithm 1), whose gradient is chosen: the guarantee holds for any gradient
of one patient and any observer of every noisy sum, so both are taken at their strongest.

* A canary's gradient lies along a direction of its own, orthogonal to all others': the flat gradient's coordinates are
  dealt to the canaries in turn, so that each has some in every larger tensor. Its norm is ``LOUD`` times the clipping
  norm, so that clipping is tested too, and its sign changes from step to step and from round to round, so that noise
  which repeats, or whatever else stays the same, cancels out of its score instead of hiding it.
* In each step, x is the noisy sum along the direction, times the sign, in units of the clipping norm: N(0, σ²) when it
  was not drawn, N(1, σ²) when it was (with adaptive clipping 0.992, and the noisy sum of marks is not looked at), and
  background beside it. Scores are Σ x, and the logarithm of the likelihood
  ratio Σ ln(1 - q + q·exp((2x - 1) / 2σ²)), the best score there is when the plan holds (Neyman & Pearson).

A model of few numbers cannot have many orthogonal directions: then the canaries are shared out among several runs of
the whole plan. The runs are independent and every canary is in one of them alone, so together they are still one
mechanism with the plan's guarantee for each canary, and the theorem's count goes over all.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from consilium_client.data.dataset import Dataset
from consilium_client.training.trainer import DIVERGED, train
from consilium_shared import limits, task
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector, width
from consilium_shared.privacy.canaries import Outcome, guess, strongest
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from consilium_shared.task import Examples
from dpsgd import engines
from dpsgd.engines import Engine
from dpsgd.private_optimizer import PrivateOptimizer

CANARIES = 2000
"""By default: enough to contradict a bound of ε 3 to 4 when everything leaks. A step draws half of them times q."""

LOUD = 50.0
"""Norm of a canary's gradient before clipping, in clipping norms."""

_PLACES = 16
"""Coordinates that each canary should have, so that its gradient lies in more than one tensor …"""
_FEW = 16
"""… unless that leaves less room than for so many canaries in one run."""
_BACKGROUND = 8
"""Most generated patients that a step is expected to draw …"""
_ROOM = 64
"""… and one for so many coordinates: in fewer, what they add would hide the canaries."""
_DIFFERENT = 256
"""Different records; a multiple of it apart, two are the same."""
_RECORDS = 4
"""Most records of a generated patient: enough to tell the mean of its gradients from their sum."""


def audit(
    study: Study,
    plan: PrivacyPlan,
    device: torch.device,
    *,
    canaries: int = CANARIES,
    seed: bytes | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    engine: Engine = "book-keeping",
    rows: int | None = None,
) -> Outcome:
    """Run the plan on generated patients and canaries, guess which canaries were in, and count the right guesses.

    Args:
        study: what is trained and how.
        plan: with its sampling rate, records, clipping norm, noise, and all of its rounds and steps.
        device: where the study's rounds compute.
        canaries: number of canaries, 10 or more.
        seed: everything random follows from it; None for fresh bytes. No patient's data is here that it could expose.
        on_progress: called with (steps done, steps in all).
        way: engine of per-sample gradients, as the study's rounds have it here.
        rows: of a microbatch of several patients, as the study's rounds have it here (``trainer.train``).

    Returns:
        The outcome of that way of guessing which comes nearest to contradicting the plan (``WAYS``).

    Raises:
        ConfigurationError: a number of canaries outside 10 … ``limits.CANARIES``, or as ``trainer.train``.
        DataError: training diverged.
    """
    plan = plan.whole()  # what is seen is a sum: the noise of all its honest sites
    if not 10 <= canaries <= limits.CANARIES:
        raise ConfigurationError(f"an audit takes 10 … {limits.CANARIES} canaries, got {canaries}")
    seed = secrets.token_bytes(32) if seed is None else seed
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(b"consilium canaries\0" + seed).digest(), "big"))
    size = width(study)
    model, together = pack(to_vector(build(study)), study), min(canaries, max(size // _PLACES, min(size, _FEW)))
    coins = draw.random(canaries) < 0.5
    runs = math.ceil(canaries / together)
    rounds, steps = plan.rounds, plan.steps_per_round
    found: list[_Run] = []
    for number in range(runs):
        part = coins[number * together : (number + 1) * together]
        records, owners = _records(study, plan, size, np.flatnonzero(part), draw)
        run = _Run(plan, study.training.expected_batch, together, len(part), owners)
        found.append(run)
        norm: float | None = None
        for done in range(rounds):
            before = (number * rounds + done) * steps
            run.begin(done)
            result = train(
                model,
                study,
                records,
                plan,
                round=done + 1,
                site="canaries",
                device=device,
                clipping_norm=norm,
                seed=hashlib.sha256(b"consilium canary round\0%d\0%d\0" % (number, done) + seed).digest(),
                on_progress=_shifted(on_progress, before, runs * rounds * steps),
                probe=run,
                engine=engine,
                rows=rows,
            )
            if result.diverged:
                raise DataError(f"study {study.study}, round {done + 1}: {DIVERGED}")
            norm = result.clipping_norm
    scores = {
        "likelihood": np.concatenate([run.likelihood for run in found]),
        "sum": np.concatenate([run.sum for run in found]),
    }
    return strongest(guess(scores, coins), [plan.event(rounds)], plan.delta)


def _shifted(tell: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int, int], None] | None:
    return None if tell is None else lambda done, _: tell(before + done, total)


class _Run:
    """The canaries of one run of the plan: a ``steps.Probe``.

    Attributes:
        likelihood, sum: the scores so far, float64 ``[m]``.
    """

    def __init__(
        self, plan: PrivacyPlan, expected_batch: int, stride: int, canaries: int, owners: npt.NDArray[np.int64]
    ) -> None:
        """``stride``: canary j owns the coordinates j, j + stride, j + 2 · stride …; ``owners``: int64 ``[N]``, the
        canary whose each record is, or -1."""
        self.likelihood, self.sum = np.zeros(canaries), np.zeros(canaries)
        self._plan, self._owners, self._stride = plan, owners, stride
        self._expected_batch = expected_batch
        self._sign = 1.0

    def begin(self, number: int) -> None:
        """A round starts."""
        self._sign = -1.0 if number % 2 else 1.0

    def plant(self, optimizer: PrivateOptimizer, records: npt.NDArray[np.int64]) -> None:
        """Give the canaries among the records their gradients."""
        owners = self._owners[records]
        rows = np.flatnonzero(owners >= 0)
        if not len(rows):
            return
        parameters = optimizer.params
        size, offset = sum(p.numel() for p in parameters), 0
        norm = self._sign * LOUD * optimizer.clipping_norm
        planted = engines.zero_rows(parameters, len(records))
        for parameter, flat in planted.items():
            for row, owner in zip(rows.tolist(), owners[rows].tolist(), strict=True):
                flat[row, (owner - offset) % self._stride :: self._stride] = norm / math.sqrt(self._places(size, owner))
            offset += parameter.numel()
        optimizer.tape.replace(torch.from_numpy(rows).to(parameters[0].device), planted)

    def observe(self, optimizer: PrivateOptimizer) -> None:
        """Add a step's noisy sum, along each canary's direction, to its scores."""
        flat = torch.cat([p.grad.reshape(-1) for p in optimizer.params if p.grad is not None]).double()
        places = -(-len(flat) // self._stride)
        padded = torch.nn.functional.pad(flat, (0, places * self._stride - len(flat)))
        along = padded.view(places, self._stride).sum(dim=0)[: len(self.sum)].cpu().numpy()
        length = np.sqrt(self._places(len(flat), np.arange(len(self.sum))))
        x = self._sign * self._expected_batch / optimizer.longest * along / length
        self.sum += x
        q, variance = self._plan.sampling_rate, self._plan.noise_multiplier**2
        drawn = math.log(q) + (2.0 * x - 1.0) / (2.0 * variance)
        self.likelihood += np.logaddexp(math.log1p(-q), drawn) if q < 1 else drawn
        self._sign = -self._sign

    def _places(self, size: int, owner: npt.NDArray[np.int64] | int) -> npt.NDArray[np.int64] | int:
        """Coordinates that belong to one canary, of ``size`` in all."""
        return (size - 1 - owner) // self._stride + 1


def _records(
    study: Study, plan: PrivacyPlan, size: int, inside: npt.NDArray[np.int64], draw: np.random.Generator
) -> tuple[Dataset, npt.NDArray[np.int64]]:
    """Records of generated patients and then of the canaries that are in; and the canary of each record, or -1.

    The patients are fewer than the site has: they are there so that the run is one on patients, and what they add to a
    canary's coordinates (``size`` in all) can only hide it. An observer who knew their draws would subtract it.

    Records repeat after ``_DIFFERENT``: so any number of them takes little memory.
    """
    background = max(1, round(max(1, min(_BACKGROUND, size // _ROOM)) / plan.sampling_rate))
    each = min(plan.records_per_patient, _RECORDS)
    patients = np.repeat(np.arange(background + len(inside)), each)
    canary = np.concatenate([np.full(background, -1), inside])[patients]
    examples = task.of(study).invented(study, min(len(patients), _DIFFERENT), draw)
    records = _Repeated(patients, background + len(inside), np.ones(background + len(inside), dtype=bool), examples)
    return records, canary


@dataclass(frozen=True)
class _Repeated(Dataset):
    """Data set that repeats a few invented records in turn."""

    examples: Examples

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(each.shape[1:] for each in self.examples.inputs)

    def take(self, records: npt.NDArray[np.int64]) -> Examples:
        some = records % len(self.examples.inputs[0])
        inputs, targets = (tuple(each[some] for each in part) for part in self.examples)
        return Examples(inputs, targets)
