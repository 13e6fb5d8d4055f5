"""Processes that prepare records: they have the files of one asset and a recipe, and neither keys nor ledger.

What passes between them and the agent is frames of JSON and the bytes of records, never objects: a decoder that a
foreign file has taken over can give wrong pixels and no more.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from consilium_client.prepared.catalogue import File, Stamp
from consilium_client.prepared.making import Failed, Record, files_of, make
from consilium_client.prepared.recipe import Recipe, Source
from consilium_shared.errors import DataError

MODULE = "consilium_client.data.preparing"
"""The program, above this room: it knows the recipes."""
SECONDS = 600.0
"""A source that takes longer is set aside."""
FRAME_BYTES = 2**24
FEW = 64
"""So many sources are made here; of more, each process begins with as many: starting one takes a second."""
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
    if len(sources) <= FEW:
        for number, source in enumerate(sources):
            files = files_of(source)
            skip = files is not None and not wanted(number, files)
            done(number, None if skip else make(recipe, source, files))
        return
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
    """One process, started again where a source has ended it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Preparer:
        return self

    def __exit__(self, *about: object) -> None:
        self._end()

    def work(self, number: int, source: Source, wanted: Wanted, done: Done, lock: threading.Lock) -> None:
        outcome: Record | Failed | None
        try:
            process = self._running()
            send(_pipe(process.stdin), {"paths": [str(path) for path in source.paths], "detail": source.detail})
            files = _files(self._frame(process))
            with lock:
                want = files is None or wanted(number, files)
            send(_pipe(process.stdin), want)
            outcome = self._outcome(process) if want else None
        except TimeoutError:
            self._end()
            outcome = Failed(ENDLESS, lasting=False)
        except (EOFError, BrokenPipeError):
            self._end()
            outcome = Failed(CRASHED, lasting=False)
        with lock:
            done(number, outcome)

    def _outcome(self, process: subprocess.Popen[bytes]) -> Record | Failed:
        answer = self._frame(process)
        if "reason" in answer:
            return Failed(str(answer["reason"]), bool(answer["lasting"]))
        content = _exactly(_pipe(process.stdout), self._recipe.record_bytes, SECONDS)
        return Record(content, str(answer["remark"]))

    def _frame(self, process: subprocess.Popen[bytes]) -> Any:
        return receive(_pipe(process.stdout), SECONDS)

    def _running(self) -> subprocess.Popen[bytes]:
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
                send(_pipe(self._process.stdin), {"kind": self._recipe.kind, "parameters": self._recipe.parameters})
                self._frame(self._process)
            except (EOFError, BrokenPipeError, TimeoutError):
                self._end()
                raise DataError("a process that prepares data does not start; see whether memory is left") from None
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
        send(answers, "ready")
        while True:
            asked = receive(questions)
            source = Source(tuple(map(Path, asked["paths"])), asked["detail"])
            files = files_of(source)
            send(answers, None if files is None else [[list(file.stamp), file.sha256] for file in files])
            if receive(questions):
                made = make(recipe, source, files)
                if isinstance(made, Failed):
                    send(answers, {"reason": made.reason, "lasting": made.lasting})
                else:
                    send(answers, {"remark": made.remark})
                    _write(answers, made.content)
    except (EOFError, BrokenPipeError):
        return


def send(pipe: IO[bytes], value: Any) -> None:
    """Write a frame: four bytes of length, and JSON."""
    text = json.dumps(value).encode()
    _write(pipe, struct.pack("<I", len(text)) + text)


def receive(pipe: IO[bytes], seconds: float | None = None) -> Any:
    """The value of the next frame.

    Raises:
        EOFError: the other side is gone, or wrote something else.
        TimeoutError: it did not write for so many seconds.
    """
    (length,) = struct.unpack("<I", _exactly(pipe, 4, seconds))
    try:
        if length > FRAME_BYTES:
            raise ValueError
        return json.loads(_exactly(pipe, length, seconds))
    except ValueError:
        raise EOFError from None


def _files(answer: Any) -> tuple[File, ...] | None:
    if answer is None:
        return None
    try:
        return tuple(File(Stamp(*map(int, stamp)), str(sha256)) for stamp, sha256 in answer)
    except (TypeError, ValueError):
        raise EOFError from None


def _write(pipe: IO[bytes], data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[pipe.write(left) :]


def _exactly(pipe: IO[bytes], count: int, seconds: float | None = None) -> bytes:
    found = bytearray(count)
    left = memoryview(found)
    while left:
        if seconds is not None and not select.select([pipe], [], [], seconds)[0]:
            raise TimeoutError
        read = os.readv(pipe.fileno(), [left])
        if not read:
            raise EOFError
        left = left[read:]
    return bytes(found)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise EOFError
    return pipe
