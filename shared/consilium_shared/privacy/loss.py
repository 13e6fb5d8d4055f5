"""The privacy loss of one Poisson-sampled Gaussian step, rounded to a lattice so that it never gets smaller.

A step releases x from P = (1 − q)·N(0, σ²) + q·N(1, σ²) with the patient, or from Q = N(0, σ²) without. (This pair is
the worst case: Zhu, Dong & Wang 2022, theorem 11.) Its loss is l(x) = log(P/Q) = log(1 − q + q·r), with
r = exp((2x − 1) / 2σ²), and grows with x.

"Connect the dots" (Doroshenko et al. 2022, theorem 3.1): what falls between two points of the lattice is divided among
them so that its probability under P and that under Q both stay as they are. The pair of distributions that results
dominates the true pair in both directions. With G = N(1, σ²), cell by cell of width h from point i:

    to i + 1:  q·(G(cell) − r_i·Q(cell)) / (1 − e^−h)        to i:  q·(r_{i+1}·Q(cell) − G(cell)) / (e^h − 1)

which has no cancellation beyond that of two tails of the normal distribution; what that loses is added back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_ROUNDING = 16 * 2.0**-53
"""Bound of the relative error of one tail of the normal distribution and of the arithmetic of a cell."""

_BATCH = 1 << 18
"""Points worked on at once: what stays in a processor's cache."""


@dataclass(frozen=True)
class Losses:
    """The distributions of some steps' losses under P, on the lattice of multiples of an interval.

    Attributes:
        index: the positions, among all steps, of those in here; int64 [b].
        first: for each, the lattice index of its first point; int64 [b].
        mass: probabilities under P, never below the true ones; float64 [b, m]. Under Q they are mass · e^−loss.
        lost: bound of what P has above the last point, to be counted as lost; float64 [b].
        lost_reversed: bound of what Q has below the first point; float64 [b].
    """

    index: Integers
    first: Integers
    mass: Floats
    lost: Floats
    lost_reversed: Floats


def support(q: Floats, sigma: Floats, tail: float) -> tuple[Floats, Floats]:
    """Losses between which all but ``tail`` of the probability lies: of P above, of Q below. Float64 [pairs] each."""
    low = sigma * ndtri(tail)
    high = 1 - sigma * ndtri(np.minimum(tail / q, 0.5))
    return _loss(low, q, sigma), _loss(high, q, sigma)


def discretised(q: Floats, sigma: Floats, interval: float, tail: float) -> Iterator[Losses]:
    """The losses of one step of each pair, in batches of pairs with about equally many points.

    Args:
        q: sampling rates, float64 [pairs], in (0, 1].
        sigma: noise multipliers, float64 [pairs], at least 0.1.
        interval: distance h of the lattice's points.
        tail: what may be lost at each end.
    """
    low, high = support(q, sigma, tail)
    first = np.minimum(np.floor(low / interval), -1).astype(np.int64)
    points = np.maximum(np.ceil(high / interval), 1).astype(np.int64) - first + 1
    order = np.argsort(points, kind="stable")
    start = 0
    while start < len(order):
        end, least = start + 1, points[order[start]]
        while end < len(order) and (end + 1 - start) * points[order[end]] <= _BATCH and points[order[end]] < 2 * least:
            end += 1
        index = order[start:end].astype(np.int64)
        yield _batch(index, q[index, None], sigma[index, None], first[index], int(points[index[-1]]), interval)
        start = end


def _batch(index: Integers, q: Floats, sigma: Floats, first: Integers, points: int, h: float) -> Losses:
    loss = (first[:, None] + np.arange(points)) * h
    with np.errstate(divide="ignore", invalid="ignore"):
        r = 1 + np.expm1(loss) / q
        logarithm = np.where(q == 1, loss, np.log(np.maximum(r, 0)))
        near = np.abs(r - 1) < 0.5
        logarithm[near] = np.log1p((np.expm1(loss) / q)[near])
    z = (0.5 + sigma**2 * logarithm) / sigma
    q_cell, q_tail = _cells(z)
    g_cell, g_tail = _cells(z - 1 / sigma)
    above, below = -np.expm1(-h), np.expm1(h)
    size = q * (g_tail + np.abs(r[:, :-1]) * q_tail + (2 + np.abs(r[:, 1:])) * q_cell) * _ROUNDING
    mass = np.zeros_like(loss)
    mass[:, 1:] = (np.maximum(q * (g_cell - r[:, :-1] * q_cell), 0) + size) / above
    mass[:, :-1] += (np.maximum(q * (r[:, 1:] * q_cell - g_cell), 0) + size * np.exp(h)) / below
    q_above, q_below, g_above = ndtr(-z[:, -1]), ndtr(z[:, 0]), ndtr(-(z[:, -1] - 1 / sigma[:, 0]))
    mass[:, 0] += (1 - q[:, 0]) * q_below + q[:, 0] * ndtr(z[:, 0] - 1 / sigma[:, 0])
    mass[:, -1] += np.exp(loss[:, -1]) * q_above
    return Losses(index, first, mass, q[:, 0] * g_above, q_below)


def _cells(z: Floats) -> tuple[Floats, Floats]:
    """Normal probability between neighbours of ``z``, and a bound of the tails it was computed from."""
    tail = ndtr(-np.abs(z))
    left, right = tail[:, :-1], tail[:, 1:]
    across = (z[:, :-1] < 0) & (z[:, 1:] >= 0)
    return np.where(across, 1 - left - right, np.abs(left - right)), np.where(across, 1.0, np.maximum(left, right))


def _loss(x: Floats, q: Floats, sigma: Floats) -> Floats:
    exponent = (2 * x - 1) / (2 * sigma**2)
    with np.errstate(over="ignore", divide="ignore"):
        loss = np.where(exponent > 30, exponent + np.log(q + (1 - q) * np.exp(-exponent)), 0)
        small = np.log1p(q * np.expm1(np.minimum(exponent, 30)))
    return np.where(exponent > 30, loss, np.where(q == 1, exponent, small))
