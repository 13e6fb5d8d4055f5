"""Keeps a role's programs running: starts them, restarts what dies, stops them together, writes their logs.

Programs die with their supervisor (Linux: parent-death signal), so a killed supervisor leaves no orphan that holds a
port, a lock or a socket.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
STEADY_SECONDS = 60.0
"""Seconds of running after which a program's back-off begins anew."""
STOP_SECONDS = 15.0
"""Seconds between SIGTERM and SIGKILL when everything stops."""
TAIL_BYTES = 4096
"""Length of the end of a log in which a program's last word is looked for."""
CARRIES = {"MALLOC_ARENA_MAX": "2"}
"""Environment of programs that carry messages: by itself glibc keeps what was freed, for each of up to eight times as
many threads as there are cores. (A lower MALLOC_MMAP_THRESHOLD_ gives more back, and large messages take half as long
again.) Nothing for a program that trains."""
LOG_BYTES = 20 * 1024 * 1024
"""A log that is longer when its program starts is moved to <name>.log.1."""


@dataclass
class Program:
    """One supervised program.

    Attributes:
        command: argument list, no shell.
        restart: False for a program whose exit with status 0 is its end.
        last_word: how the last line of its log begins when it says why it ended; empty where it says nothing.
        takes_down: a program that is started anew when this one dies, because it waits for what this one held.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    restart: bool = True
    last_word: str = ""
    takes_down: str | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    next_start: float = 0.0
    finished: bool = False


class Supervisor:
    """Runs programs until ``stop``; every event is told to ``say`` as one line."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        self._logs = logs
        self._say = say
        self._programs: dict[str, Program] = {}
        self.stopping = False

    def add(self, program: Program) -> None:
        """Take a program in; ``tick`` starts it."""
        self._programs[program.name] = program

    def has(self, name: str) -> bool:
        """True where a program of that name is in and not finished."""
        program = self._programs.get(name)
        return program is not None and not program.finished

    def alive(self, name: str) -> bool:
        """True while that program's process runs."""
        program = self._programs.get(name)
        return program is not None and program.process is not None and program.process.poll() is None

    def process(self, name: str) -> int | None:
        """The number of that program's process; None while there is none."""
        program = self._programs.get(name)
        return None if program is None or program.process is None else program.process.pid

    def tick(self) -> None:
        """Start what is due, note what died. Call a few times a second from the main thread."""
        now = time.monotonic()
        for program in self._programs.values():
            if program.finished:
                continue
            if program.process is None:
                if now >= program.next_start:
                    self._start(program, now)
                continue
            status = program.process.poll()
            if status is None:
                continue
            program.process = None
            if status == 0 and not program.restart:
                program.finished = True
                continue
            program.failures = 0 if now - program.started > STEADY_SECONDS else program.failures + 1
            wait = BACKOFF_SECONDS[min(program.failures, len(BACKOFF_SECONDS) - 1)]
            program.next_start = now + wait
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            how += self._why(program)
            self._take_down(program.takes_down)
            self._say(f"{program.name} {how}; starting it again in {wait:g} s (log: {self._log(program)})")

    def _why(self, program: Program) -> str:
        """The program's last word, where its log ends with one."""
        if not program.last_word:
            return ""
        with self._log(program).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines() or [""]
        return f": {lines[-1].removeprefix(program.last_word)}" if lines[-1].startswith(program.last_word) else ""

    def _take_down(self, name: str | None) -> None:
        other = self._programs.get(name or "")
        if other is not None and other.process is not None:
            other.process.terminate()

    def run(self, every: Callable[[], None] | None = None, seconds: float = 0.2) -> None:
        """Tick until SIGTERM, SIGINT or ``stopping``; then stop everything."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            while not self.stopping:
                self.tick()
                if every is not None:
                    every()
                time.sleep(seconds)
        finally:
            self.stop()

    def stop(self) -> None:
        """SIGTERM to all, in reverse order of their start; SIGKILL to what is left after ``STOP_SECONDS``."""
        running = [p.process for p in reversed(self._programs.values()) if p.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.stopping = True

    def _log(self, program: Program) -> Path:
        return self._logs / f"{program.name}.log"

    def _start(self, program: Program, now: float) -> None:
        log = self._log(program)
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            program.process = subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                env={**os.environ, **program.environment},
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            self._say(f"{program.name} cannot be started: {error.strerror} ({program.command[0]})")
            program.next_start = now + BACKOFF_SECONDS[-1]
            return
        finally:
            os.close(fd)
        program.started = now
        self._say(f"{program.name} started (process {program.process.pid})")


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG (prctl(2), option 1): the kernel kills the child when the supervisor is gone."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)
