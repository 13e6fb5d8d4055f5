"""The average of a study's global models over its rounds, which its last model is where the contract says so.

Rounds see models that noise moves about; their average moves less (Polyak & Juditsky 1992; with differential privacy De
et al. 2022, section 3.2). It is computed from models that the sites have been shown: post-processing, which costs no
privacy and needs nothing of the sites.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PIECE = 1 << 20
"""Coordinates averaged at a time."""


def averaged(
    before: npt.NDArray[np.float64] | None, model: npt.NDArray[np.float32], decay: float, number: int
) -> npt.NDArray[np.float64]:
    """The average Σ decay^(n-i) modelᵢ / Σ decay^(n-i) of the models after rounds i = 1 … n: float64 ``[t]``.

    The weights add up to 1 after every round, so that the initial weights are no part of it (the correction of Kingma &
    Ba 2015, section 3, for a start at zero).

    Args:
        before: what this gave for round ``number`` - 1; None for the first round.
        model: trained part of the global weights after round ``number``, ``[t]``; not changed.
        decay: in (0, 1).
        number: n, from 1.

    Raises:
        ValueError: no average before round ``number``, one before the first, or of another size.

    >>> first = averaged(None, np.array([2.0], np.float32), 0.5, 1)
    >>> averaged(first, np.array([5.0], np.float32), 0.5, 2).tolist()
    [4.0]
    """
    if (before is None) != (number == 1) or (before is not None and before.shape != model.shape):
        found = "none" if before is None else str(before.shape)
        raise ValueError(f"round {number}, model {model.shape}: the average before it is {found}")
    if before is None:
        return model.astype(np.float64)
    share, after = (1.0 - decay) / (1.0 - decay**number), np.empty(model.shape)
    for start in range(0, model.size, PIECE):
        part = slice(start, start + PIECE)
        after[part] = before[part] + share * (model[part].astype(np.float64) - before[part])
    return after
