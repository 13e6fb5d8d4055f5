"""Processes that prepare records: they have the files of one asset and a recipe, and neither keys nor ledger.

What passes between them and the agent is frames of JSON and the bytes of records, never objects, and the agent digests
the files itself: what a decoder that a foreign file has taken over says to the agent can be wrong pixels and no more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from consilium_client.prepared.catalogue import File
from consilium_client.prepared.frames import ANSWER_BYTES, Deadline, read, receive, said_something, send, write
from consilium_client.prepared.making import Failed, Record, confirmed, files_of, make
from consilium_client.prepared.recipe import Recipe, Source
from consilium_shared.errors import DataError
from consilium_shared.printable import printable

MODULE = "consilium_client.data.preparing"
"""The program, above this room: it knows the recipes."""
SECONDS = 600.0
"""A source that takes longer, from the question to the last byte of the answer, is set aside."""
READY = "ready"
WORDS = 300
"""Most characters of a reason or a remark."""
FEW = 64
"""Sources for which one more process is started: starting it takes a second."""
MANY = 512
"""Sources that one process makes. One that a foreign file has taken over has no more of them to answer wrongly."""
CRASHED = "the decoder crashed on it, or took more memory than there was"
ENDLESS = f"the decoder took longer than {SECONDS / 60:.0f} minutes"

Wanted = Callable[[int, tuple[File, ...]], bool]
"""Told a source's number and its files: whether a record is to be made of it."""
Done = Callable[[int, "Record | Failed | None"], None]
"""Told a source's number and its record, why there is none, or None where none was wanted."""


def prepare(recipe: Recipe, sources: list[Source], wanted: Wanted, done: Done, processes: int, memory: int) -> None:
    """Make the records of all sources, in as many processes as pay off. Calls ``wanted`` and ``done`` one at a time.

    Args:
        recipe: the preparation.
        sources: what is to be prepared.
        wanted: asked when a source's digest is known.
        done: told each outcome, in whatever order they come.
        processes: most processes.
        memory: bytes that the sources in work may take together (``Source.memory``); one alone may take more.

    Raises:
        DataError: the processes do not start.
    """
    count = min(processes, -(-len(sources) // FEW))
    queue, lock = _Queue(sources, memory), threading.Lock()

    def work() -> None:
        with _Preparer(recipe) as preparer:
            for number, source in queue:
                try:
                    preparer.work(number, source, wanted, done, lock)
                finally:
                    queue.free(source)

    threads = [threading.Thread(target=queue.guarded(work), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if queue.failure is not None:
        raise queue.failure


class _Queue:
    """Sources that wait, given out so that those in work do not take too much memory together."""

    def __init__(self, sources: list[Source], memory: int) -> None:
        self._left = iter(enumerate(sources))
        self._memory, self._taken, self._turn = memory, 0, threading.Condition()
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[int, Source]]:
        while True:
            with self._turn:
                found = None if self.failure is not None else next(self._left, None)
                if found is None:
                    return
                need = found[1].memory
                while self._taken and self._taken + need > self._memory:
                    self._turn.wait()
                self._taken += max(need, 1)
            yield found

    def free(self, source: Source) -> None:
        with self._turn:
            self._taken -= max(source.memory, 1)
            self._turn.notify_all()

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work, whose failure ends that of the others, too."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.failure = error

        return run


class _Preparer:
    """One process, started when there is something to make, and again where a source has ended it or after many."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._left = 0
        """Sources that the process that runs still makes."""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Preparer:
        return self

    def __exit__(self, *about: object) -> None:
        self._end()

    def work(self, number: int, source: Source, wanted: Wanted, done: Done, lock: threading.Lock) -> None:
        files = files_of(source)
        with lock:
            want = files is None or wanted(number, files)
        outcome = confirmed(self._made(source), source, files) if want else None
        with lock:
            done(number, outcome)

    def _made(self, source: Source) -> Record | Failed:
        try:
            process, until = self._running(), Deadline(SECONDS)
            question = {"paths": [str(path) for path in source.paths], "detail": source.detail}
            send(_pipe(process.stdin), question, until)
            match receive(_pipe(process.stdout), until, ANSWER_BYTES):
                case {"reason": str(reason), "lasting": bool(lasting)} if len(reason) <= WORDS:
                    return Failed(printable(reason), lasting)
                case {"remark": str(remark)} if len(remark) <= WORDS:
                    return Record(read(_pipe(process.stdout), self._recipe.record_bytes, until), printable(remark))
                case _:
                    raise EOFError
        except TimeoutError:
            self._end()
            return Failed(ENDLESS, lasting=False)
        except (EOFError, BrokenPipeError):
            self._end()
            return Failed(CRASHED, lasting=False)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and (not self._left or said_something(_pipe(self._process.stdout))):
            self._end()  # it is gone, or wrote what would be taken for an answer about the next source
        if self._process is None:
            one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **one},
            )
            try:
                until, stdin = Deadline(SECONDS), _pipe(self._process.stdin)
                os.set_blocking(stdin.fileno(), False)
                send(stdin, {"kind": self._recipe.kind, "parameters": self._recipe.parameters}, until)
                if receive(_pipe(self._process.stdout), until, ANSWER_BYTES) != READY:
                    raise EOFError
            except (EOFError, BrokenPipeError, TimeoutError):
                self._end()
                raise DataError("a process that prepares data does not start; see whether memory is left") from None
            self._left = MANY
        self._left -= 1
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                _pipe(pipe).close()
            self._process = None


def serve(recipe_of: Callable[[str, dict[str, Any]], Recipe], questions: IO[bytes], answers: IO[bytes]) -> None:
    """Prepare sources as they are asked for, until nobody asks any more: the process's side."""
    try:
        about = receive(questions)
        recipe = recipe_of(about["kind"], about["parameters"])
        send(answers, READY)
        while True:
            asked = receive(questions)
            made = make(recipe, Source(tuple(map(Path, asked["paths"])), asked["detail"]))
            if isinstance(made, Failed):
                send(answers, {"reason": made.reason, "lasting": made.lasting})
            else:
                send(answers, {"remark": made.remark})
                write(answers, made.content)
    except (EOFError, BrokenPipeError):
        return


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise EOFError
    return pipe
