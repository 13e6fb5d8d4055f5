"""Tracked files are clean: no large file, no conflict mark, text ends in one newline; hooks need no network."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LARGEST = 512 * 1024
"""Bytes. Data, models and pictures of results do not belong into the repository."""
CONFLICT = re.compile(rb"^(?:<{7} |>{7} |={7}$)", re.MULTILINE)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Tracked files, and new ones that are not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [ROOT / name for name in listed.split("\0") if name]
    assert len(found) > 300
    return [file for file in found if file.is_file()]


def test_no_file_is_large(files: list[Path]) -> None:
    assert [file for file in files if file.stat().st_size > LARGEST] == []


def test_no_conflict_was_committed(files: list[Path]) -> None:
    assert [file for file in files if CONFLICT.search(file.read_bytes())] == []


def test_text_ends_in_one_newline_and_no_line_in_spaces(files: list[Path]) -> None:
    """But for vectors, which stay byte for byte as they were written."""
    wrong = []
    for file in files:
        data = file.read_bytes()
        if "vectors" in file.parts or b"\0" in data or not data:
            continue
        if not data.endswith(b"\n") or data.endswith(b"\n\n") or b"\r" in data or re.search(rb"[ \t]\n", data):
            wrong.append(file)
    assert wrong == []


def test_hooks_before_a_commit_are_local_and_use_programs_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "files"}
    for hook in hooks:
        program = hook["entry"].split()[0]
        assert (hook["language"], program.startswith(".venv/bin/")) == ("system", True)
        assert all((ROOT / word).exists() for word in hook["entry"].split() if word.endswith(".py"))
