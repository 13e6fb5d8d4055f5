"""What is switched off in Flower before it is imported, at both ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from consilium_shared.process.flower_environment import set_flower_environment


def test_flower_speaks_to_nobody_and_keeps_to_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", {"NO_PROXY": "intranet,localhost", "HTTPS_PROXY": "http://proxy:3128"})
    set_flower_environment(tmp_path)
    assert os.environ["FLWR_HOME"] == str(tmp_path)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intranet,localhost,127.0.0.1"
    assert os.environ["HTTPS_PROXY"] == "http://proxy:3128"
    before = dict(os.environ)
    set_flower_environment(tmp_path)
    assert before == os.environ
