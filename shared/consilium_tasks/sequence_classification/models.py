"""Recurrent models of a series: float32 ``[B, T, D]`` (and statics ``[B, K]``) to logits ``[B, C]``.

The recurrent layers are torch's own, so a trained model's weights load into a plain ``nn.LSTM`` or ``nn.GRU``.
"""

from __future__ import annotations

import torch
from torch import nn

from consilium_shared.study import Study
from consilium_tasks.classification.task import classes_of, options_of
from consilium_tasks.sequence_classification import series_of


class SequenceClassifier(nn.Module):
    """Recurrent layers one above the other; the head sees the last state, the mean of all states, and the statics."""

    def __init__(
        self, layer: type[nn.LSTM | nn.GRU], inputs: int, statics: int, classes: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.recurrent = layer(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(2 * hidden + statics, classes)
        if isinstance(self.recurrent, nn.LSTM):
            open_forget_gates(self.recurrent)

    def forward(self, series: torch.Tensor, statics: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, C]`` of series ``[B, T, D]`` and, where the study has them, statics ``[B, K]``."""
        states: torch.Tensor = self.recurrent(series)[0]
        parts = [states[:, -1], states.mean(1)]
        if statics is not None:
            parts.append(statics)
        logits: torch.Tensor = self.head(torch.cat(parts, dim=1))
        return logits


def open_forget_gates(layer: nn.LSTM) -> None:
    """Let a fresh LSTM begin by remembering: bias 1 at every forget gate (Jozefowicz et al. 2015).

    At torch's start, about 0, half of a cell is gone after each step, and with it the gradient of earlier steps. Each
    gate has two biases that are added; one is set to 1, the other to 0. torch's order of gates is i, f, g, o.
    """
    forget = slice(layer.hidden_size, 2 * layer.hidden_size)
    with torch.no_grad():
        for name, bias in layer.named_parameters():
            if name.startswith("bias"):
                bias[forget] = 1.0 if name.startswith("bias_ih") else 0.0


def lstm(study: Study) -> SequenceClassifier:
    """An LSTM as the contract has it."""
    return _classifier(nn.LSTM, study)


def gru(study: Study) -> SequenceClassifier:
    """A GRU as the contract has it."""
    return _classifier(nn.GRU, study)


def _classifier(layer: type[nn.LSTM | nn.GRU], study: Study) -> SequenceClassifier:
    series, options = series_of(study), options_of(study)
    return SequenceClassifier(
        layer, series.inputs, series.statics_width, classes_of(study), options.hidden, options.layers
    )
