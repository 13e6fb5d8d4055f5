"""One-backward clipping as a grad-sample mode of Opacus: its engine, accountant, Poisson loader and order of calls,
with our tape under them. For experiments outside of a study; a study's rounds go through ``trainer.py``.

    engine = BookKeepingEngine(accountant="prv")
    model, optimizer, criterion, loader = engine.make_private(
        module=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(reduction="none"), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode="book-keeping",
    )
    for inputs, labels in loader:
        optimizer.zero_grad()
        criterion(model(inputs), labels).backward()
        optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.grad_sample import AbstractGradSampleModule
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn

from consilium_shared.errors import ConfigurationError
from dpsgd import registry
from dpsgd.lattice import SMALLEST
from dpsgd.per_sample import per_sample_sum
from dpsgd.private_optimizer import TapeOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

MODE = "book-keeping"

_PIECE = 2**15
"""Numbers of noise drawn at a time."""


class BookKeepingModule(AbstractGradSampleModule):  # type: ignore[misc]
    """A model that leaves what clipping needs on ``tape`` in each backward pass; its weights keep their names."""

    def __init__(self, module: nn.Module) -> None:
        """Raises ConfigurationError for a layer that cannot be trained with privacy."""
        super().__init__(module)
        self.tape = Tape()
        registry.attach(module, self.tape)

    def forward(self, *inputs: Tensor, **named: Any) -> Any:
        """Model's output. The first dimension of the first input is the batch; of an empty one, the output is a tensor.
        In evaluation nothing is differentiated.

        Raises:
            RuntimeError: the batch before was neither used by ``optimizer.step`` nor forgotten by
                ``optimizer.zero_grad``.
        """
        if not self.training or not torch.is_grad_enabled():
            with torch.no_grad():
                return self._module(*inputs, **named)
        if self.tape.opened:
            raise RuntimeError("the last batch's gradients were not used: call step() or zero_grad() first")
        seeds = torch.randint(2**62, (len(inputs[0]),))  # as torch's dropout, which draws from this generator too
        self.tape.open(RowOwners(torch.arange(len(inputs[0])), inputs[0].device, limit=1), seeds)
        if len(inputs[0]):
            return self._module(*inputs, **named)
        with torch.no_grad():  # kernels differ in what they make of no samples, and nobody has left a gradient
            found = self._module(*inputs, **named)
        return found.requires_grad_()

    def remove_hooks(self) -> None:
        """Make the model an ordinary one again."""
        registry.detach(self._module)


class BookKeepingOptimizer(TapeOptimizer):
    """Opacus's noise on our clipped sums."""

    split = False
    """True while ``PhysicalBatches`` splits batches."""

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Skip signal, as in Opacus.

        Raises:
            RuntimeError: not from ``PhysicalBatches``; a loop that is left early would get into the next one's sum.
        """
        if not self.split:
            raise RuntimeError("split batches by PhysicalBatches in place of Opacus's BatchMemoryManager")
        super().signal_skip_step(do_skip)

    @property
    def half_way(self) -> bool:
        """True while a batch that has begun, or was announced, is not finished."""
        return self._is_last_step_skipped or bool(self._step_skip_queue)

    def forget(self) -> None:
        """Drop the step under way: its sum, and what was announced of its physical batches."""
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self.zero_grad()

    def add_noise(self) -> None:
        """Noise as in Opacus, drawn in pieces that stay in cache and added where the sum is. A sum is released once."""
        if self.secure_mode:
            super().add_noise()
            return
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            released, parameter.summed_grad = parameter.summed_grad, None
            for piece in released.view(-1).split(_PIECE) if deviation else ():
                piece.add_(torch.empty_like(piece).normal_(0.0, deviation, generator=self.generator))
            parameter.grad = released.view_as(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forget what the tape has."""
        self.tape.close()
        super().zero_grad(set_to_none)


class _Parts:
    """A loader of physical batches. Each loop over it begins a batch of its own."""

    def __init__(self, loader: Iterable[Any], optimizer: BookKeepingOptimizer) -> None:
        self._loader, self._optimizer = loader, optimizer

    def __iter__(self) -> Iterator[Any]:
        if self._optimizer.half_way:
            self._optimizer.forget()
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


class PhysicalBatches(BatchMemoryManager):  # type: ignore[misc]
    """Opacus's ``BatchMemoryManager``; a loop that is left early leaves nothing for the next."""

    def __enter__(self) -> Any:
        """The loader of physical batches."""
        self.optimizer.split = True
        return _Parts(super().__enter__(), self.optimizer)

    def __exit__(self, *about: object) -> None:
        """Forget a batch that was left half-way."""
        self.optimizer.split = False
        if self.optimizer.half_way:
            self.optimizer.forget()


class BookKeepingEngine(PrivacyEngine):  # type: ignore[misc]
    """Opacus's engine with one mode more, ``book-keeping``; all others are its own."""

    def make_private(self, *, criterion: Callable[..., Tensor], grad_sample_mode: str = MODE, **about: Any) -> Any:
        """Opacus's ``make_private``, for modes that take a criterion: module, optimizer, criterion, loader.

        Args:
            criterion: losses of each sample (``reduction="none"``); of each sample's many outputs the mean is taken.
            grad_sample_mode: ``book-keeping``, or one of Opacus's.
            about: see Opacus; ``clipping`` is ``flat``.

        Raises:
            ConfigurationError: a layer that cannot be trained with privacy; it is named.
        """
        made = super().make_private(criterion=criterion, grad_sample_mode=grad_sample_mode, **about)
        if grad_sample_mode != MODE:
            return made
        module, optimizer, loader = made
        optimizer.tape = module.tape

        def summed(*given: Any) -> Tensor:
            losses = criterion(*given)
            return per_sample_sum(losses, module.tape.owners.batch if module.tape.opened else len(losses))

        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in module._module.named_parameters():
            if parameter.requires_grad and id(parameter) not in stepped:
                raise ConfigurationError(f"parameter {name} is trainable and the optimizer has it not")
        return module, optimizer, summed, loader

    def make_private_with_epsilon(self, *, grad_sample_mode: str = MODE, **about: Any) -> Any:
        """``make_private`` with the noise that an ε asks for, as Opacus finds it."""
        return super().make_private_with_epsilon(grad_sample_mode=grad_sample_mode, **about)

    def validate(self, *, module: nn.Module, optimizer: Any, data_loader: Any) -> None:
        """Layers are judged when they are attached: ours takes recurrent ones, which Opacus replaces."""
        if optimizer is not None:
            super().validate(module=module, optimizer=optimizer, data_loader=data_loader)

    def _prepare_model(self, module: nn.Module, *, grad_sample_mode: str = MODE, **about: Any) -> Any:
        if grad_sample_mode != MODE:
            super().validate(module=module, optimizer=None, data_loader=None)
            return super()._prepare_model(module, grad_sample_mode=grad_sample_mode, **about)
        if not about.get("batch_first", True):
            raise ConfigurationError("the batch is the first dimension of the inputs")
        return BookKeepingModule(module)

    def _prepare_optimizer(self, *, grad_sample_mode: str = MODE, **about: Any) -> Any:
        if grad_sample_mode != MODE:
            return super()._prepare_optimizer(grad_sample_mode=grad_sample_mode, **about)
        if about.pop("clipping", "flat") != "flat" or about.pop("distributed", False):
            raise ConfigurationError("book-keeping clips the whole gradient of a sample, on one device")
        about.pop("noise_generator", None)
        bound = about["max_grad_norm"]
        if not bound >= SMALLEST:
            raise ConfigurationError(f"max_grad_norm {bound}: norms in float32 go down to {SMALLEST:.1g}")
        return BookKeepingOptimizer(tape=Tape(), **about)
