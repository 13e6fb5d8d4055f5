"""Learned constants: a tensor added to every sample (positions), and one put before every series (a class token).

The gradient of a sample at a constant that is added, or put beside, is the gradient at its place in that sample.
``registry`` treats a parameter ``[1, …]`` of any other module in the same way: as one for each sample of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer, random, uneven
from dpsgd.tape import Tape


class AddedConstant(nn.Module):
    """Learned tensor that is added to every sample, as of positions.

    >>> AddedConstant(48, 16)(torch.zeros(2, 48, 16)).shape
    torch.Size([2, 48, 16])
    """

    def __init__(self, *shape: int) -> None:
        """``shape``: of one sample, without the batch."""
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, *shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, *shape]`` to ``[B, *shape]``."""
        return inputs + self.weight


class ClassToken(nn.Module):
    """Learned vector that is put before every series.

    >>> ClassToken(16)(torch.zeros(2, 48, 16)).shape
    torch.Size([2, 49, 16])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, T, width]`` to ``[B, 1 + T, width]``."""
        return torch.cat([self.weight.expand(len(inputs), -1, -1), inputs], dim=1)


class _Expanded(torch.autograd.Function):
    """A parameter ``[1, …]`` as one for each sample: ``[B, …]``."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch: int, record: Callable[[Tensor], None], _: Tensor) -> Tensor:
        ctx.record = record
        return parameter.detach().expand(batch, *parameter.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if len(grad):
            ctx.record(grad)
        return None, None, None, None


def expanded(tape: Tape, parameter: nn.Parameter) -> Tensor:
    """``parameter`` ``[1, …]`` as ``[B, …]``, of each sample of the open batch; its gradients go to ``tape``."""

    def record(grad: Tensor) -> None:
        tape.record_gradients(parameter, grad)

    begin = torch.empty(0, requires_grad=parameter.requires_grad)
    found: Tensor = _Expanded.apply(parameter, tape.owners.batch, record, begin)  # type: ignore[no-untyped-call]
    return found


def added(module: AddedConstant, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""
    return inputs + expanded(tape, module.weight)


def before(module: ClassToken, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``; see ``Layer.forward``."""
    return torch.cat([expanded(tape, module.weight).to(inputs.dtype), inputs], dim=1)


LAYERS = [
    Layer(AddedConstant, added, lambda: _examples(AddedConstant(5, 4))),
    Layer(ClassToken, before, lambda: _examples(ClassToken(4))),
]


def _examples(module: nn.Module) -> Iterator[Example]:
    yield Example(uneven(module), random(5, 4))
