"""Dropout of a record's own: the mask of a row follows from the row's seed alone, not from its place or its neighbours.

torch's own dropout draws one row after the other from one generator: who is drawn before a record decides its mask.
Here each row has a seed (``Tape.open``), so that a step that begins again, in other microbatches or after a crash,
drops what it dropped before, and a row's gradient is the same bits beside anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from dpsgd.layer import Example, Layer, random
from dpsgd.tape import Tape

Dropout = nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d


def forward(module: Dropout, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``, with numbers dropped one by one; see ``Layer.forward``."""
    return tape.dropout(inputs, module.p) if module.training else inputs


def by_channel(module: Dropout, tape: Tape, inputs: Tensor) -> Tensor:
    """Output of ``module``, with whole channels dropped; see ``Layer.forward``."""
    return tape.dropout(inputs, module.p, whole_from=2) if module.training else inputs


def examples(kind: type[Any], *shape: int) -> Callable[[], Iterator[Example]]:
    """Example with inputs of this shape."""
    return lambda: iter([Example(kind(0.4), random(*shape))])


LAYERS = [
    Layer(nn.Dropout, forward, examples(nn.Dropout, 8, 5), without_weights=True),
    *(
        Layer(kind, by_channel, examples(kind, 8, *[3] * pixels), without_weights=True)
        for pixels, kind in ((1, nn.Dropout1d), (2, nn.Dropout2d), (3, nn.Dropout3d))
    ),
]
