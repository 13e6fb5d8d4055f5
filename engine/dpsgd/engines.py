"""Two per-sample-gradient engines with one interface: ours, and Opacus's hooks as the reference.

Both leave them on a tape, and everything after that (clipping, lattice, noise) is the same. ``book-keeping`` is the
trainer's; ``opacus`` takes up to seven times as long, and is there so that one can be held against the other.
"""

from __future__ import annotations

import copy
import warnings
from typing import Literal, Protocol

import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPGRU, DPLSTM
from torch import Tensor, nn

from consilium_shared.errors import ConfigurationError
from dpsgd import registry
from dpsgd.buffers import ConstantBuffers
from dpsgd.device import Precision, in_precision
from dpsgd.per_sample import per_sample_sum
from dpsgd.tape import Tape

Engine = Literal["book-keeping", "opacus"]


class PerSampleModel(Protocol):
    """A model whose backward passes leave per-sample gradients on ``tape``."""

    tape: Tape

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The model's logits."""

    def backward(self, losses: Tensor) -> None:
        """Backward pass from the samples' losses ``[B]``. A parameter's ``.grad`` stays None."""

    def renew(self) -> None:
        """Forget what passes that broke off have left in the model; the tape stays as it is."""


def wrap(model: nn.Module, engine: Engine, precision: Precision = "float32") -> PerSampleModel:
    """The model, in training mode, whose own ``forward`` from here on may be another.

    Raises:
        ConfigurationError: a layer whose per-sample gradients are not known, or a precision that the engine has not.
    """
    check_precision(engine, precision)
    return BookKeeping(model.train(), Tape(), precision) if engine == "book-keeping" else OpacusHooks(model.train())


def replicas(model: nn.Module, count: int, precision: Precision = "float32") -> list[PerSampleModel]:
    """The model and replicas of its structure on the same weights, ``count`` in all, each with a tape of its own.

    Raises:
        ConfigurationError: as ``wrap``.
    """
    structures = [model, *(_on_same_weights(model) for _ in range(count - 1))]
    return [wrap(each, "book-keeping", precision) for each in structures]


def check_precision(engine: Engine, precision: Precision) -> None:
    """Raises ConfigurationError for a precision that the engine does not compute in."""
    if engine == "opacus" and precision != "float32":
        raise ConfigurationError(
            f"gradients: opacus computes in float32, the study asks for {precision}: set book-keeping"
        )


class BookKeeping:
    """One backward pass, and no per-sample gradient where it is cheaper without (``tape``)."""

    def __init__(self, model: nn.Module, tape: Tape, precision: Precision = "float32") -> None:
        self.tape, self._precision = tape, precision
        registry.attach(model, tape)
        self._model, self._buffers = model, ConstantBuffers(model)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits of the model, as ``PerSampleModel`` has it."""
        self._buffers.restore()
        return in_precision(self._model, inputs, self._precision)

    def backward(self, losses: Tensor) -> None:
        """Backward pass, as ``PerSampleModel`` has it."""
        if losses.dim() == 0 or len(losses):
            per_sample_sum(losses, self.tape.owners.batch).backward()  # type: ignore[no-untyped-call]

    def renew(self) -> None:
        """Do nothing, as no layer keeps anything; for ``PerSampleModel``."""


class OpacusHooks:
    """Opacus's module hooks. Its own recurrent layers stand in for torch's, on the same parameters."""

    def __init__(self, model: nn.Module) -> None:
        registry.check(model)
        drawn = registry.random_layers(model)
        if drawn:
            raise ConfigurationError(f"gradients: opacus draws the dropout of {drawn[0]} for the whole batch; use ours")
        self.tape = Tape()
        self._parameters, self._model = [p for p in model.parameters() if p.requires_grad], model
        self._hooked = self._with_hooks()

    def _with_hooks(self) -> GradSampleModule:
        return GradSampleModule(_with_opacus_layers(self._model), loss_reduction="sum", strict=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits of the model, as ``PerSampleModel`` has it."""
        logits: Tensor = self._hooked(*inputs)
        return logits

    def backward(self, losses: Tensor) -> None:
        """Backward pass, as ``PerSampleModel`` has it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            per_sample_sum(losses, self.tape.owners.batch).backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters:
            self.tape.record_gradients(parameter, parameter.grad_sample)  # type: ignore[attr-defined]  # opacus sets it
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]

    def renew(self) -> None:
        """Clear the hooks' counters of passes, which a pass that broke off leaves wrong; for ``PerSampleModel``."""
        for parameter in self._parameters:
            for left in ("grad_sample", "_current_grad_sample", "_forward_counter"):
                parameter.__dict__.pop(left, None)
        self._hooked = self._with_hooks()


def _with_opacus_layers(model: nn.Module) -> nn.Module:
    """The model's structure on its own parameters, with Opacus's recurrent layers."""
    found = _on_same_weights(model)
    for parent in list(found.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LSTM | nn.GRU):
                setattr(parent, name, _opacus_layer(child))
    return found


def _on_same_weights(model: nn.Module) -> nn.Module:
    """A copy of the model's structure and buffers, on its own parameters."""
    found: nn.Module = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    registry.detach(found)
    return found


def _opacus_layer(module: nn.LSTM | nn.GRU) -> nn.Module:
    kind = DPLSTM if isinstance(module, nn.LSTM) else DPGRU
    found: nn.Module = kind(
        module.input_size,
        module.hidden_size,
        num_layers=module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        dropout=module.dropout,
        bidirectional=module.bidirectional,
    )
    directions = ("", "_reverse")[: 1 + module.bidirectional]
    names = [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]
    for name, cell in zip(names, found.cells, strict=True):  # type: ignore[arg-type]
        for linear, part in ((cell.ih, "ih"), (cell.hh, "hh")):
            linear.weight = getattr(module, f"weight_{part}_{name}")
            if module.bias:
                linear.bias = getattr(module, f"bias_{part}_{name}")
    return found.to(next(module.parameters()).device)


def zero_rows(parameters: list[nn.Parameter], rows: int) -> dict[Tensor, Tensor]:
    """PerSampleModel of zero: ``[rows, numel]`` by parameter, float32, where the parameter is."""
    return {p: torch.zeros((rows, p.numel()), dtype=p.dtype, device=p.device) for p in parameters}
