"""Tables of scores by outcome, and what is read off one: average precision, calibration, calibration error.

A table is numbers ``[…, 2, bins]``: how many negatives (row 0) and positives (row 1) have a score in each bin, the
lowest first. Leading dimensions are tables side by side. Counts may carry noise; ``settled`` takes out of a noised
table what no table of counts can be, and everything here reads a settled one, so that a metric stays in its range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]

DECILES = 10
"""Even parts of the probabilities, over which the calibration error is summed."""

WAVES = 12
"""Half waves of a smoothed histogram, the first of which is constant."""

_STEPS = 30
_STEEPEST = 50.0
"""Largest slope and intercept that a fit may reach: beyond, the scores of the two outcomes hardly overlap."""


def settled(table: npt.NDArray[Any]) -> Table:
    """Nearest table without negative numbers in which either outcome has as many records as before ``[…, 2, bins]``.

    NaN where an outcome has none. Counts without noise are given back as they are.

    >>> settled(np.array([[4.0, -1.0, 5.0], [0.0, 2.0, 3.0]])).tolist()
    [[3.5, 0.0, 4.5], [0.0, 2.0, 3.0]]
    """
    numbers = table.astype(np.float64)
    totals = numbers.sum(axis=-1, keepdims=True)
    falling = -np.sort(-numbers, axis=-1)
    over = (np.cumsum(falling, axis=-1) - totals) / np.arange(1, numbers.shape[-1] + 1)
    kept = np.maximum((falling > over).sum(axis=-1, keepdims=True), 1)
    cut = np.take_along_axis(over, kept - 1, axis=-1)
    return np.where(totals > 0, np.maximum(numbers - cut, 0.0), np.nan)


def smoothed(table: npt.NDArray[Any]) -> Table:
    """Table ``[…, 2, bins]`` without what changes from bin to bin faster than ``WAVES`` half waves: that is noise."""
    bins = table.shape[-1]
    middles = (np.arange(bins) + 0.5) / bins
    waves = np.cos(np.pi * np.arange(min(WAVES, bins))[:, None] * middles)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    found: Table = table.astype(np.float64) @ (waves.T @ waves)
    return found


def average_precision(table: Table) -> Vector:
    """Area under the precision-recall curve ``[…]``: the mean over positives of the precision down to them.

    Within a bin records stand in no order: its positives have the precision in its middle.

    >>> average_precision(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])).item()
    0.875
    """
    positive, everybody = table[..., 1, ::-1], table.sum(axis=-2)[..., ::-1]
    right, called = (np.cumsum(each, axis=-1) - each / 2 for each in (positive, everybody))
    precision = np.divide(right, called, out=np.zeros_like(called), where=called > 0)
    found: Vector = (positive * precision).sum(axis=-1) / positive.sum(axis=-1)
    return found


def calibration_error(table: Table, probabilities: Vector) -> Vector:
    """Expected calibration error ``[…]``: the mean distance of probability and frequency, by tenths of the probability.

    Args:
        table: ``[…, 2, bins]``.
        probabilities: of each bin ``[bins]``.
    """
    tenth = np.minimum((probabilities * DECILES).astype(np.int64), DECILES - 1)
    members = (tenth[:, None] == np.arange(DECILES)).astype(np.float64)
    everybody = table.sum(axis=-2)
    expected, seen = (everybody * probabilities) @ members, table[..., 1, :] @ members
    found: Vector = np.abs(expected - seen).sum(axis=-1) / everybody.sum(axis=-1)
    return found


def calibration(table: Table, logits: Vector, *, sloped: bool = True) -> tuple[Vector, Vector]:
    """Intercept and slope of the logistic regression of the outcome on the score's logit, each ``[…]``.

    Scores are calibrated where these are 0 and 1; ``intercept + slope * logit`` is the recalibrated logit. NaN where an
    outcome has no record, or the scores of the two hardly overlap.

    Args:
        table: ``[…, 2, bins]``.
        logits: of each bin ``[bins]``.
        sloped: False holds the slope at 1; the intercept is then how far all logits together are from the outcome.

    >>> logits = np.array([-1.0, 0.0, 1.0])
    >>> a, b = calibration(np.array([[731.0, 500.0, 269.0], [269.0, 500.0, 731.0]]), logits)
    >>> round(abs(float(a)), 3), round(float(b), 3)
    (0.0, 1.0)
    """
    everybody, positive = table.sum(axis=-2), table[..., 1, :]
    design = np.stack([np.ones_like(logits), logits], axis=-1)[:, : 2 if sloped else 1]
    offset = np.zeros_like(logits) if sloped else logits
    found = np.zeros((*everybody.shape[:-1], design.shape[1]))
    with np.errstate(all="ignore"):
        for _ in range(_STEPS):
            fitted = 1.0 / (1.0 + np.exp(-(found @ design.T + offset)))
            gradient = (positive - everybody * fitted) @ design
            weights = everybody * fitted * (1.0 - fitted)
            curvature = np.einsum("...b,bi,bj->...ij", weights, design, design) + 1e-9 * np.eye(design.shape[1])
            step = np.linalg.solve(np.nan_to_num(curvature) + 1e-12 * np.eye(design.shape[1]), gradient[..., None])
            found = found + np.clip(step[..., 0], -2.0, 2.0)
        beyond = ~(np.abs(found) < _STEEPEST).all(axis=-1)
        moving = ~(np.abs(step[..., 0]) < 1e-3).all(axis=-1)
    found = np.where(np.expand_dims(beyond | moving, -1), np.nan, found)
    slopes: Vector = found[..., 1] if sloped else np.ones(found.shape[:-1])
    return found[..., 0], slopes
