"""A decoder that a file has taken over costs that file's record, whatever it says, and never the agent."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from consilium_client.prepared import making, processes
from consilium_client.prepared.catalogue import File, read_file
from consilium_client.prepared.making import CHANGED, Failed, Record
from consilium_client.prepared.recipe import Field, Recipe, Source
from consilium_shared.preparation.foreign import OutOfMemory, any_failure
from consilium_shared.printable import REPLACEMENT


class Numbers(Recipe):
    """A record of 8 bytes."""

    kind: ClassVar[str] = "numbers"
    parameters: ClassVar[dict[str, Any]] = {}
    fields = (Field((8,), "|u1"),)

    def code(self) -> str:
        return ""

    def make(self, source: Source) -> Any:
        raise AssertionError("made in the agent")


def frame(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    for name in "abc":
        (tmp_path / name).write_text(name * 9)
    return [Source((tmp_path / name,)) for name in "abc"]


def prepared(
    monkeypatch: pytest.MonkeyPatch, sources: list[Source], said: bytes, how: str = "all", seconds: float = 30.0
) -> tuple[list[Any], dict[int, tuple[File, ...]]]:
    """Outcomes by a program that says this to each question, and the files that the agent was told of."""
    monkeypatch.setattr(processes, "FEW", 1)
    monkeypatch.setattr(processes, "MODULE", "tests.support.hostile_decoder")
    monkeypatch.setattr(processes, "SECONDS", seconds)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("HOSTILE", json.dumps([said.hex(), how]))
    outcomes: list[Any] = [None] * len(sources)
    told: dict[int, tuple[File, ...]] = {}

    def wanted(number: int, files: tuple[File, ...]) -> bool:
        told[number] = files
        return True

    processes.prepare(Numbers(), sources, wanted, outcomes.__setitem__, 1, 2**30)
    return outcomes, told


@pytest.mark.parametrize(
    "said",
    [
        frame(b"[]"),
        frame(b"null"),
        frame(b'{"reason": 7, "lasting": true}'),
        frame(b'{"reason": "x", "lasting": "yes"}'),
        frame(b'{"reason": "' + b"x" * 301 + b'", "lasting": true}'),
        frame(b'{"remark": 1e999}') + bytes(8),
        frame(b"[" * 60_000),
        frame(b"\xff\xfe"),
        struct.pack("<I", 2**32 - 1),
        struct.pack("<I", 2**16 + 1),
    ],
)
def test_an_answer_that_is_none_is_a_crash_of_that_decoder(
    monkeypatch: pytest.MonkeyPatch, sources: list[Source], said: bytes
) -> None:
    outcomes, _ = prepared(monkeypatch, sources[:2], said)
    assert outcomes == [Failed(processes.CRASHED, lasting=False)] * 2


def test_its_words_are_printable_and_its_digests_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, sources: list[Source]
) -> None:
    outcomes, told = prepared(monkeypatch, sources, frame(b'{"reason": "\\u001b[2J", "lasting": true}'))
    assert outcomes == [Failed(f"{REPLACEMENT}[2J", lasting=True)] * 3
    assert [told[n][0].sha256 for n in range(3)] == [hashlib.sha256(c * 9).hexdigest() for c in (b"a", b"b", b"c")]


def test_what_it_says_beside_an_answer_is_not_taken_for_the_next(
    monkeypatch: pytest.MonkeyPatch, sources: list[Source]
) -> None:
    good, evil = (frame(b'{"remark": ""}') + bytes([each] * 8) for each in (1, 2))
    outcomes, _ = prepared(monkeypatch, sources, good + evil)
    assert outcomes == [Record(bytes([1] * 8))] * 3


def test_a_single_file_is_made_in_a_process_and_one_that_makes_no_more_is_started_anew(
    monkeypatch: pytest.MonkeyPatch, sources: list[Source]
) -> None:
    """``Numbers`` cannot be made in the agent."""
    started: list[Any] = []
    popen = subprocess.Popen

    def counted(*arguments: Any, **named: Any) -> Any:
        started.append(popen(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    good = frame(b'{"remark": ""}') + bytes([3] * 8)
    assert prepared(monkeypatch, sources[:1], good)[0] == [Record(bytes([3] * 8))]
    assert len(started) == 1
    monkeypatch.setattr(processes, "MANY", 2)
    assert prepared(monkeypatch, sources, good)[0] == [Record(bytes([3] * 8))] * 3
    assert len(started) == 3


def test_memory_that_was_not_there_is_no_lasting_reason(sources: list[Source]) -> None:
    class Greedy(Numbers):
        def make(self, source: Source) -> Any:
            return (np.zeros(2**60, dtype=np.uint8),)

    class Foreign(Numbers):
        def make(self, source: Source) -> Any:
            with any_failure("not readable as DICOM"):
                return (np.zeros(2**60, dtype=np.uint8),)

    for recipe in (Greedy(), Foreign()):
        assert making.make(recipe, sources[0]) == Failed(str(OutOfMemory()), lasting=False)


@pytest.mark.parametrize("how", ["drip", "deaf"])
def test_one_deadline_holds_for_every_read_and_write_of_a_source(
    monkeypatch: pytest.MonkeyPatch, sources: list[Source], how: str
) -> None:
    long = Source(sources[0].paths * (2**17 // len(str(sources[0].paths[0]))))  # more than a pipe holds
    outcomes, _ = prepared(monkeypatch, [sources[0], long], frame(b'{"remark": ""}') + bytes(8), how, 0.7)
    assert outcomes == [Failed(processes.ENDLESS, lasting=False)] * 2


def test_a_file_that_changed_meanwhile_has_no_record(monkeypatch: pytest.MonkeyPatch, sources: list[Source]) -> None:
    read = making.files_of

    def then_changed(source: Source) -> Any:
        found = read(source)
        source.paths[0].write_text("another content")
        return found

    monkeypatch.setattr(processes, "files_of", then_changed)
    outcomes, _ = prepared(monkeypatch, sources[:2], frame(b'{"remark": ""}') + bytes(8))
    assert outcomes == [Failed(CHANGED, lasting=False)] * 2


def test_sources_that_need_much_memory_are_made_one_after_the_other() -> None:
    queue = processes._Queue([Source((), memory=need) for need in (60, 60, 500, 10)], 100)
    given, lock, now, most = list[int](), threading.Lock(), 0, list[int]()

    def work() -> None:
        nonlocal now
        for number, source in queue:
            with lock:
                now += source.memory
                most.append(now)
                given.append(number)
            time.sleep(0.01)
            with lock:
                now -= source.memory
            queue.free(source)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == [0, 1, 2, 3] and max(most) == 500 and all(each <= 100 or each == 500 for each in most)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe")


def test_a_descriptor_of_a_high_number_is_no_hindrance(monkeypatch: pytest.MonkeyPatch, sources: list[Source]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        outcomes, _ = prepared(monkeypatch, sources[:2], frame(b'{"remark": ""}') + bytes(range(8)))
    finally:
        for each in held:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert outcomes == [Record(bytes(range(8)))] * 2
