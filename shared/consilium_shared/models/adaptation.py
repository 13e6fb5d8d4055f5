"""Parameters of a model that a study trains: all, its head, or its head and low-rank additions to other weights.

Low rank (LoRA; Hu et al. 2021): a frozen linear or convolutional layer W gets B·A beside it, A to r outputs, B from r:
r (inputs + outputs) numbers instead of inputs · outputs. A begins as torch begins such a layer, B at zero, so that the
model is at first exactly the one without them. Both are ordinary layers without bias, which whatever knows per-sample
gradients of ``nn.Linear`` and ``nn.Conv2d`` knows. Their factor α/r is left at 1: the learning rate has it.

The mean of the sites' A and of their B is not the A and B of their mean product (Sun et al. 2024); the difference is
of second order in what a round changes.
"""

from __future__ import annotations

import torch
from torch import nn

from consilium_shared.architecture import Architecture

HEAD = "head"
"""The last linear layer's name in every model."""
BASE = "base"
"""The frozen layer's name within a ``LowRank``."""


class LowRank(nn.Module):
    """``base`` frozen, plus ``up(down(x))``: the same shapes in and out."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int) -> None:
        """``rank``: of the addition; at most that of the layer's weight as a matrix ``[outputs, inputs · kernel]``."""
        super().__init__()
        self.base = base
        rank = min(rank, base.weight.shape[0], base.weight[0].numel())
        self.down: nn.Module
        self.up: nn.Linear | nn.Conv2d
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
        else:
            window, stride = (base.kernel_size[0], base.kernel_size[1]), (base.stride[0], base.stride[1])
            padding = base.padding if isinstance(base.padding, str) else (base.padding[0], base.padding[1])
            dilation = (base.dilation[0], base.dilation[1])
            self.down = nn.Conv2d(base.in_channels, rank, window, stride, padding, dilation, bias=False)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Sum of the layer's output and the addition's."""
        found: torch.Tensor = self.base(inputs) + self.up(self.down(inputs))
        return found


def start_at(model: nn.Module, rates: tuple[float, ...] | None) -> None:
    """Set the last layer's bias to where, its inputs aside, these rates of the outputs are predicted, in place."""
    if rates is not None:
        head = model.get_submodule(HEAD)
        assert isinstance(head, nn.Linear)  # noqa: S101  (it is the last linear layer)
        logs = torch.tensor(rates, dtype=torch.float64).log()
        with torch.no_grad():
            head.bias.copy_(logs - logs.mean())


def adapt(model: nn.Module, spec: Architecture) -> None:
    """Freeze what the study does not train, and add what it adds, in place."""
    if spec.trainable == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{HEAD}."))
    if spec.lora_rank is None:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and name != HEAD:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LowRank(module, spec.lora_rank))


def plain_name(name: str) -> str:
    """A parameter's name in the same model without additions of low rank."""
    return name.replace(f".{BASE}.", ".")


def added(name: str) -> bool:
    """True for a parameter of a low-rank addition."""
    return name.rpartition(".")[0].endswith((".down", ".up"))
