"""The first line of a docstring names its thing: no question word, no pronoun, no reference to another place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("shared", "engine", "client", "server", "serve", "deploy")
BEGINNINGS = {
    *("What", "Who", "Whose", "Whom", "Why", "Which", "How", "Where", "Whether", "Until"),
    *("Of", "As", "See", "The same", "This", "It", "These", "Those"),
}
"""Words with which no first line begins: whoever reads it alone must learn what the thing is."""


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below a constant or a field too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def unnamed(text: str) -> str:
    """Beginning of a docstring that names nothing; empty where it names its thing."""
    found = re.match(rf"(?:{'|'.join(sorted(BEGINNINGS))})\b", text)
    return "" if found is None else found[0]


@pytest.mark.parametrize("source", SOURCES)
def test_the_first_line_of_a_docstring_names_its_thing(source: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} begins with {unnamed(text)!r}"
        for file in sorted((ROOT / source).rglob("*.py"))
        for line, text in docstrings(file)
        if unnamed(text)
    ]
    assert wrong == []


def test_a_first_line_that_names_nothing_would_be_found() -> None:
    assert unnamed("What a round asks of this site's data.") == "What"
    assert unnamed("Whereabouts of a site.") == ""
