"""Histograms as SVG geometry: the bars of a site's values, the study's range and center among them."""

from __future__ import annotations

from dataclasses import dataclass

from consilium_client.data.profile import Spread
from consilium_shared.inputs import Numeric

WIDTH, HEIGHT = 240.0, 56.0


@dataclass(frozen=True)
class Bar:
    """One bar in pixels: left edge ``x``, top ``y``, ``width``, ``height``; ``outside`` the study's range."""

    x: float
    y: float
    width: float
    height: float
    outside: bool


@dataclass(frozen=True)
class Histogram:
    """Histogram of one variable.

    Attributes:
        bars: from left to right.
        marks: positions in pixels of the study's low and high, where they lie inside.
        center: position of the study's center, or None where it lies outside or the study has none.
        first: text of the left end.
        last: text of the right end.
    """

    bars: tuple[Bar, ...]
    marks: tuple[float, ...]
    center: float | None
    first: str
    last: str


def histogram(spread: Spread, study: Numeric) -> Histogram | None:
    """The histogram of a variable; None where there is no value."""
    if not spread.counts:
        return None
    left, right, most = spread.q00, spread.q100, max(spread.counts)
    step, bar = (right - left) / len(spread.counts), WIDTH / len(spread.counts)

    def at(value: float) -> float:
        return round((value - left) / (right - left) * WIDTH, 2)

    bars = []
    for number, count in enumerate(spread.counts):
        # A bar that has a single value is seen beside one that has a million.
        height = max(round(count / most * HEIGHT, 2), 1.5) if count else 0.0
        middle = left + (number + 0.5) * step
        outside = (study.low is not None and middle < study.low) or (study.high is not None and middle > study.high)
        bars.append(Bar(round(number * bar, 2), round(HEIGHT - height, 2), round(bar - 1, 2), height, outside))
    marks = tuple(at(bound) for bound in (study.low, study.high) if bound is not None and left < bound < right)
    declared = (study.center, study.scale) != (0.0, 1.0)
    center = at(study.center) if declared and left < study.center < right else None
    return Histogram(tuple(bars), marks, center, f"{left:.4g}", f"{right:.4g}")
