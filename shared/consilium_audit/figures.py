"""Curves of ε as geometry, for a template to draw. Pure.

Lines differ in their dashes and markers and carry their names at their ends, so that none needs a colour to be told.
A name that is too long for its place is shortened in its middle: names of a hospital's studies often begin alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 36, 126, 12, 34
LABEL_GAP = 14
"""Units between two names at the ends of lines."""

LABEL_AFTER = 20
"""Units from the right end of the axes to where names begin."""

LETTER_SIZE = 11
"""Font size of names, in units; as the style sheet has it."""

_NARROW, _WIDE = frozenset("fijlrt-"), frozenset("mw…")
LEAST = 0.1
"""An axis of ε ends here or higher."""

MARKER_GAP = 15.0
"""Units between two markers of a line; denser ones would hide its dashes."""


@dataclass(frozen=True)
class Curve:
    """A named line: points with x ascending; ``step`` for what holds until the next point.

    Attributes:
        look: index of its dashes and marker, the limit's is "limit".
    """

    name: str
    points: tuple[tuple[float, float], ...]
    look: str
    step: bool = False


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve, drawn: an SVG path, where its markers stand, its name, and that as it fits, with a place for it."""

    name: str
    label: str
    look: str
    path: str
    markers: tuple[tuple[float, float], ...]
    end: tuple[float, float]
    label_y: float


@dataclass(frozen=True)
class Figure:
    """A drawing in a box of ``WIDTH`` × ``HEIGHT`` units.

    Attributes:
        title: what it shows.
        description: what a reader who does not see it must know.
    """

    title: str
    description: str
    x_axis: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    label_x: int = WIDTH - RIGHT + LABEL_AFTER
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def by_round(title: str, description: str, curves: Sequence[Curve], rounds: int) -> Figure:
    """A figure whose x axis is the number of the round, 0 to ``rounds``."""
    step = _nice(max(1, rounds) / 5, whole=True)
    ticks = [(number, f"{number:g}") for number in _multiples(step, max(1, rounds))]
    return _figure(title, description, "round", curves, (0.0, float(max(1, rounds))), ticks)


def by_date(title: str, description: str, curves: Sequence[Curve]) -> Figure:
    """A figure whose x axis is the calendar; x in seconds since 1970 (``seconds``)."""
    xs = [x for curve in curves for x, _ in curve.points]
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if high - low < 1:
        low, high = low - 1800, high + 1800
    count = 3
    form = "%H:%M" if high - low < 86_400 else "%d %b" if high - low < 300 * 86_400 else "%b %Y"
    ticks = []
    for i in range(count):
        x = low + (high - low) * i / (count - 1)
        ticks.append((x, datetime.fromtimestamp(x, UTC).strftime(form)))
    dates = [datetime.fromtimestamp(x, UTC).strftime("%Y-%m-%d") for x in (low, high)]
    axis = f"{dates[0]} (UTC)" if dates[0] == dates[1] else f"{dates[0]} to {dates[1]}"
    return _figure(title, description, axis, curves, (low, high), ticks)


def seconds(time: str) -> float:
    """Seconds since 1970 of a ledger's time."""
    return datetime.fromisoformat(time).timestamp()


def _figure(
    title: str,
    description: str,
    x_axis: str,
    curves: Sequence[Curve],
    x_range: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
) -> Figure:
    finite = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    step = _nice(max([*finite, LEAST]) * 1.02 / 5)
    highest = step * math.ceil(max([*finite, LEAST]) * 1.02 / step)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - y / highest * (HEIGHT - TOP - BOTTOM), 1),
        )

    lines = [_line(curve, [place(x, y) for x, y in curve.points if math.isfinite(y)]) for curve in curves]
    return Figure(
        title,
        description,
        x_axis,
        tuple(Tick(place(x, 0)[0], text) for x, text in x_ticks),
        tuple(Tick(place(x_range[0], y)[1], f"{y:g}") for y in _multiples(step, highest)),
        _spread([line for line in lines if line is not None]),
    )


def _line(curve: Curve, places: Sequence[tuple[float, float]]) -> Line | None:
    if not places:
        return None
    path = f"M{places[0][0]:g},{places[0][1]:g}"
    for x, y in places[1:]:
        path += f"H{x:g}V{y:g}" if curve.step else f"L{x:g},{y:g}"
    end = places[-1]
    if curve.step:  # it holds to the end of the figure
        end = (float(WIDTH - RIGHT), end[1])
        path += f"H{end[0]:g}"
    markers: list[tuple[float, float]] = []
    for place in reversed(places if curve.look != "limit" else ()):
        if not markers or math.dist(place, markers[-1]) >= MARKER_GAP:
            markers.append(place)
    return Line(curve.name, shortened(curve.name), curve.look, path, tuple(markers[::-1]), end, end[1])


def shortened(name: str) -> str:
    """``name``, or its beginning, "…" and its end, as long as fits between the axes and the figure's edge."""
    label, kept = name, len(name)
    while _width(label) > RIGHT - LABEL_AFTER:
        kept -= 1
        label = f"{name[: (kept + 1) // 2]}…{name[len(name) - kept // 2 :]}"
    return label


def _width(text: str) -> float:
    """Units that a text may take: at least what it takes in the widest of the usual sans-serif typefaces."""
    ems = [1.0 if letter in _WIDE else 0.46 if letter in _NARROW else 0.65 for letter in text]
    return LETTER_SIZE * sum(ems)


def _spread(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The lines with their names moved apart, upwards where there is no room below."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].end[1])
    places: list[float] = []
    for i in order:
        places.append(max(lines[i].end[1], places[-1] + LABEL_GAP if places else TOP))
    lowest = float(HEIGHT - BOTTOM)
    for at in range(len(places) - 1, -1, -1):
        places[at] = min(places[at], lowest)
        lowest = places[at] - LABEL_GAP
    moved = dict(zip(order, places, strict=True))
    return tuple(replace(line, label_y=round(moved[i], 1)) for i, line in enumerate(lines))


def _nice(value: float, whole: bool = False) -> float:
    """The smallest of 1, 2, 5 × 10^k that is at least ``value``; with ``whole``, at least 1."""
    if whole and value <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _multiples(step: float, highest: float) -> list[float]:
    return [float(f"{i * step:.6g}") for i in range(math.floor(highest / step + 1e-6) + 1)]
