"""The examples run as their pages say, and show what they claim to show."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_page_of_examples_names_each() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.py)\)", text)) == {file.name for file in EXAMPLES}


def test_a_simulated_study_keeps_to_its_epsilon_also_at_the_hospital_that_dropped_out(tmp_path: Path) -> None:
    done = run("simulate_study.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    sums = re.findall(r"^round (\d): sum over (\d) hospitals", done.stdout, re.MULTILINE)
    assert sums == [("1", "4"), ("2", "3"), ("3", "4"), ("4", "4")]
    spent = {
        site: float(value) for site, value in re.findall(r"^(\w+): AUROC .* ε spent ([\d.]+) of", done.stdout, re.M)
    }
    assert len(spent) == 4
    assert all(value <= 2.0 for value in spent.values())
    assert spent["lund"] < min(value for site, value in spent.items() if site != "lund")
    assert list(tmp_path.iterdir()) == []


def test_evidence_verifies_and_a_forged_digit_does_not(tmp_path: Path) -> None:
    done = run("verify_evidence.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open: nothing" in done.stdout
    assert "refused at step 5, line 1" in done.stdout
    copy = tmp_path / "evidence"
    shutil.copytree(ROOT / "tests" / "vectors" / "evidence-0.1", copy)
    record = copy / "rounds" / "0002.json"
    faithful = record.read_bytes()
    record.write_bytes(faithful.replace(b'"participants"', b'"participants "', 1))
    assert record.read_bytes() != faithful
    done = run("verify_evidence.py", copy, "4883 af5f 8c17 82eb 501f ba08 faee 2cb3")
    assert done.returncode == 1
    assert "refused at step 2" in done.stdout


def test_a_stock_model_learns_privately_and_says_at_what_epsilon() -> None:
    done = run("private_training.py")
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"accuracy ([\d.]+) on 297 digits, at epsilon ([\d.]+)", done.stdout)
    assert float(found[0]) > 0.6  # by chance it were 0.1
    assert 2.0 < float(found[1]) < 2.5


@pytest.mark.parametrize("name", ["verify_evidence.py"])
def test_what_an_auditor_runs_needs_no_torch(name: str) -> None:
    code = f"import runpy, sys; runpy.run_path({str(ROOT / 'examples' / name)!r}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
