"""The same question gets the same bytes; another question for an answered round gets none."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilium_client.state.draw_seeds import DrawSeeds
from consilium_client.state.proposals import Proposals
from consilium_client.state.responses import Responses
from consilium_shared import limits
from consilium_shared.errors import IntegrityError, PeerError

STUDY, ASKED, OTHER = "5" * 64, "a" * 64, "b" * 64
LARGE = 64 * 1024**2


def kept(store: Responses, study: str, number: int, kind: str) -> tuple[bytes, bytes] | None:
    """Header and payload that the store gives to who asked."""
    found = store.get(study, number, kind, ASKED)
    return None if found is None else (found[0], b"".join(found[1].pieces(3)))


def test_an_answer_comes_back_byte_for_byte_also_after_a_restart(tmp_path: Path) -> None:
    Responses(tmp_path).put(STUDY, 1, "update", ASKED, b'{"h":1}\n', b"\n\x00payload")
    for store in (Responses(tmp_path), Responses(tmp_path)):
        assert kept(store, STUDY, 1, "update") == (b'{"h":1}\n', b"\n\x00payload")
    assert store.get("6" * 64, 1, "update", ASKED) is None
    assert store.get(STUDY, 1, "counts", ASKED) is None
    assert store.get(STUDY, 2, "update", ASKED) is None


def test_only_the_latest_round_is_kept(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    for number in (1, 2, 10):
        store.put(STUDY, number, "update", ASKED, b"h", str(number).encode())
    store.put(STUDY, 9, "counts", ASKED, b"h", b"")
    assert sorted(file.name for file in (tmp_path / STUDY).iterdir()) == ["counts.9", "update.10"]
    assert kept(store, STUDY, 10, "update") == (b"h", b"10")
    assert kept(store, STUDY, 9, "counts") == (b"h", b"")


def test_a_round_is_answered_once(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    store.put(STUDY, 5, "update", ASKED, b"h", b"p")
    with pytest.raises(PeerError, match="another request"):
        store.get(STUDY, 5, "update", OTHER)
    with pytest.raises(PeerError, match="over"):
        store.get(STUDY, 4, "update", ASKED)
    for number in (4, 5):
        with pytest.raises(PeerError, match="again"):
            store.put(STUDY, number, "update", ASKED, b"h", b"q")
    assert kept(store, STUDY, 5, "update") == (b"h", b"p")


def test_files_are_private_and_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    store = Responses(tmp_path / "answers")
    store.put(STUDY, 1, "update", ASKED, b"h", b"p")
    leftover = tmp_path / "answers" / STUDY / ".update.2.x8f_abcd"
    leftover.write_bytes(b"half")
    store = Responses(tmp_path / "answers")
    assert not leftover.exists()
    assert stat.S_IMODE((tmp_path / "answers" / STUDY / "update.1").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "answers" / STUDY).stat().st_mode) == 0o700


def test_files_of_others_beside_the_answers_are_passed_over(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    store.put(STUDY, 1, "update", ASKED, b"h", b"p")
    foreign = [tmp_path / STUDY / name for name in (".update.2.x8f", "update.2x", ".update.3", "update.old")]
    for file in foreign:
        file.write_bytes(b"another's")
    Responses(tmp_path).put(STUDY, 2, "update", ASKED, b"h", b"p")
    assert sorted((tmp_path / STUDY).iterdir()) == sorted([*foreign, tmp_path / STUDY / "update.2"])


def test_a_crash_before_forgetting_the_older_answer_leaves_one_after_the_next_start(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    store.put(STUDY, 9, "update", ASKED, b"nine", b"")
    nine = (tmp_path / STUDY / "update.9").read_bytes()
    store.put(STUDY, 10, "update", ASKED, b"ten", b"")
    store.put(STUDY, 10, "counts", ASKED, b"counts", b"")
    (tmp_path / STUDY / "update.9").write_bytes(nine)
    store = Responses(tmp_path)
    assert {file.name for file in (tmp_path / STUDY).iterdir()} == {"update.10", "counts.10"}
    assert kept(store, STUDY, 10, "update") == (b"ten", b"")
    assert store.latest(STUDY, "update") == 10
    assert store.latest(STUDY, "other") is None


@pytest.mark.parametrize("kind", [DrawSeeds, lambda folder: Proposals(folder, folder.with_name("refused"))])
def test_half_written_files_are_gone_after_the_next_start(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    tmp_path = tmp_path / "store"
    tmp_path.mkdir()
    leftover = tmp_path / f".{STUDY}.json.x8f_abcd"
    leftover.write_bytes(b"half")
    whole = tmp_path / f"{STUDY}.json"
    whole.write_bytes(b"{}")
    kind(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]


def test_a_damaged_answer_is_not_sent(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    store.put(STUDY, 1, "update", ASKED, b"header", b"payload")
    path = tmp_path / STUDY / "update.1"
    data = path.read_bytes()
    line = data.rpartition(b"\n")[2]
    lengths = [data.replace(b'"header":6', b'"header":' + wrong) for wrong in (b"5", b"999", b"-1", b"6.5", b"true")]
    for damaged in (
        *(data[:-1], data + b"x", data.replace(b"payload", b"pbyload"), data.replace(b"header", b"hbader", 1)),
        *(data[1:], line, b"\n" + line, b"", b"[]", b"{}", b"x\n[]", b"x\n{}", bytes(10_000)),
        *(*lengths, data.replace(ASKED.encode(), OTHER.encode())),
    ):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="damaged"):
            store.get(STUDY, 1, "update", ASKED)


def test_a_large_answer_is_written_kept_and_read_without_being_in_memory(tmp_path: Path) -> None:
    piece = secrets.token_bytes(limits.CHUNK_BYTES)
    store = Responses(tmp_path)
    tracemalloc.start()
    try:
        with store.stage(STUDY) as staged:
            for _ in range(LARGE // len(piece)):
                staged.write(piece)
            described = staged.size, staged.sha256
            staged.commit(1, "update", ASKED, b"header")
        found = Responses(tmp_path).get(STUDY, 1, "update", ASKED)
        assert found is not None
        assert [each == piece for each in found[1].pieces()] == [True] * (LARGE // len(piece))
        assert tracemalloc.get_traced_memory()[1] < LARGE / 8
    finally:
        tracemalloc.stop()
    assert described == (LARGE, hashlib.sha256(piece * (LARGE // len(piece))).hexdigest())
    assert (found[0], found[1].size) == (b"header", LARGE)
    assert stat.S_IMODE((tmp_path / STUDY / "update.1").stat().st_mode) == 0o600


def test_of_an_answer_that_is_not_committed_nothing_stays(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    store.put(STUDY, 5, "update", ASKED, b"h", b"p")
    with store.stage(STUDY) as staged:
        staged.write(b"half")
        assert store.latest(STUDY, "update") == 5
    with pytest.raises(KeyboardInterrupt), store.stage(STUDY) as staged:
        staged.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(PeerError, match="again"), store.stage(STUDY) as staged:
        staged.commit(5, "update", OTHER, b"other")
    assert [file.name for file in (tmp_path / STUDY).iterdir()] == ["update.5"]
    assert kept(store, STUDY, 5, "update") == (b"h", b"p")


def test_what_a_kill_left_of_an_answer_under_way_is_gone_after_the_next_start(tmp_path: Path) -> None:
    with Responses(tmp_path).stage(STUDY) as staged:
        staged.write(bytes(10_000_000))
        assert len(list((tmp_path / STUDY).iterdir())) == 1
        store = Responses(tmp_path)
        assert list((tmp_path / STUDY).iterdir()) == []
        assert store.latest(STUDY, "update") is None


def test_an_answer_that_is_cut_off_while_it_is_sent_ends_the_sending(tmp_path: Path) -> None:
    store = Responses(tmp_path)
    pieces = store.put(STUDY, 1, "update", ASKED, b"h", bytes(10)).pieces(4)
    os.truncate(tmp_path / STUDY / "update.1", 6)
    assert next(pieces) == bytes(4)
    with pytest.raises(IntegrityError, match="damaged"):
        next(pieces)


@pytest.mark.parametrize(
    ("study", "kind"), [("../" + "5" * 61, "update"), (STUDY, "../x"), (STUDY, "a.b"), ("", "update")]
)
def test_names_from_messages_never_become_other_paths(tmp_path: Path, study: str, kind: str) -> None:
    store = Responses(tmp_path / "store")
    with pytest.raises(PeerError):
        store.put(study, 1, kind, ASKED, b"", b"")
    with pytest.raises(PeerError):
        store.get(study, 1, kind, ASKED)
