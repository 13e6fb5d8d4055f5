"""Recurrent models of a series: float32 ``[B, T, D]`` (and statics ``[B, K]``) to logits ``[B, C]``.

A recurrent layer here is two ordinary ``nn.Linear`` layers, ``inputs`` and ``state``, each applied once to all T
steps, and one scan between them. So its parameters have the same names with and without privacy, and whatever knows
the per-sample gradient of a linear layer over ``[B, T, ·]`` knows the layer's: no product is formed for every step.

How the gradient stays exact: a first scan without gradient finds all states h; ``state`` then maps h[t-1] of all
steps at once; the scan's backward pass runs backward through time with the weight held constant and gives the gradient
at every gate, which is just what the two linear layers need for theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def _previous(states: torch.Tensor) -> torch.Tensor:
    """States ``[B, T, H]`` one step later, beginning at zero."""
    return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)


class _GRUScan(torch.autograd.Function):
    """Gated recurrent unit (Cho et al. 2014, in the form of cuDNN: the reset gate acts after the product).

    r, z = σ(a + b);  n = tanh(a + r b);  h = (1 - z) n + z h', where a comes from the inputs and b from h' = h[t-1].
    """

    @staticmethod
    def states(a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """States ``[B, T, H]`` for input gates ``a`` of shape ``[B, T, 3H]``."""
        width = weight.shape[1]
        h, found, transposed = a.new_zeros(a.shape[0], width), [], weight.t()
        for step in a.unbind(1):
            b = torch.addmm(bias, h, transposed)
            r, z = torch.sigmoid(step[:, : 2 * width] + b[:, : 2 * width]).chunk(2, dim=1)
            n = torch.tanh(torch.addcmul(step[:, 2 * width :], r, b[:, 2 * width :]))
            h = torch.lerp(n, h, z)
            found.append(h)
        return torch.stack(found, dim=1)

    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, previous: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """States again, all steps at once."""
        width = weight.shape[1]
        r, z = torch.sigmoid(a[..., : 2 * width] + b[..., : 2 * width]).chunk(2, dim=-1)
        n = torch.tanh(torch.addcmul(a[..., 2 * width :], r, b[..., 2 * width :]))
        ctx.save_for_backward(r, z, n, b[..., 2 * width :], previous, weight)
        return torch.lerp(n, previous, z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients at a and b, backward through time."""
        r, z, n, b_n, previous, weight = ctx.saved_tensors
        into_n = (1 - z) * (1 - n * n)
        into_r, into_z = into_n * b_n * r * (1 - r), (previous - n) * z * (1 - z)
        by_state = torch.stack([into_r, into_z, into_n * r], dim=2)  # [B, T, 3, H]: gate gradient over h's
        later, deltas = torch.zeros_like(z[:, 0]), []
        for t in range(z.shape[1] - 1, -1, -1):
            at_h = grad[:, t] + later
            delta = (by_state[:, t] * at_h.unsqueeze(1)).flatten(1)
            later = torch.addmm(at_h * z[:, t], delta, weight)
            deltas.append((delta, at_h))
        deltas.reverse()
        d_b = torch.stack([delta for delta, _ in deltas], dim=1)
        d_n = into_n * torch.stack([at_h for _, at_h in deltas], dim=1)
        d_a = torch.cat([d_b[..., : 2 * z.shape[-1]], d_n], dim=-1)
        return d_a, d_b, None, None


class _LSTMScan(torch.autograd.Function):
    """Long short-term memory (Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000).

    i, f, o = σ(·), g = tanh(·) of a + b;  c = f c' + i g;  h = o tanh(c). Gates are in the order i, f, o, g.
    """

    @staticmethod
    def states(a: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States and cells, each ``[B, T, H]``, for input gates ``a`` of shape ``[B, T, 4H]``."""
        width = weight.shape[1]
        h = c = a.new_zeros(a.shape[0], width)
        states, cells, transposed = [], [], weight.t()
        for step in a.unbind(1):
            gates = torch.addmm(step, h, transposed)
            i, f, o = torch.sigmoid(gates[:, : 3 * width]).chunk(3, dim=1)
            c = torch.addcmul(f * c, i, torch.tanh(gates[:, 3 * width :]))
            h = o * torch.tanh(c)
            states.append(h)
            cells.append(c)
        return torch.stack(states, dim=1), torch.stack(cells, dim=1)

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, cells: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """States again, all steps at once."""
        width, gates = weight.shape[1], a + b
        i, f, o = torch.sigmoid(gates[..., : 3 * width]).chunk(3, dim=-1)
        g, squashed = torch.tanh(gates[..., 3 * width :]), torch.tanh(cells)
        ctx.save_for_backward(i, f, o, g, squashed, cells, weight)
        states: torch.Tensor = o * squashed
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients at a and b, backward through time."""
        i, f, o, g, squashed, cells, weight = ctx.saved_tensors
        from_c = torch.stack([g * i * (1 - i), _previous(cells) * f * (1 - f)], dim=2)  # [B, T, 2, H]
        from_c_g = (i * (1 - g * g)).unsqueeze(2)
        from_h_o, into_c = (squashed * o * (1 - o)).unsqueeze(2), o * (1 - squashed * squashed)
        later_h = later_c = torch.zeros_like(i[:, 0])
        deltas = []
        for t in range(i.shape[1] - 1, -1, -1):
            at_h = grad[:, t] + later_h
            at_c = torch.addcmul(later_c, at_h, into_c[:, t])
            wide_c, wide_h = at_c.unsqueeze(1), at_h.unsqueeze(1)
            parts = [from_c[:, t] * wide_c, from_h_o[:, t] * wide_h, from_c_g[:, t] * wide_c]
            delta = torch.cat(parts, dim=1).flatten(1)
            later_h, later_c = delta @ weight, at_c * f[:, t]
            deltas.append(delta)
        deltas.reverse()
        d = torch.stack(deltas, dim=1)
        return d, d, None, None


class _Recurrent(nn.Module):
    """The two linear layers of a recurrent layer, initialised as torch does: uniform within ±1/√H."""

    def __init__(self, inputs: int, hidden: int, gates: int, state_bias: bool) -> None:
        super().__init__()
        self.inputs = nn.Linear(inputs, gates * hidden)
        self.state = nn.Linear(hidden, gates * hidden, bias=state_bias)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)


class GRU(_Recurrent):
    """Series ``[B, T, D]`` to states ``[B, T, H]``."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, gates=3, state_bias=True)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """States ``[B, T, H]``."""
        a, weight = self.inputs(series), self.state.weight.detach()
        with torch.no_grad():
            previous = _previous(_GRUScan.states(a, weight, self.state.bias))
        states: torch.Tensor = _GRUScan.apply(a, self.state(previous), previous, weight)  # type: ignore[no-untyped-call]
        return states


class LSTM(_Recurrent):
    """Series ``[B, T, D]`` to states ``[B, T, H]``. The forget gate starts open, bias 1 (Jozefowicz et al. 2015)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, gates=4, state_bias=False)
        with torch.no_grad():
            self.inputs.bias[hidden : 2 * hidden] = 1.0

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """States ``[B, T, H]``."""
        a, weight = self.inputs(series), self.state.weight.detach()
        with torch.no_grad():
            found, cells = _LSTMScan.states(a, weight)
        states: torch.Tensor = _LSTMScan.apply(a, self.state(_previous(found)), cells, weight)  # type: ignore[no-untyped-call]
        return states


class SequenceClassifier(nn.Module):
    """Recurrent layers one above the other; the head sees the last state, the mean of all states, and the statics."""

    def __init__(
        self, layer: type[GRU | LSTM], inputs: int, statics: int, classes: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.recurrent = nn.ModuleList(layer(inputs if i == 0 else hidden, hidden) for i in range(layers))
        self.head = nn.Linear(2 * hidden + statics, classes)

    def forward(self, series: torch.Tensor, statics: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, C]`` of series ``[B, T, D]`` and, where the study has them, statics ``[B, K]``."""
        for layer in self.recurrent:
            series = layer(series)
        parts = [series[:, -1], series.mean(1)]
        if statics is not None:
            parts.append(statics)
        logits: torch.Tensor = self.head(torch.cat(parts, dim=1))
        return logits
