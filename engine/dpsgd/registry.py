"""Registry of layers, and their attachment to a model: each leaves on a tape what per-sample gradients need.

A model stays as it is: ``attach`` gives each of its modules with weights another ``forward``, which runs the same
arithmetic inside an autograd function that knows the tape. Autograd computes no gradient of a weight, so every
``.grad`` stays None.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from consilium_shared.errors import ConfigurationError
from dpsgd import layers
from dpsgd.buffers import keeps_statistics
from dpsgd.layer import Layer
from dpsgd.layers.constant import expanded
from dpsgd.tape import Tape


@cache
def registered() -> dict[type[nn.Module], Layer]:
    """Layers by the kind of module: those of every file in ``dpsgd/layers``.

    Raises:
        RuntimeError: two files claim one kind.
    """
    found: dict[type[nn.Module], Layer] = {}
    for entry in sorted(pkgutil.iter_modules(layers.__path__), key=lambda each: each.name):
        for layer in importlib.import_module(f"{layers.__name__}.{entry.name}").LAYERS:
            if layer.kind in found:
                raise RuntimeError(f"two layers of {layers.__name__} are for {layer.kind.__name__}")
            found[layer.kind] = layer
    return found


def attach(model: nn.Module, tape: Tape) -> None:
    """Let every layer of ``model`` leave its records on ``tape`` in each backward pass.

    Without gradients (``torch.no_grad``) the model computes as before.

    Raises:
        ConfigurationError: a layer whose per-sample gradients are not known; it is named, and what to use instead.
    """
    check(model)
    for _, module in _outermost(model):
        layer = registered().get(type(module))
        if layer is None:
            if _has_weights(module, whole=False):
                module.forward = partial(_recorded, partial(_expanded, module, tape), type(module).forward, module)
        elif layer.without_weights or _has_weights(module, layer.whole):
            module.forward = partial(_recorded, partial(layer.forward, module, tape), type(module).forward, module)


def detach(model: nn.Module) -> None:
    """Undo ``attach``."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


def check(model: nn.Module) -> None:
    """Raises ConfigurationError for a layer that cannot be trained with privacy."""
    for name, module in _outermost(model):
        reason = _refusal(module)
        if reason:
            where = f"layer {name or 'of the model'} ({type(module).__name__})"
            raise ConfigurationError(f"{where} {reason}")


def random_layers(model: nn.Module) -> list[str]:
    """Names of the layers that draw at random in training, and so ask for seeds of the rows (``Tape.open``)."""
    return [name or "the model" for name, module in model.named_modules() if getattr(module, _drops(module), 0.0) > 0.0]


def draw_nothing(model: nn.Module) -> None:
    """Set the probabilities of ``random_layers`` to 0."""
    for module in model.modules():
        if getattr(module, _drops(module), 0.0) > 0.0:
            setattr(module, _drops(module), 0.0)


def _drops(module: nn.Module) -> str:
    """Name of the attribute that is the probability with which a layer drops something; "" for others."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "p"
    return "dropout" if isinstance(module, nn.RNNBase | nn.MultiheadAttention) else ""


def _outermost(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, without those that a layer computes itself."""
    yield name, model
    layer = registered().get(type(model))
    if layer is None or not layer.whole:
        for child, module in model.named_children():
            yield from _outermost(module, f"{name}.{child}" if name else child)


def _has_weights(module: nn.Module, whole: bool) -> bool:
    return any(True for _ in module.parameters(recurse=whole))


def _refusal(module: nn.Module) -> str:
    """Reason why a module cannot be trained with privacy: it mixes samples, or its per-sample gradients are unknown."""
    layer = registered().get(type(module))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "mixes the samples of a batch; use nn.GroupNorm instead"
    if layer is not None and not isinstance(getattr(module, "weight", None), nn.Parameter | None):
        return "makes its weight from others; use a plain weight"
    if keeps_statistics(module):
        return "keeps statistics over samples; it cannot be trained with privacy"
    if layer is not None:
        return layer.refusal(module)
    if isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU):
        return "draws at random for the whole batch; use nn.Dropout, whose rows have numbers of their own"
    if not all(_one_for_all(parameter) for parameter in module.parameters(recurse=False)):
        known = ", ".join(sorted(kind.__name__ for kind in registered()))
        return f"has no known per-sample gradient; use one of {known}, or a parameter of shape [1, …]"
    return ""


def _one_for_all(parameter: nn.Parameter) -> bool:
    """True where a module's own parameter has one entry for all samples along its first dimension: ``[1, …]``."""
    return parameter.dim() > 1 and len(parameter) == 1


def _expanded(module: nn.Module, tape: Tape, *inputs: Any, **named: Any) -> Any:
    """Output of a module whose own parameters ``[1, …]`` stand there as one for each sample: ``[B, …]``.

    Whether the module uses them sample by sample, ``independence`` sees.
    """
    own = dict(module.named_parameters(recurse=False))
    try:
        for name, parameter in own.items():
            module.__dict__[name] = expanded(tape, parameter)
        return type(module).forward(module, *inputs, **named)
    finally:
        for name in own:
            module.__dict__.pop(name, None)


def _recorded(
    recording: Callable[..., Any], plain: Callable[..., Any], module: nn.Module, *inputs: Any, **named: Any
) -> Any:
    if not torch.is_grad_enabled():
        return plain(module, *inputs, **named)
    return recording(*inputs, **named)
