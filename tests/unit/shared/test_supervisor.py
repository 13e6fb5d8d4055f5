"""The supervisor: what dies is started again, what belongs together is restarted together, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from consilium_shared.process.supervisor import Program, Supervisor

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def until(look: Callable[[], object], supervisor: Supervisor) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline, "waited in vain"
        supervisor.tick()
        time.sleep(0.05)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, said: list[str]) -> Supervisor:
    return Supervisor(tmp_path, said.append)


def pid(program: Program) -> int:
    assert program.process is not None
    return program.process.pid


def test_a_killed_program_is_started_again_and_the_kill_is_said(supervisor: Supervisor, said: list[str]) -> None:
    program = Program("one", SLEEP)
    supervisor.add(program)
    supervisor.tick()
    first = pid(program)
    os.kill(first, signal.SIGKILL)
    until(lambda: program.process is not None and pid(program) != first, supervisor)
    assert any("killed by signal 9" in line for line in said)
    supervisor.stop()


def test_a_program_that_ends_well_and_is_not_to_be_restarted_is_finished(supervisor: Supervisor) -> None:
    program = Program("one", [sys.executable, "-c", ""], restart=False)
    supervisor.add(program)
    until(lambda: program.finished, supervisor)
    assert not supervisor.has("one")


def test_a_program_takes_down_the_one_that_waits_for_it(supervisor: Supervisor) -> None:
    courier, supernode = Program("courier", SLEEP, takes_down="supernode"), Program("supernode", SLEEP)
    for program in (supernode, courier):
        supervisor.add(program)
    supervisor.tick()
    before = pid(supernode)
    os.kill(pid(courier), signal.SIGKILL)
    until(lambda: supernode.process is not None and pid(supernode) != before, supervisor)
    supervisor.stop()


def test_stopping_leaves_no_process(supervisor: Supervisor) -> None:
    program = Program("one", SLEEP)
    supervisor.add(program)
    supervisor.tick()
    supervisor.stop()
    assert program.process is not None
    assert program.process.poll() is not None


def _runs(pid: int) -> bool:
    """Whether a process is there and is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_programs_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from consilium_shared.process.supervisor import Program, Supervisor\n"
        f"s = Supervisor(pathlib.Path({str(tmp_path)!r}), lambda line: print(line, flush=True))\n"
        f"p = Program('one', {SLEEP!r}); s.add(p); s.tick(); print(p.process.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline, "the child outlived its supervisor"
        time.sleep(0.05)


def test_a_program_that_cannot_be_started_is_said_and_tried_again_later(
    supervisor: Supervisor, said: list[str]
) -> None:
    supervisor.add(Program("one", ["/no/such/program"]))
    supervisor.tick()
    assert said == ["one cannot be started: No such file or directory (/no/such/program)"]
