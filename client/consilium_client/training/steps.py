"""Steps of a round, private or plain: each batch's microbatches, then the optimizer's step.

**What a patient can make break.** Every step of a private round was charged for, and ends in one noisy sum, whatever
happens on the way: a refusal in its place would tell something of the patients that nobody has paid for. Memory and the
model's code are tried on invented records before the charge (``rehearsal.py``). Where passes break off all the same,
the step's patients are computed one by one, and one with whom they break off again is left out, as one that was not
drawn. So still one patient moves the sum by no more than its clipped gradient. In the end there is the noise alone.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from consilium_client.training.microbatches import Batch, Microbatch
from consilium_shared.privacy.measured_noise import empty_coordinates
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.private_sums import Grid, Integers
from consilium_shared.study import Study, Training
from dpsgd import engines
from dpsgd.adaptive import AdaptiveClipping
from dpsgd.device import in_precision, onto
from dpsgd.engines import Engine, PerSampleModel
from dpsgd.isolation import one_thread, without_denormals
from dpsgd.keystream import KeyStream
from dpsgd.lattice import Lattice
from dpsgd.noise import Noise
from dpsgd.per_sample import Loss
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.row_randomness import seeds_of
from dpsgd.side_by_side import SideBySide

log = logging.getLogger("consilium.agent")


class Probe(Protocol):
    """An audit's probe: what it puts into the private steps and sees of them (``canaries.py``); in no study's round."""

    def plant(self, optimizer: PrivateOptimizer, records: npt.NDArray[np.int64]) -> None:
        """Choose gradients on the optimizer's tape before they are clipped; ``records`` int64 ``[B]`` says whose its
        rows are."""

    def observe(self, optimizer: PrivateOptimizer) -> None:
        """Look at the private gradient of a step in ``.grad``: the noisy sum over the expected batch."""


WORTH_S = 0.002
"""Seconds of a microbatch from which on several are computed side by side."""


def lattice_of(study: Study, plan: PrivacyPlan, numbers: int) -> Lattice:
    """Lattice of the plan's sums of so many numbers; raises ConfigurationError where they do not fit on it."""
    expected = plan.expected(study.training.expected_batch)
    if study.privacy.sums is None:
        return Lattice.of(plan.clipping_norm, plan.noise_multiplier, numbers, expected)
    grid = Grid.of(study, numbers)
    grid.check_noise(plan.own_noise_multiplier * plan.clipping_norm, plan.honest_sites)
    return Lattice.on_grid(grid.step, plan.clipping_norm, numbers, expected)


Stepper = Callable[[Batch], None]
"""Runs one step on its batch."""


class PrivateSteps:
    """The private steps of a round."""

    def __init__(
        self,
        model: torch.nn.Module,
        study: Study,
        plan: PrivacyPlan,
        loss: Loss,
        noise: Noise,
        rows: int,
        engine: Engine = "book-keeping",
        probe: Probe | None = None,
        words: KeyStream | None = None,
        workers: int = 1,
        before: int = 0,
    ) -> None:
        """``rows``: of a microbatch in which several patients are. ``words``: from which follows what layers drop of
        each record; None: the same in every step, for what nobody's data is in. ``workers``: threads that compute
        microbatches side by side, with the same result; an audit has one. ``before``: steps of earlier rounds."""
        optimizer, after = _torch_optimizer(model, study, before)

        def then() -> None:
            if probe is not None:
                probe.observe(self.optimizer)
            after()

        self._loss, self._rows, self._words, self._step = loss, rows, words, 0
        adaptive, size = study.training.adaptive_clipping, sum(p.numel() for p in model.parameters() if p.requires_grad)
        grid = None if study.privacy.sums is None else Grid.of(study, size)
        workers = workers if probe is None else 1
        models = (
            [engines.wrap(model, engine, study.training.precision)]
            if workers == 1
            else engines.replicas(model, workers, study.training.precision)
        )
        self._model = models[0]
        self.optimizer = PrivateOptimizer(
            optimizer,
            self._model.tape,
            clipping_norm=plan.clipping_norm,
            noise_multiplier=plan.own_noise_multiplier,
            expected_batch=study.training.expected_batch,
            expected=plan.expected(study.training.expected_batch),
            noise=noise,
            adaptive=None if adaptive is None else AdaptiveClipping(adaptive.quantile, adaptive.rate),
            after=then,
            lattice=None if grid is None else lattice_of(study, plan, size),
            limit=None if grid is None else grid.limit,
            empty=empty_coordinates(study),
        )
        self._plant = None if probe is None else partial(probe.plant, self.optimizer)
        self._limit = plan.records_per_patient * study.training.augment_multiplicity
        self.workers = workers
        self._beside = SideBySide(models, self.optimizer, self._passes) if workers > 1 else None
        self._tried: float | None = None  # seconds of a microbatch that was computed alone

    def __call__(self, drawn: Batch) -> None:
        """One step: the sum of what could be computed, and the noise."""
        self._step = 0 if self._words is None else int(self._words.words(1)[0])
        self.optimizer.begin()
        if not self._summed(drawn):
            self.optimizer.forget()
            self._model.renew()
            self._one_by_one(drawn)
        self.optimizer.finish()  # never twice: what has noise on it was released

    def integers(self) -> Integers:
        """Integers that the one step of a sum released: uint32 ``[t + r]``, whole steps of the grid modulo 2^32.

        The last r are of the study's empty coordinates: noise alone.

        Nothing else of the step may leave: the gradient sum and its noise, and no function of them that another site's
        part does not go through as well.
        """
        released = self.optimizer.released
        assert released is not None  # noqa: S101  (a study with sums gave the lattice)
        return released.cpu().numpy().astype(np.int64).astype(np.uint32)  # from int64 it wraps around

    def try_out(self, batches: Iterable[Batch]) -> None:
        """One step of all these batches of one microbatch each, of invented records; raises whatever breaks off.

        Where several threads compute, each has the same microbatch at the same time.
        """
        self.optimizer.begin()
        with one_thread():
            for batch in batches:
                for microbatch in batch.padded_microbatches(self._rows):
                    if self._beside is None:
                        self._one_after_the_other([microbatch])
                    else:
                        self._beside.add([microbatch] * self.workers, at_once=True)
        self.optimizer.finish()

    def timed(self, drawn: Batch, device: torch.device) -> tuple[float, float]:
        """Seconds of a batch's microbatches, and of the rest of a step; of invented records, as ``try_out``."""
        began = time.perf_counter()
        self.optimizer.begin()
        started = _settled(device)
        self._add(drawn.padded_microbatches(self._rows))
        added = _settled(device)
        self.optimizer.finish()
        return added - started, started - began + _settled(device) - added

    def _add(self, microbatches: Iterable[Microbatch]) -> None:
        with one_thread():  # everywhere: several would wait for each other in every small kernel
            left = iter(microbatches)
            if self._beside is None:
                self._one_after_the_other(left)
            elif self._is_worth_it(left):
                self._beside.add(left)
            else:
                self._one_after_the_other(left)

    def _is_worth_it(self, microbatches: Iterator[Microbatch]) -> bool:
        """False where a microbatch is so short that handing it to a thread takes as long; two are tried.

        The sum has the same bits either way, so nothing that leaves depends on how long it took.
        """
        while self._tried is None or self._tried == 0.0:
            microbatch = next(microbatches, None)
            if microbatch is None:
                return False
            began = time.perf_counter()
            self._one_after_the_other([microbatch])
            # The first has the choice of kernels in it.
            self._tried = 0.0 if self._tried is None else time.perf_counter() - began
        return self._tried > WORTH_S

    def _one_after_the_other(self, microbatches: Iterable[Microbatch]) -> None:
        accumulate(self._model, self.optimizer, self._loss, microbatches, self._plant, self._limit, self._step)

    def _passes(self, model: PerSampleModel, microbatch: Microbatch) -> None:
        run_passes(model, self._loss, microbatch, self._limit, self._step)

    def _summed(self, drawn: Batch) -> bool:
        try:
            self._add(drawn.padded_microbatches(self._rows))
        except Exception as error:
            if self._plant is not None:  # an audit: nobody's data is in it
                raise
            if isinstance(error, torch.OutOfMemoryError):
                log.warning("the device's memory does not take %d records at once: one at a time", self._rows)
                self._rows = 1
            else:  # its text may quote data
                log.error("a step broke off (%s): its patients are computed one by one", type(error).__name__)
        else:
            return True
        return False  # out of the handler, which holds on to what took the memory

    def _one_by_one(self, drawn: Batch) -> None:
        torch.cuda.empty_cache()
        for microbatch in drawn.single_patients(self._rows):
            try:
                with one_thread():
                    self._one_after_the_other([microbatch()])
            except Exception as error:
                log.error("it broke off again (%s): what it was at is left out", type(error).__name__)
                self.optimizer.leave_out()
                self._model.renew()


def _settled(device: torch.device) -> float:
    """Seconds of a clock, read once the device has finished its queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def plain_steps(
    model: torch.nn.Module, study: Study, loss: Loss, rows: int, words: KeyStream, before: int = 0
) -> Stepper:
    """The steps of a round without privacy, in microbatches of so many rows. ``words``, ``before``: as of
    ``PrivateSteps``."""
    optimizer, after = _torch_optimizer(model, study, before)
    plain, batch = partial(in_precision, model, precision=study.training.precision), study.training.expected_batch

    device = next(model.parameters()).device

    def step(drawn: Batch) -> None:
        # What torch's own dropout draws in this step follows from the round's seed too.
        with torch.random.fork_rng(devices=[]):
            _seed(int(words.words(1)[0]) >> 1, device)
            _plain_step(plain, optimizer, loss, drawn.microbatches(rows), batch, after)

    return step


def _seed(number: int, device: torch.device) -> None:
    """Seed torch's generators of the processor and of this device.

    ``torch.manual_seed`` would note a call, with its traceback, for each kind of device that is not there, every time.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _torch_optimizer(
    model: torch.nn.Module, study: Study, before: int
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """The study's local optimizer, and what is to be done to each gradient before its step."""
    spec, parameters = study.training.optimizer, [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if spec.name == "sgd":
        optimizer = torch.optim.SGD(parameters, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    else:
        kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
        optimizer = kind(parameters, spec.lr, weight_decay=spec.weight_decay)
    if spec.schedule is not None or spec.l1:
        _follow(optimizer, study.training, before)
    proximal = study.training.proximal
    global_parameters = [(p, p.detach().clone()) for p in parameters] if proximal > 0 else []

    def after() -> None:
        """The gradient of FedProx's (µ/2) |w - w_global|² (Li et al. 2020, eq. 2). It reads no patient's data."""
        for parameter, global_parameter in global_parameters:
            assert parameter.grad is not None  # noqa: S101  (set just before, on every path)
            parameter.grad.add_(parameter.detach() - global_parameter, alpha=proximal)

    return optimizer, after


def _follow(optimizer: torch.optim.Optimizer, training: Training, before: int) -> None:
    """Let each step have its rate, and shrink the weights after it as the study's L1 norm asks."""
    spec, steps = training.optimizer, itertools.count(before)

    def rate(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        step = next(steps)
        fraction = (
            1.0 if spec.schedule is None else spec.schedule.fraction(step, training.steps_per_round, training.rounds)
        )
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * fraction

    def shrink(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weights in group["params"]:
                    weights.copy_(torch.nn.functional.softshrink(weights, group["lr"] * spec.l1))

    optimizer.register_step_pre_hook(rate)
    if spec.l1:
        optimizer.register_step_post_hook(shrink)


def accumulate(
    model: PerSampleModel,
    optimizer: PrivateOptimizer,
    loss: Loss,
    microbatches: Iterable[Microbatch],
    plant: Callable[[npt.NDArray[np.int64]], None] | None = None,
    limit: int | None = None,
    step: int = 0,
) -> None:
    """Add the clipped gradients of a step's microbatches to its sum.

    Args:
        microbatches: ``Batch.padded_microbatches``; the gradients of filling are dropped before anything is clipped.
        plant: as ``Probe.plant``.
        limit: as of ``RowOwners``.
        step: word from which follows what layers drop of each record in this step.
    """
    for microbatch in microbatches:
        with one_thread():
            run_passes(model, loss, microbatch, limit, step)
        if plant is not None:
            plant(microbatch.records)
        optimizer.accumulate()


def run_passes(
    model: PerSampleModel, loss: Loss, microbatch: Microbatch, limit: int | None = None, step: int = 0
) -> None:
    """Forward and backward pass of one microbatch, which leave its gradients on the model's tape.

    The caller's thread is to compute alone (``one_thread``). Arguments as of ``accumulate``.
    """
    rows, device = len(microbatch.inputs[0]), microbatch.inputs[0].device
    owners = RowOwners(microbatch.owners, device, rows, limit)
    model.tape.open(owners, seeds_of(microbatch.records, step, rows))
    with without_denormals():
        model.backward(loss(model(*microbatch.inputs), *microbatch.targets))


def _plain_step(
    model: Callable[[tuple[torch.Tensor, ...]], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    microbatches: Iterable[Microbatch],
    expected_batch: int,
    after: Callable[[], None],
) -> None:
    """One step on the sum of the patients' mean losses over the expected (not the drawn) number of patients."""
    optimizer.zero_grad(set_to_none=True)
    for inputs, targets, owners, _ in microbatches:
        weights = onto(1.0 / torch.bincount(owners)[owners], inputs[0].device)
        losses = loss(model(inputs), *targets)
        finite = torch.isfinite(losses.detach())
        if not finite.all():  # once more without them: 0 × NaN would be NaN
            losses = loss(model(tuple(each[finite] for each in inputs)), *(each[finite] for each in targets))
            weights = weights[finite]
        ((losses * weights).sum() / expected_batch).backward()  # type: ignore[no-untyped-call]
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    after()
    optimizer.step()
