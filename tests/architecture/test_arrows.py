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
    "consilium_tasks": ROOT / "shared",
    "consilium_audit": ROOT / "shared",
    "consilium_client": ROOT / "client",
    "consilium_server": ROOT / "server",
    "consilium_deploy": ROOT / "deploy",
    "consilium_serve": ROOT / "serve",
    "dpsgd": ROOT / "engine",
}
FILES = [(package, file) for package, root in PACKAGES.items() for file in sorted((root / package).rglob("*.py"))]

MAY_IMPORT = {
    "consilium_shared": set(),
    "dpsgd": {"consilium_shared.errors"},
    "consilium_tasks": {"consilium_shared"},
    "consilium_audit": {"consilium_shared"},
    "consilium_server": {"consilium_shared"},
    "consilium_client": {"consilium_shared", "dpsgd"},
    "consilium_deploy": {"consilium_shared"},
    "consilium_serve": {"consilium_shared"},
}
"""A package, and what of this repository it may import: whole packages, or single modules."""

ONLY = {
    "flwr": {
        "consilium_shared/transport/objects.py",
        "consilium_server/superlink/",
        "consilium_server/transport/",
        "consilium_client/transport/courier.py",
        "consilium_client/transport/supernode.py",
    },
    "pydicom": {
        "consilium_client/data/",
        "consilium_shared/preparation/",
        "consilium_serve/",
        "consilium_client/intake/",
        "consilium_deploy/dicom_files.py",
    },
    "pandas": {
        "consilium_client/data/",
        "consilium_client/intake/database.py",
        "consilium_client/intake/sql.py",
        "consilium_deploy/real_data.py",
        "consilium_deploy/synthetic.py",
    },
    "PIL": {"consilium_client/data/image_files.py"},
    "imagecodecs": {"consilium_shared/preparation/decoders.py"},
    "nibabel": {"consilium_client/data/nifti_files.py"},
    "opacus": {"dpsgd/"},
    "onnxruntime": {"consilium_serve/model.py", "consilium_shared/models/onnx_graph.py"},
    "fastapi": {"consilium_serve/", "consilium_server/superlink/"},
    "grpc": {"consilium_client/transport/agent_socket.py"},
    "pynetdicom": {
        "consilium_client/intake/",
        "consilium_serve/dicom/",
        "consilium_shared/transport/storage_scp.py",
    },
    "highdicom": {"consilium_serve/dicom/"},
    "pint": {"consilium_client/data/units.py"},
    "sqlalchemy": {"consilium_client/intake/"},
    "duckdb": {"consilium_client/intake/database.py"},
    "torch": {
        "consilium_shared/models/",
        "consilium_shared/graphs/",
        "consilium_shared/prediction.py",  # types alone
        "consilium_shared/task.py",  # types alone; importing a task imports no torch: tests/unit/tasks/suite.py
        "consilium_client/training/",
        "consilium_tasks/",
        "dpsgd/",
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
            assert {top, name} & MAY_IMPORT[package], f"{here} imports {name}"
        if top in ONLY:
            assert any(here.startswith(allowed) for allowed in ONLY[top]), f"{here} may not import {name}"
        if package == "consilium_audit":
            assert not name.startswith("consilium_shared.models"), f"{here} imports {name}"


@pytest.mark.parametrize(("package", "file"), FILES, ids=[place(*pair) for pair in FILES])
def test_no_file_has_a_second_purpose(package: str, file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, f"{place(package, file)} is too long"
    assert file.stem not in {"utils", "helpers", "common", "misc", "base", "manager"}


BY_PEOPLE = {"consilium_shared/graphs/weights.py": ("torch.load", "weights_only=True")}
"""A file, a call, and the argument without which it is forbidden there too: what a person runs on a chosen file."""
FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "yaml.unsafe_load"}


@pytest.mark.parametrize(("package", "file"), FILES, ids=[place(*pair) for pair in FILES])
def test_nothing_runs_code_from_data(package: str, file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            call, asked = BY_PEOPLE.get(place(package, file), ("", ""))
            if ast.unparse(node.func) == call and asked in map(ast.unparse, node.keywords):
                continue
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{place(package, file)}:{node.lineno}"


@pytest.mark.parametrize(("package", "file"), [each for each in FILES if each[0] in ("consilium_client", "dpsgd")])
def test_no_site_reaches_what_runs_a_persons_own_code(package: str, file: Path) -> None:
    own = {
        "consilium_shared.graphs.from_torch",
        "consilium_shared.graphs.weights",
        "consilium_shared.graphs.folding",
        "consilium_shared.graphs.importing",
        "consilium_shared.graphs.conversion",
    }
    named = {f"{node.module}.{each.name}" for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
             if isinstance(node, ast.ImportFrom) for each in node.names}  # fmt: skip
    assert not own & (named | set(imports(file)))


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("consilium_shared.protocol.messages", {"torch", "flwr", "pandas", "opacus", "scipy"}),
        ("consilium_shared.ledger.verify", {"torch", "flwr", "pandas", "opacus"}),
        ("consilium_client.transport.courier", {"torch", "pandas", "opacus", "pydicom"}),
        (
            "consilium_client.commands.cli",
            {"torch", "flwr", "pandas", "opacus", "numpy", "scipy", "grpc", "pynetdicom", "httpx"},
        ),
        ("consilium_client.agent.main", {"torch", "flwr", "pandas", "opacus", "scipy", "pynetdicom", "httpx"}),
        ("consilium_client.intake.receiver", {"torch", "flwr", "pandas", "opacus", "httpx"}),
        ("consilium_serve.server", {"torch", "flwr", "pandas", "opacus", "scipy"}),
        ("consilium_serve.cli", {"torch", "flwr", "pandas", "opacus", "onnxruntime", "fastapi"}),
        ("consilium_server.commands.cli", {"torch", "pandas", "opacus", "pydicom"}),
    ],
)
def test_a_program_starts_without_what_it_does_not_need(module: str, without: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sorted({without!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
