"""The import arrows of ARCHITECTURE.md, held by reading every import in the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "consilium_shared": ROOT / "shared",
    "consilium_audit": ROOT / "shared",
    "consilium_client": ROOT / "client",
    "consilium_server": ROOT / "server",
    "consilium_deploy": ROOT / "deploy",
}
FILES = [(package, file) for package, root in PACKAGES.items() for file in sorted((root / package).rglob("*.py"))]

ONLY = {
    "flwr": {
        "consilium_server/app.py",
        "consilium_server/exchange.py",
        "consilium_server/reply.py",
        "consilium_server/study_run.py",
        "consilium_server/superlink.py",
        "consilium_server/superlink_control.py",
        "consilium_server/superlink_database.py",
        "consilium_server/superlink_gate.py",
        "consilium_server/superlink_store.py",
        "consilium_client/supernode.py",
        "consilium_client/courier.py",
    },
    "pydicom": {"consilium_client/data/", "consilium_deploy/dicom_files.py"},
    "pandas": {"consilium_client/data/", "consilium_deploy/real_data.py", "consilium_deploy/synthetic.py"},
    "opacus": {"consilium_client/training/"},
    "grpc": {"consilium_client/agent_socket.py"},
    "torch": {
        "consilium_shared/models/",
        "consilium_client/training/",
        "consilium_client/evaluation.py",
    },
}
"""A library, and the only places that may import it: who replaces it has one place to look."""


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def place(package: str, file: Path) -> str:
    return file.relative_to(PACKAGES[package]).as_posix()


@pytest.mark.parametrize(("package", "file"), FILES, ids=[place(*pair) for pair in FILES])
def test_every_import_follows_the_arrows(package: str, file: Path) -> None:
    here = place(package, file)
    for name in imports(file):
        top = name.split(".")[0]
        if top in PACKAGES and top != package:
            assert top == "consilium_shared", f"{here} imports {name}"
            assert package != "consilium_shared", f"shared imports back: {here} imports {name}"
        if top in ONLY:
            assert any(here.startswith(allowed) for allowed in ONLY[top]), f"{here} may not import {name}"
        if package == "consilium_audit":
            assert not name.startswith("consilium_shared.models"), f"{here} imports {name}"


@pytest.mark.parametrize(("package", "file"), FILES, ids=[place(*pair) for pair in FILES])
def test_no_file_has_a_second_purpose(package: str, file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, f"{place(package, file)} is too long"
    assert file.stem not in {"utils", "helpers", "common", "misc", "base", "manager"}


FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "yaml.unsafe_load"}


@pytest.mark.parametrize(("package", "file"), FILES, ids=[place(*pair) for pair in FILES])
def test_nothing_runs_code_from_data(package: str, file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{place(package, file)}:{node.lineno}"


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("consilium_shared.messages", {"torch", "flwr", "pandas", "opacus", "scipy"}),
        ("consilium_shared.ledger.verify", {"torch", "flwr", "pandas", "opacus"}),
        ("consilium_client.courier", {"torch", "pandas", "opacus", "pydicom"}),
        ("consilium_client.cli", {"torch", "flwr", "pandas", "opacus"}),
        ("consilium_server.cli", {"torch", "pandas", "opacus", "pydicom"}),
    ],
)
def test_a_program_starts_without_what_it_does_not_need(module: str, without: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sorted({without!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
