"""Private training of any torch model of known layers, in a loop of one's own."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from consilium_shared.errors import ConfigurationError
from dpsgd import engines, independence
from dpsgd.adaptive import AdaptiveClipping
from dpsgd.device import exact_arithmetic
from dpsgd.isolation import ROWS, filled, one_thread, without_denormals
from dpsgd.keystream import KeyStream
from dpsgd.noise import Noise
from dpsgd.per_sample import Loss
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners

Batch = tuple[Tensor | tuple[Tensor, ...], Tensor | tuple[Tensor, ...]]
"""Inputs of a model, and targets of the loss: a tensor ``[n, …]`` or several."""


class PrivateTraining:
    """DP-SGD: each step draws records at random, clips each one's gradient, adds noise to the sum, and steps.

    **Guarantee.** One step is the Poisson-subsampled Gaussian mechanism for adding or removing one record: each record
    is drawn with probability ``expected_batch / records``, what one record adds to the sum has L2 norm at most the
    clipping norm, exactly (``lattice``), and the noise has ``noise_multiplier`` times that as standard deviation, from
    AES-256 under a secret seed. An accountant for that mechanism gives ε.
    **Public**: the number of records, the number of steps, and how long they take.
    **Not covered**: a step that raises, which may depend on a record; ``take``, which must give each record as it is,
    whatever the others drawn; patients of several records.

    >>> model, generator = nn.Linear(4, 3), torch.Generator().manual_seed(0)
    >>> records, targets = torch.rand(90, 4, generator=generator), torch.arange(90) % 3
    >>> training = PrivateTraining(
    ...     model, torch.optim.SGD(model.parameters(), 0.5), nn.CrossEntropyLoss(reduction="none"),
    ...     records=90, expected_batch=30, clipping_norm=1.0, noise_multiplier=1.1,
    ...     example=(torch.rand(3, 4), torch.tensor([0, 1, 2])),
    ... )
    >>> training.step(lambda drawn: (records[drawn], targets[drawn]))
    >>> training.steps, round(training.sampling_rate, 3)
    (1, 0.333)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        records: int,
        expected_batch: int,
        clipping_norm: float,
        noise_multiplier: float,
        example: Batch,
        adaptive: AdaptiveClipping | None = None,
        seed: bytes | None = None,
    ) -> None:
        """
        Args:
            model: on the device where it is trained; its layers are those of ``registry.registered``.
            optimizer: of all its trainable parameters.
            loss: losses ``[n]`` of outputs and targets, each of its own record (``reduction="none"``).
            records: number of records.
            expected_batch: records that a step draws on average.
            clipping_norm: L2 norm to which a record's gradient is clipped; with ``adaptive``, of the first step.
            noise_multiplier: standard deviation of the noise, in clipping norms.
            example: at least 3 invented records, on which is tested that no record's gradient depends on others.
            adaptive: lets the clipping norm follow the gradients, at no cost in privacy.
            seed: 32 secret bytes, for these steps alone; None for fresh ones.

        Raises:
            ConfigurationError: a layer whose per-sample gradients are not known, a loss or a model that mixes records,
                a trainable parameter that the optimizer has not, or numbers out of range.
        """
        if not 0 < expected_batch <= records:
            raise ConfigurationError(f"a batch of {expected_batch} records of {records}: expect 1 to all of them")
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in stepped:
                raise ConfigurationError(f"parameter {name} is trainable and the optimizer has it not")
        inputs, targets = example
        independence.check(model, loss, _tuple(inputs), _tuple(targets))
        seed = secrets.token_bytes(32) if seed is None else seed
        self._model, self._loss, self._records = engines.wrap(model, "book-keeping"), loss, records
        self.sampling_rate, self.steps = expected_batch / records, 0
        """Probability with which each step draws a record; number of steps that were made."""
        self._sampling, self._seeds = KeyStream(seed, "sampling"), KeyStream(seed, "rows")
        self._optimizer = PrivateOptimizer(
            optimizer,
            self._model.tape,
            clipping_norm=clipping_norm,
            noise_multiplier=noise_multiplier,
            expected_batch=expected_batch,
            noise=Noise(seed),
            adaptive=adaptive,
        )

    @property
    def clipping_norm(self) -> float:
        """Clipping norm of the next step."""
        return self._optimizer.clipping_norm

    def step(self, take: Callable[[Tensor], Batch]) -> None:
        """Draw, clip, add noise, and step.

        Args:
            take: inputs and targets of the records of these numbers, int64 ``[n]`` from 0 on; called for at most
                ``isolation.ROWS`` at a time, and not at all where none is drawn.
        """
        threshold = np.uint64(min(int(self.sampling_rate * 2.0**64), 2**64 - 1))
        drawn = np.flatnonzero(self._sampling.words(self._records) < threshold)
        seeds = self._seeds.words(len(drawn)).view(np.int64)
        self._optimizer.begin()
        with exact_arithmetic():
            try:
                for start in range(0, len(drawn), ROWS):
                    self._add(take(torch.from_numpy(drawn[start : start + ROWS])), seeds[start : start + ROWS])
            except BaseException:
                self._optimizer.forget()  # else the next step's sum would have some records twice
                raise
            self._optimizer.finish()
        self.steps += 1

    def _add(self, batch: Batch, seeds: np.typing.NDArray[np.int64]) -> None:
        """Clip the gradients of at most ``ROWS`` records, and add them to the sum."""
        inputs, targets = _tuple(batch[0]), _tuple(batch[1])
        count = len(seeds)
        if any(len(each) != count for each in (*inputs, *targets)):
            raise ConfigurationError(
                f"take gave {[len(each) for each in (*inputs, *targets)]} rows for {count} records"
            )
        rows = RowOwners(torch.arange(count), inputs[0].device, ROWS, limit=1)
        self._model.tape.open(rows, filled(torch.from_numpy(seeds), ROWS))
        with one_thread(), without_denormals():
            outputs = self._model(*(filled(each, ROWS) for each in inputs))
            self._model.backward(self._loss(outputs, *(filled(each, ROWS) for each in targets)))
        self._optimizer.accumulate()


def _tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else inputs
