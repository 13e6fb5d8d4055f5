"""MKL is in strict mode in every process that can train, before torch computes."""

import os
import subprocess
import sys

import pytest

from dpsgd.blas import MODE, set_blas_environment


@pytest.mark.parametrize(
    "module",
    ["agent", "commands.cli", "training.trainer", "training.evaluation"],
)
def test_every_way_into_training_asks_for_it(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    code = f"import os, consilium_client.{module}; print(os.environ['MKL_CBWR'])"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == MODE


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("", MODE),
        ("AVX2", MODE),
        ("AVX2,STRICT", "AVX2,STRICT"),
        ("auto,strict", "auto,strict"),
        ("COMPATIBLE", "COMPATIBLE"),
    ],
)
def test_a_mode_set_by_hand_stays_only_where_it_is_as_good(
    monkeypatch: pytest.MonkeyPatch, given: str, becomes: str
) -> None:
    monkeypatch.setenv("MKL_CBWR", given)
    set_blas_environment()
    assert os.environ["MKL_CBWR"] == becomes
