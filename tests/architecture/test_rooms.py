"""The rooms of a package: which may import which, and that each says what lives in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "consilium_shared": ROOT / "shared",
    "consilium_server": ROOT / "server",
    "consilium_client": ROOT / "client",
    "consilium_serve": ROOT / "serve",
}
TOP = "."
"""The modules that lie in no room."""

ROOMS: dict[str, dict[str, set[str]]] = {
    "consilium_shared": {
        TOP: set(),
        "process": {TOP},
        "transport": {TOP},
        "privacy": {TOP},
        "models": {TOP},
        "graphs": {TOP, "models"},
        "preparation": {TOP, "models"},
        "ledger": {TOP, "privacy"},
        "secagg": {TOP},
        "protocol": {TOP, "privacy", "secagg"},
        "norm_bound.py": {TOP, "models", "privacy"},
        "study_file.py": {TOP, "graphs", "models", "privacy", "norm_bound.py"},
    },
    "consilium_server": {
        TOP: set(),
        "superlink": {TOP},
        "transport": {"superlink"},
        "state": {TOP},
        "study": {TOP, "state", "transport", "superlink"},
        "export": {TOP},
        "commands": {TOP, "state", "superlink", "export"},
    },
    "consilium_client": {
        "prepared": set(),
        "data": {"prepared"},
        "training": {"data"},
        "transport": set(),
        "intake": {"data"},
        "quality": {"data"},
        TOP: {"data", "intake"},
        "state": {TOP},
        "agent": {TOP, "prepared", "data", "quality", "training", "transport", "state"},
        "commands": {TOP, "prepared", "data", "quality", "training", "transport", "intake", "state", "agent"},
    },
    "consilium_serve": {
        TOP: set(),
        "rest": {TOP},
        "dicom": {TOP},
        "server.py": {TOP, "rest", "dicom"},
        "cli.py": {TOP, "server.py"},
    },
}
"""A package to its rooms, and each room to those that it may import. A room imports only such as stand before it, so no
arrow runs in a circle. A module that is named is a room of its own: one that stands above the other modules of no room.
"""

KNOWN = {
    file.name for folder in ("shared", "server", "client", "serve", "tests") for file in (ROOT / folder).rglob("*.py")
}

ALL = [(package, room) for package, rooms in ROOMS.items() for room in rooms]


def room_of(package: str, place: Path) -> str:
    """Room of a file, or of a module as a file, by its path below the package."""
    if len(place.parts) > 1:
        return place.parts[0]
    return place.name if place.name in ROOMS[package] else TOP


def arrows(package: str) -> Iterator[tuple[str, str, str]]:
    """Every import from one room of a package into another: the file, its room, the other room."""
    folder = FOLDERS[package] / package
    for file in sorted(folder.rglob("*.py")):
        here = room_of(package, file.relative_to(folder))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in named:
                top, *rest = name.split(".")
                if top != package or not rest:
                    continue
                place = Path(*rest) if (folder / rest[0]).is_dir() else Path(f"{rest[0]}.py")
                there = place.parts[0] if (folder / rest[0]).is_dir() else room_of(package, place)
                if there != here:
                    yield f"{file.relative_to(folder)}", here, there


@pytest.mark.parametrize("package", ROOMS)
def test_no_arrow_runs_in_a_circle(package: str) -> None:
    before: set[str] = set()
    for room, allowed in ROOMS[package].items():
        assert allowed <= before, f"{room} may import {allowed - before}, which stand after it"
        before.add(room)


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_is_in_the_table(package: str) -> None:
    folder = FOLDERS[package] / package
    found = {file.parent.name for file in folder.glob("*/*.py")}
    assert found == {room for room in ROOMS[package] if room != TOP and not room.endswith(".py")}


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_what_the_table_lets_it(package: str) -> None:
    found = set(arrows(package))
    assert found, "nothing was read"
    wrong = [f"{file} imports {there}" for file, here, there in found if there not in ROOMS[package][here]]
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_the_table_allows_nothing_that_nobody_needs(package: str) -> None:
    used = {(here, there) for _, here, there in arrows(package)}
    allowed = {(here, there) for here, others in ROOMS[package].items() for there in others}
    assert allowed - used == set()


@pytest.mark.parametrize(("package", "room"), [(p, r) for p, r in ALL if r != TOP and not r.endswith(".py")])
def test_a_room_says_what_lives_in_it_what_it_may_import_and_what_must_hold(package: str, room: str) -> None:
    text = (FOLDERS[package] / package / room / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {room}")
    assert "May import:" in text and "Must hold:" in text and "Tests:" in text
    assert len(text.splitlines()) <= 15
    named = {Path(word).name for word in re.findall(r"`([\w/.]+\.py)`", text)}
    assert named <= KNOWN, f"no such file: {named - KNOWN}"
