"""Layer: what a kind of torch module needs so that the engine knows the gradient of each sample at its weights.

A layer is added by one file in ``dpsgd/layers`` that sets ``LAYERS``; ``registry`` finds it there, and the suite
``tests/unit/dpsgd/test_layers.py`` tests its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Example:
    """A module and inputs for it, for the suite.

    Attributes:
        module: with weights that are not all alike.
        inputs: gives the module's inputs for B samples; the first dimension of each is B.
        name: says what is special about it, for the test's name.
    """

    module: nn.Module
    inputs: Callable[[int], tuple[Tensor, ...]]
    name: str = "plain"


@dataclass(frozen=True)
class Layer:
    """Kind of module with known per-sample gradients.

    Attributes:
        kind: its exact class; a subclass may compute something else and is another kind.
        forward: ``forward(module, tape, *inputs, **named)`` gives what ``module(*inputs, **named)`` gives, and in its
            backward pass leaves records on the tape (``Tape.record_gradients`` and its like). Autograd computes no
            gradient of a weight.
        examples: modules and inputs on which the suite holds the layer against single samples.
        refusal: why a module of this kind cannot be trained with privacy, and what to use instead; "" where it can.
        whole: its submodules are computed by ``forward``, and none of them on its own.
        without_weights: also where it has no weights, ``forward`` stands in for the module's own.
    """

    kind: type[nn.Module]
    forward: Callable[..., Any]
    examples: Callable[[], Iterator[Example]]
    refusal: Callable[[Any], str] = lambda _: ""
    whole: bool = False
    without_weights: bool = False


def in_autocast(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inputs, weight and bias in the precision that autocast asks for."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not torch.is_autocast_enabled(inputs.device.type):
        return inputs, weight, bias
    low = torch.get_autocast_dtype(inputs.device.type)
    return inputs.to(low), None if weight is None else weight.to(low), None if bias is None else bias.to(low)


def random(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of an example: one tensor ``[B, *shape]`` of normal deviates."""
    return lambda batch: (torch.randn(batch, *shape),)


def uneven(module: nn.Module) -> nn.Module:
    """The module with normal deviates as weights: an example's weights must not hide what lies below them."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module
