"""One process at a time: who has a lock is named, who looks takes nothing, and nobody is in the way once dead."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.site import CONTRACT

from consilium_server.state import study_folder
from consilium_server.study import main
from consilium_shared.process import logs
from consilium_shared.process.process_lock import LockHeld, ProcessLock, is_held
from consilium_shared.study import Study

HOLDS = (
    "import sys; from pathlib import Path; from consilium_shared.process.process_lock import ProcessLock\n"
    "with ProcessLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lock"


def test_another_process_that_has_the_lock_is_named_until_it_is_killed(file: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert is_held(file)
        with pytest.raises(LockHeld, match=rf"^it runs already \(process {other.pid}\)"):
            ProcessLock(file, "it runs already")
        other.kill()
        other.wait()
        with ProcessLock(file) as lock:
            assert lock.note == f"process {os.getpid()}"


def test_a_lock_is_free_before_anybody_took_it_and_after(file: Path) -> None:
    assert not is_held(file)
    assert not file.exists()
    with ProcessLock(file):
        assert is_held(file)
    assert not is_held(file)


def test_who_looks_at_the_moment_of_taking_is_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ProcessLock(file).release()
    with file.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        with ProcessLock(file):
            assert is_held(file)


def test_a_second_process_of_a_study_does_not_call_the_one_that_runs_failed(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "umask", lambda _: 0)  # of the tests' process
    monkeypatch.setattr(logs, "configure", lambda: None)
    given, home = Study.model_validate(CONTRACT), coordinator.home
    folder = study_folder.folder(home, given.study)
    folder.create(given, home.roster_file.read_bytes())
    folder.set_state("running")
    with ProcessLock(folder.root / "lock"):
        assert main.main(["--home", str(home.root), "--study", given.study]) == main.AGAIN
    assert folder.state()[0] == "running"
