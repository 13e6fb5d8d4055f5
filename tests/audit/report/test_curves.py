"""Names at the ends of curves lie within the drawing, in whatever usual typeface, and can be told apart."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, PackageLoader, StrictUndefined

from consilium_audit.figures import Curve, Figure, by_date

WIDTHS = {
    **{1.0: "…", 0.974: "m", 0.818: "w", 0.636: "0123456789", 0.635: "bdgpqhnu", 0.615: "ae", 0.612: "o"},
    **{0.592: "vxyk", 0.55: "cz", 0.521: "s", 0.454: "-", 0.427: "r", 0.394: "t", 0.352: "f", 0.278: "ijl"},
}
"""Widths of letters, in ems, in DejaVu Sans, or in Verdana where that is wider: the widest of the usual ones."""
EMS = {letter: width for width, letters in WIDTHS.items() for letter in letters}
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", fullmatch=True)


def drawn(*names: str) -> Figure:
    curves = [Curve(name, ((0.0, 0.1 * i), (86_400.0, 0.3 + i)), "abcd"[i], step=True) for i, name in enumerate(names)]
    return by_date("north: ε of asset icu by date", "It grows.", curves)


def end_of(label: str, figure: Figure) -> float:
    """Where the label ends, in letters of 11 units (the style sheet's)."""
    return figure.label_x + 11 * sum(EMS[letter] for letter in label)


@given(NAMES)
def test_every_name_ends_within_the_drawing_and_keeps_its_beginning_and_its_end(name: str) -> None:
    figure = drawn(name)
    (line,) = figure.lines
    assert figure.right < figure.label_x and end_of(line.label, figure) <= figure.width
    assert line.name == name
    if line.label != name:
        begins, ends = line.label.split("…")
        assert name.startswith(begins) and name.endswith(ends) and 0 <= len(begins) - len(ends) <= 1
        assert len(ends) >= 3


def test_usual_names_are_whole_and_longer_ones_keep_what_they_differ_in() -> None:
    whole = ("budget", "heart-disease", "heart-disease-dp", "pneumoniamnist")
    assert tuple(line.label for line in drawn(*whole).lines) == whole
    long = ("heart-disease-follow-up-2025", "heart-disease-follow-up-2026")
    first, second = (line.label for line in drawn(*long).lines)
    assert first != second and first.startswith("heart-") and first.endswith("-2025")


def test_a_shortened_name_stands_whole_in_its_title() -> None:
    environment = Environment(loader=PackageLoader("consilium_audit"), autoescape=True, undefined=StrictUndefined)
    names = ("icu", "heart-disease-follow-up-2026")
    figure = drawn(*names)
    svg = str(environment.get_template("figures.html").module.figure(figure, "f"))  # type: ignore[attr-defined]
    labels = re.findall(r'<text class="label" x="(\d+)"[^>]*>(?:<title>([^<]*)</title>)?([^<]*)</text>', svg)
    at = str(figure.label_x)
    assert labels == [(at, title, line.label) for title, line in zip(("", names[1]), figure.lines, strict=True)]
