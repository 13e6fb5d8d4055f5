"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ("shared", "engine", "client", "server", "serve", "deploy")
MODULES = sorted(
    file.relative_to(ROOT / source).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for source in SOURCES
    for file in (ROOT / source).rglob("*.py")
    if ">>> " in file.read_text(encoding="utf-8")
)
"""Modules with examples; only these are imported."""
SEAMS = (
    "consilium_server.study.optimizer",
    "consilium_shared.averaging",
    "consilium_shared.canonical",
    "consilium_shared.documents",
    "consilium_shared.identity",
    "consilium_shared.metrics",
    "consilium_shared.privacy.accountant",
    "consilium_shared.privacy.budget",
    "consilium_shared.privacy.canaries",
    "consilium_shared.privacy.plan",
    "consilium_shared.secagg.keys",
    "consilium_shared.secagg.prg",
    "consilium_shared.secagg.ring",
    "consilium_shared.secagg.shamir",
    "consilium_shared.secagg.terms",
    "consilium_shared.study",
    "dpsgd.adaptive",
    "dpsgd.training",
)
"""Modules that others call first, and that therefore have an example."""


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_do_what_they_show(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_no_example_is_skipped() -> None:
    sources = [file for source in SOURCES for file in (ROOT / source).rglob("*.py")]
    assert [file for file in sources if "+SKIP" in file.read_text(encoding="utf-8")] == []


def test_what_others_call_first_has_an_example() -> None:
    assert set(SEAMS) <= set(MODULES)
