"""Tuning of a history's ε: the tilt, and how fine a lattice. Only speed and tightness depend on what is here."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

from consilium_shared.privacy.loss import Floats, support

_EXCESS = 3e-6
"""Largest excess of ε by the lattice, relative to it, where points suffice."""

_POINTS = 1e6
"""Points for all distinct steps together, beyond which the lattice gets coarser."""

_NODES = 25
"""Points at which a loss is looked at, for each of the two normal distributions of a step."""


def tuned(q: Floats, sigma: Floats, steps: Floats, delta: float, tail: float) -> tuple[float, float]:
    """The tilt θ and the lattice's interval h.

    θ is where the Rényi bound, (K(θ) + log(1/δ) + θ·log θ − (1 + θ)·log(1 + θ)) / θ, is least (Canonne, Kamath &
    Steinke 2020, proposition 12; K from a few points of the two normal distributions). Of h: to round a loss l to the
    lattice adds, at order θ, about θ(θ + 1)/2 · min(h²/6, h·|l|) to K, hence (θ + 1)/2 times that to ε.

    Args:
        q: sampling rates, float64 [pairs].
        sigma: noise multipliers, float64 [pairs].
        steps: how many of each, float64 [pairs].
        delta: δ.
        tail: probability of a step's loss that is not looked at.
    """
    low, high = support(q, sigma, tail)
    share = np.linspace(0, 1, _NODES)
    top = np.minimum(-ndtri(np.minimum(tail / q, 0.5)), 12.0)[:, None]
    u = -8 + (top + 8) * share
    drawn, free = _node_loss(u + 1 / sigma[:, None], q, sigma), _node_loss(u, q, sigma)
    loss = np.clip(np.concatenate([free, drawn], axis=1), low[:, None], high[:, None])
    log_step = np.log((top + 8) / (_NODES - 1)) - u**2 / 2 - 0.5 * math.log(2 * math.pi)
    with np.errstate(divide="ignore"):
        log_weight = np.concatenate([log_step + np.log1p(-q)[:, None], log_step + np.log(q)[:, None]], axis=1)

    def tilted(theta: float) -> tuple[float, float, float, Floats]:
        exponent = log_weight + theta * loss
        peak = exponent.max(axis=1, keepdims=True)
        weight = np.exp(exponent - peak)
        total = weight.sum(axis=1)
        mean = (weight * loss).sum(axis=1) / total
        variance = np.maximum((weight * loss**2).sum(axis=1) / total - mean**2, 1e-300)
        k = float(steps @ (np.log(total) + peak[:, 0]))
        absolute = (weight * np.abs(loss)).sum(axis=1) / total
        return k, float(steps @ mean), float(steps @ variance), absolute

    goal = max(math.log(1 / delta), 0.1)
    k, mean, variance, absolute = tilted(0.0)
    k0 = k
    theta, below, above = math.sqrt(2 * goal / variance), 0.0, math.inf
    for _ in range(60):
        k, mean, variance, absolute = tilted(theta)
        depth = theta * mean - (k - k0) + math.log1p(theta)  # grows with θ; at the best order it is log(1/δ)
        below, above = (theta, above) if depth < goal else (below, theta)
        if abs(depth - goal) < 1e-6 * goal or above - below < 1e-9 * theta:
            break
        step = math.log(goal / max(depth, 1e-12)) * max(depth, 1e-12) / (theta**2 * variance + theta / (1 + theta))
        proposed = theta * math.exp(min(max(step, -2.0), 2.0))
        if not below < proposed < above:
            proposed = 2 * theta if math.isinf(above) else (below + above) / 2
        theta = proposed
    estimate = mean + math.log(theta / (1 + theta))
    allowed = 2 * _EXCESS * max(estimate, math.sqrt(variance) / 10) / (theta + 1)
    fine, coarse = math.log(1e-12), math.log(10.0)
    for _ in range(50):
        middle = (fine + coarse) / 2
        h = math.exp(middle)
        excess = float(steps @ (1 / (6 / h**2 + 1 / (h * absolute))))
        fine, coarse = (middle, coarse) if excess < allowed else (fine, middle)
    interval = math.exp(fine)
    rounding = (384 * 2.0**-53 * float(steps @ absolute / steps.sum()) / (theta * (theta + 1))) ** 0.25
    return theta, math.hypot(interval, rounding, float((high - low).sum()) / _POINTS)


def _node_loss(z: Floats, q: Floats, sigma: Floats) -> Floats:
    q, sigma = q[:, None], sigma[:, None]
    exponent = np.clip(z / sigma - 0.5 / sigma**2, -700, 700)
    with np.errstate(divide="ignore"):
        return np.where(q == 1, exponent, np.log1p(q * np.expm1(exponent)))
