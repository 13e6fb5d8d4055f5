"""A task is one folder, one line of the table, and one test class: nothing else knows its name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from consilium_shared import task
from consilium_tasks import TASKS

ROOT = Path(__file__).parents[2]
ROOTS = ("shared", "client", "server", "engine", "deploy", "serve", "examples")
PRODUCT = [file for root in ROOTS for file in sorted((ROOT / root).rglob("*.py"))]
TEXTS = [file for root in ROOTS for kind in ("templates/*", "*.yaml") for file in sorted((ROOT / root).rglob(kind))]
EXAMPLES = {ROOT / "examples" / "simulate_study.py"}
"""Written-out studies, as a person's file is."""
PERSONS = {*(ROOT / "deploy" / "config").glob("site.*.yaml"), *(ROOT / "examples").rglob("*.yaml")}
"""Sites, which permit tasks by name, and studies, as a person's files are."""


def words(file: Path) -> Iterator[str]:
    """Names of modules that a file imports, and its texts but for docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.value


@pytest.mark.parametrize("name", TASKS)
def test_no_file_outside_of_its_folder_has_a_tasks_name(name: str) -> None:
    folder = task.get(name).folder
    pattern = re.compile(rf"\b({re.escape(name)}|{re.escape(folder.name)})\b")
    for file in PRODUCT:
        if folder in file.parents or file in EXAMPLES or file == ROOT / "shared" / "consilium_tasks" / "__init__.py":
            continue
        assert not [word for word in words(file) if pattern.search(word)], file
    outside = [file for file in TEXTS if folder not in file.parents and file not in PERSONS]
    assert not [file for file in outside if pattern.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_name_stands_in_one_line_of_the_table(name: str) -> None:
    lines = (ROOT / "shared" / "consilium_tasks" / "__init__.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if f'"{name}"' in line]) == 1


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_class_that_inherits_what_must_hold_of_all(name: str) -> None:
    found = [
        file.name
        for file in (ROOT / "tests" / "unit" / "tasks").glob("test_*.py")
        if f'(TaskSuite):\n    name = "{name}"\n' in file.read_text(encoding="utf-8")
    ]
    assert len(found) == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_the_table_says_and_imports_no_other(name: str) -> None:
    own = task.get(name)
    assert own.name == name
    assert own.sample.is_file()
    others = {f"consilium_tasks.{task.get(other).folder.name}" for other in TASKS if other != name}
    for file in own.folder.rglob("*.py"):
        for word in words(file):
            assert ".".join(word.split(".")[:2]) not in others, file
