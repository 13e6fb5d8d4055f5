"""The ε of many steps together, by a Fourier series of the tilted distribution of their losses.

The losses of independent steps add (Sommer, Meiser & Mohammadi 2019), and adaptive choices change nothing (Dong, Roth &
Su 2022, theorem 3.2). With S the sum, δ(ε) = E[(1 − e^(ε − S))⁺] under P; likewise for −S under Q, the other direction
of add-or-remove-one. δ is far below what a Fourier transform resolves in float64, so the distributions are tilted
first: weighed by e^(θ·loss), with the order θ at which the Rényi bound of the same history is least, S lies around ε
and errors are relative to δ (Wilson & Keich 2016; Alghamdi et al. 2022, section 3). Then

    δ(ε) = e^(K − θε) · Σ over s > ε of (1 − e^(ε − s))·e^(−θ(s − ε)) · (probability of s, tilted)

where K is the logarithm of the moment generating function at θ and the probabilities come from the product of the
steps' characteristic functions, periodic over a window of S. Errors, each added to δ:

* what lies above the window: Chernoff's bound at further orders. What lies below it is folded in, which only adds;
* frequencies left out, as the product is negligible there: bounded from the steps that decay most;
* rounding: of each characteristic function, raised to its power, and of the sum;
* what the lattice of each step does not hold (``loss.py``).

The lattice makes ε larger by less than a 1e-5th of it, and its fineness varies smoothly with the history, so that more
steps are not cheaper by more than the change of that. Only where that would need too many points (``tuning.py``,
``_FREQUENCIES``) is it coarser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import next_fast_len

from consilium_shared.privacy.loss import Floats, Integers, Losses, discretised
from consilium_shared.privacy.tuning import tuned

Complexes = npt.NDArray[np.complex128]

_FREQUENCIES = 6e4
"""Frequencies that matter, beyond which the lattice gets coarser: where few steps in many draw a patient at all."""

_LOST = 1e-5
"""Share of δ that the truncation of all steps' losses may cost."""

_FOLDED = 1e-12
"""Tilted probability outside the window; it is folded in, and so costs a little."""

_CHANGES = np.array([-7.0, 1.5, 3.0, 7.0])
"""Orders at which Chernoff's bound is tried, from the tilt, times the tilted sum's standard deviation."""

_AUTOCORRELATED = 1 << 17
"""Points of the steps from which the decay of the product is bounded."""

_LOWER = 8
"""Most lower orders that are tried where the tilt is far beyond ε."""

_DIFFERENCES = 8
"""Most differences taken to see how smooth a step's distribution is."""

_NEGLIGIBLE = 1e-14
"""Error that frequencies left out may add to the sum over the tilted distribution, about."""

_TINY = 1e-200
_UNIT = 2.0**-53
_FEW = 512
_BLOCK = 64


def composed_epsilon(q: Floats, sigma: Floats, steps: Floats, delta: float) -> float:
    """Upper bound of ε at ``delta`` of all steps together, for adding or removing one patient.

    Args:
        q: sampling rates in (0, 1], float64 [pairs].
        sigma: noise multipliers, at least 0.1, float64 [pairs].
        steps: how many of each, whole numbers, float64 [pairs].
        delta: in [1e-12, 1).
    """
    tail = _LOST * delta / float(steps.sum())
    order, interval = tuned(q, sigma, steps, delta, tail)
    while True:
        history = History(list(discretised(q, sigma, interval, tail)), steps, interval)
        try:
            removed, order = history.tightened(order, delta)
            if np.all(q == 1) or history.chernoff(order, removed, reverse=True) <= delta:  # one direction is enough
                return removed
            return max(removed, history.epsilon(order, delta, reverse=True))
        except _TooFine as error:
            interval *= error.args[0]


class _TooFine(Exception):
    """The lattice has too many points, by this factor."""


@dataclass(frozen=True)
class Tilted:
    """One direction of a history, tilted by θ.

    Attributes:
        k: logarithm of the moment generating function at θ, rounded up.
        mean: of the tilted sum.
        variance: of the tilted sum.
        means: of each step, float64 [pairs].
        variances: of each step, float64 [pairs].
    """

    k: float
    mean: float
    variance: float
    means: Floats
    variances: Floats


class History:
    """Steps on one lattice.

    Args:
        batches: their losses.
        steps: how many of each, float64 [pairs].
        interval: the distance h of the lattice's points.
    """

    def __init__(self, batches: list[Losses], steps: Floats, interval: float) -> None:
        self.batches, self.steps, self.h = batches, steps, interval
        self._known: dict[tuple[float, bool], Tilted] = {}

    def chernoff(self, theta: float, epsilon: float, *, reverse: bool) -> float:
        """Bound of δ at ``epsilon`` from moments alone: e^(K − θε) · θ^θ / (1 + θ)^(1 + θ)."""
        factor = theta * math.log(theta / (1 + theta)) - math.log1p(theta)
        exponent = self._tilted(theta, reverse).k - theta * epsilon + factor
        return math.exp(min(exponent, 0.0)) + self._lost(reverse)

    def epsilon(self, theta: float, delta: float, *, reverse: bool) -> float:
        """Upper bound of ε in one direction: of removing a patient, or ``reverse``, of adding one."""
        tilted = self._tilted(theta, reverse)
        spread = math.sqrt(tilted.variance)
        tail = _LOST * delta
        further = [(change, self._tilted(theta + change, reverse).k) for change in _CHANGES / spread]
        above = [(change, k) for change, k in further if change > 0]
        top = max(
            min((k - math.log(tail)) / (theta + change) for change, k in above),
            min((k - tilted.k - math.log(_FOLDED)) / change for change, k in above),
        )
        bottom = max(
            *((k - tilted.k - math.log(_FOLDED)) / change for change, k in further if change < 0),
            (tilted.k + math.log(_FOLDED)) / (1 + theta),  # at order −1 the moment generating function is 1
        )
        top, bottom = max(top, tilted.mean + 3 * spread), min(bottom, tilted.mean - 3 * spread)
        while True:
            series = Series(self, theta, tilted, bottom, top, reverse)
            found = series.epsilon(delta - tail - self._lost(reverse))
            if found is not None:
                return found
            bottom -= top - bottom

    def tightened(self, theta: float, delta: float) -> tuple[float, float]:
        """``epsilon`` of removing a patient, at a lower order where the tilt lies far beyond it; and the order.

        Between a history of few steps and one of many the best order jumps, and the order that ``tuned`` ends with may
        be from the wrong side: a bound as well, but far above its neighbours', so that a part would cost more than all.
        """
        found = self.epsilon(theta, delta, reverse=False)
        for _ in range(_LOWER):
            tilted = self._tilted(theta, False)
            if tilted.mean <= found + 3 * math.sqrt(tilted.variance):
                break
            again = self.epsilon(theta / 1.5, delta, reverse=False)
            if again >= found:
                break
            found, theta = again, theta / 1.5
        return found, theta

    def _lost(self, reverse: bool) -> float:
        lost = [b.lost_reversed if reverse else b.lost for b in self.batches]
        return float(sum(self.steps[b.index] @ part for b, part in zip(self.batches, lost, strict=True)))

    def weights(self, batch: Losses, theta: float, reverse: bool) -> tuple[Floats, Floats]:
        """A batch tilted by e^(θ·loss): probabilities that add up to 1, float64 [b, m]; logarithms of their scales."""
        order = -(1 + theta) if reverse else theta
        weight = np.multiply(order, (batch.first[:, None] + np.arange(batch.mass.shape[1])) * self.h, dtype=np.float64)
        peak = np.zeros((len(weight), 1))
        if weight.max() > 600:
            with np.errstate(divide="ignore"):
                weight += np.log(batch.mass)
            peak = weight.max(axis=1, keepdims=True)
            np.exp(weight - peak, out=weight)
        else:
            np.exp(weight, out=weight)
            weight *= batch.mass
        total = weight.sum(axis=1)
        weight /= total[:, None]
        return weight, np.log(total) + peak[:, 0]

    def _tilted(self, theta: float, reverse: bool) -> Tilted:
        if (theta, reverse) not in self._known:
            self._known[theta, reverse] = self._tilt(theta, reverse)
        return self._known[theta, reverse]

    def _tilt(self, theta: float, reverse: bool) -> Tilted:
        k = rounding = 0.0
        means, variances = np.zeros_like(self.steps), np.zeros_like(self.steps)
        sign = -1 if reverse else 1
        for batch in self.batches:
            weight, logarithm = self.weights(batch, theta, reverse)
            steps, index = self.steps[batch.index], np.arange(weight.shape[1], dtype=np.float64)
            inner, second = weight @ index, weight @ index**2
            means[batch.index] = sign * (batch.first + inner) * self.h
            variances[batch.index] = np.maximum(second - inner**2, 0) * self.h**2
            k += float(steps @ logarithm)
            largest = (1 + theta) * self.h * np.maximum(np.abs(batch.first), np.abs(batch.first + len(index)))
            rounding += _UNIT * float(steps @ (64 + largest))
        mean, variance = float(self.steps @ means), float(self.steps @ variances)
        return Tilted(k + rounding, mean, variance, means, variances)


class Series:
    """The tilted sum's distribution on a window of its lattice, as a Fourier series."""

    def __init__(
        self, history: History, theta: float, tilted: Tilted, bottom: float, top: float, reverse: bool
    ) -> None:
        self.theta, self.k, self.h, self.mean = theta, tilted.k, history.h, tilted.mean
        self.bottom = math.floor(bottom / self.h)
        self.points = next_fast_len(math.ceil(top / self.h) - self.bottom + 1, real=True)
        self.top = self.bottom + self.points - 1
        count, self.left_out = self._frequencies(history, tilted, reverse)
        if count > _FREQUENCIES:
            raise _TooFine(1.02 * count / _FREQUENCIES)
        self.t = np.arange(count) * (2 * math.pi / (self.points * self.h))
        logarithm, relative = np.zeros(count, dtype=np.complex128), np.zeros(count)
        share = history.steps * tilted.variances
        for batch in sorted(history.batches, key=lambda b: -share[b.index].max()):
            weight, _ = history.weights(batch, theta, reverse)
            order, done, size = np.argsort(-share[batch.index]), 0, 1
            while done < len(order):  # what decays most comes first, and shortens the rest
                rows = order[done : done + size]
                done, size = done + size, 2 * size
                for index, f in self._characteristic(weight[rows], batch.first[rows], batch.index[rows]):
                    error = _UNIT * (256 + weight.shape[1] / _BLOCK + self._reach(batch) * self.t)
                    f = (f.conj() if reverse else f) * np.exp(-1j * self.t * tilted.means[index, None])
                    f[np.abs(f) < _TINY] = _TINY
                    logarithm += history.steps[index] @ np.log(f)
                    relative += history.steps[index] @ np.log1p(error / np.abs(f))
                logarithm, relative = self._shortened(logarithm, relative)
        count = len(self.t)
        self.terms = np.exp(logarithm) * (2 / self.points)
        self.terms[0] /= 2
        if self.points % 2 == 0 and count == self.points // 2 + 1:
            self.terms[-1] /= 2
        largest = np.exp(logarithm.real + relative) * (2 / self.points)
        self.errors = np.where(relative < 1, np.abs(self.terms) * np.expm1(np.minimum(relative, 1)), largest)
        self.errors += np.abs(self.terms) * _UNIT * (64 + 4 * self.t * self.points * self.h)
        self.slopes = [-np.expm1(-(c + 1j * self.t) * self.h) for c in (theta, theta + 1)]

    def epsilon(self, delta: float) -> float | None:
        """Least ε >= 0 whose δ is at most ``delta``; None if it lies below the window."""
        low, high = max(self.bottom, 0), self.top  # δ(high) counts as small enough, δ(low) as too large
        if self._delta(low) <= delta:
            return 0.0 if low == 0 else None
        guess = round((self.mean + math.log(self.theta / (1 + self.theta))) / self.h)
        at_low, at_high = math.nan, math.nan
        while high - low > 1:
            if not low < guess < high:
                guess = (low + high) // 2
            value = math.log(max(self._delta(guess), 1e-300) / delta)
            if value <= 0:
                high, at_high = guess, value
            else:
                low, at_low = guess, value
            guess = (low + high) // 2
            if math.isfinite(at_low + at_high):
                guess = low + round((high - low) * at_low / (at_low - at_high))
                guess = min(max(guess, low + 1), high - 1)
        scale, a, b, error = self._sums(high)
        missing = delta / scale - 2 * error
        found = float(self.h * high)
        if a > missing and b > 0:  # between two points of the lattice δ is A − e^(ε − s₀)·B
            found = min(found, self.h * high + math.log((a - missing) / b))
        return max(found, 0.0) * (1 + 1e-12)

    def _delta(self, index: int) -> float:
        """Upper bound of δ at ε = index · h, but for what is above the window."""
        scale, a, b, error = self._sums(index + 1)
        return scale * (max(a - math.exp(-self.h) * b, 0.0) + 2 * error)

    def _sums(self, index: int) -> tuple[float, float, float, float]:
        """Scale c; sums A, B over losses s from index · h = s₀ on: cA = P(s), cB = P(s)·e^(s₀ − s); A's error."""
        count = self.top - index + 1
        start = np.exp(-1j * self.t * (index * self.h - self.mean))
        sums, error = [], self.left_out
        for c, slope in zip((self.theta, self.theta + 1), self.slopes, strict=True):
            kernel = -np.expm1(-(c + 1j * self.t) * (self.h * count)) / slope
            sums.append(float((self.terms * start * kernel).real.sum()))
            error += float(self.errors @ np.abs(kernel))
        return math.exp(min(self.k - self.theta * index * self.h, 700.0)), sums[0], sums[1], error

    def _shortened(self, logarithm: Complexes, relative: Floats) -> tuple[Complexes, Floats]:
        """Leave out the highest frequencies where the product so far is negligible: other steps make it no larger."""
        size = np.exp(np.minimum(logarithm.real + relative, 0)) * (2 / self.points)
        size *= 4 / np.abs(np.expm1(-(self.theta + 1j * self.t) * self.h))
        after = np.cumsum(size[::-1])[::-1]
        count = max(1, int(np.searchsorted(-after, -_NEGLIGIBLE / (1 + self.theta))))
        if count < len(self.t):
            self.left_out += float(after[count])
            self.t = self.t[:count]
        return logarithm[:count], relative[:count]

    def _frequencies(self, history: History, tilted: Tilted, reverse: bool) -> tuple[int, float]:
        """Number of frequencies to compute, and a bound of what the others add to the two sums of ``_sums``.

        With c_g the probability that two draws of one step's lattice index differ by g, and x an angle,
        1 − |f(x)|² = 2·Σ c_g·(1 − cos(gx)) >= 4x²/π²·Σ c_g·g² over g <= π/x, as 1 − cos y >= 2y²/π² up to π. So for x
        in (π/2^(j+1), π/2^j], |f(x)|^n <= exp(−n·D_j / (2·4^j)), D_j being that sum over g <= 2^j.
        Besides, by summation by parts, |f(x)| <= Σ|Δ^r p| / (2·sin(x/2))^r for the r-th differences of probabilities.
        """
        everything = self.points // 2 + 1
        if self.points <= _FEW:
            return everything, 0.0
        bands = self.points.bit_length() - 1
        exponent, j = np.zeros(bands), np.arange(bands)
        lowest = math.pi / 2.0 ** (j + 1)
        share = history.steps * tilted.variances
        left = _AUTOCORRELATED
        for batch in sorted(history.batches, key=lambda b: -share[b.index].max()):
            size = batch.mass.shape[1]
            if left < size and np.any(exponent):
                break
            best = np.argsort(-share[batch.index])[: max(left // size, 1)]
            left -= len(best) * size
            chosen = Losses(
                batch.index[best], batch.first[best], batch.mass[best], batch.lost[best], batch.lost_reversed[best]
            )
            weight, _ = history.weights(chosen, self.theta, reverse)
            length = next_fast_len(2 * size, real=True)
            both = np.fft.irfft(np.abs(np.fft.rfft(weight, length)) ** 2, length)[:, 1:size]
            squares = np.cumsum(np.maximum(both, 0) * np.arange(1, size) ** 2.0, axis=1)
            decay = squares[:, np.minimum(2**j, size - 1) - 1] / (2 * 4.0**j)
            for times in range(1, _DIFFERENCES + 1):
                weight = np.diff(weight, axis=1, prepend=0, append=0)
                bound = np.abs(weight).sum(axis=1, keepdims=True) / (2 * np.sin(lowest / 2)) ** times
                decay = np.maximum(decay, -np.log(np.minimum(bound, 1)))
            exponent += history.steps[chosen.index] @ decay
        terms = (self.points / 2.0 ** (j + 2) + 1) * np.exp(-exponent) * (2 / self.points)
        terms *= 2 * 2 / np.sin(lowest)  # |1 − e^−(c + ix)| >= sin x up to π/2, and 1 beyond; two sums
        allowed = _NEGLIGIBLE / (1 + self.theta)
        out = 0
        while out < bands - 4 and terms[: out + 1].sum() <= allowed:
            out += 1
        return min(self.points // 2 ** (out + 1) + 1, everything), float(terms[:out].sum())

    def _characteristic(self, weight: Floats, first: Integers, index: Integers) -> Iterator[tuple[Integers, Complexes]]:
        """Σ weight · e^(it·loss) at all frequencies, for some steps at a time; complex128 [steps, frequencies]."""
        rows, size = weight.shape
        count = len(self.t)
        if size * count * 4 > 15 * self.points * math.log2(self.points):
            for row in range(rows):
                offset = int(first[row] % self.points)
                wrapped = np.zeros(-(-(offset + size) // self.points) * self.points)
                wrapped[offset : offset + size] = weight[row]
                f = np.fft.rfft(wrapped.reshape(-1, self.points).sum(axis=0))[:count].conj()
                yield index[row : row + 1], f[None]
            return
        blocks = -(-size // _BLOCK)
        inner = np.exp(1j * np.outer(np.arange(_BLOCK) * self.h, self.t))
        inner = np.concatenate([inner.real, inner.imag], axis=1)
        outer = np.exp(1j * np.outer(np.arange(blocks) * (_BLOCK * self.h), self.t))
        padded = np.zeros((rows, blocks * _BLOCK))
        padded[:, :size] = weight
        some = max(1, (1 << 20) // (blocks * count))
        for start in range(0, rows, some):
            part = padded[start : start + some].reshape(-1, _BLOCK) @ inner
            part = part.reshape(-1, blocks, 2 * count)
            f = ((part[..., :count] + 1j * part[..., count:]) * outer).sum(axis=1)
            origin = np.exp(1j * np.outer(first[start : start + some] * self.h, self.t))
            yield index[start : start + some], f * origin

    def _reach(self, batch: Losses) -> float:
        return self.h * float(np.abs(batch.first).max() + batch.mass.shape[1])
