"""The same question gets the same bytes; another question for an answered round gets none."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from consilium_client.attempts import Attempts
from consilium_client.proposals import Proposals
from consilium_client.store import AnswerStore, LedgerFile
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.identity import Identity

STUDY, ASKED, OTHER = "5" * 64, "a" * 64, "b" * 64


def test_an_answer_comes_back_byte_for_byte_also_after_a_restart(tmp_path: Path) -> None:
    AnswerStore(tmp_path).put(STUDY, 1, "update", ASKED, b'{"h":1}\n', b"\n\x00payload")
    for store in (AnswerStore(tmp_path), AnswerStore(tmp_path)):
        assert store.get(STUDY, 1, "update", ASKED) == (b'{"h":1}\n', b"\n\x00payload")
    assert store.get("6" * 64, 1, "update", ASKED) is None
    assert store.get(STUDY, 1, "counts", ASKED) is None
    assert store.get(STUDY, 2, "update", ASKED) is None


def test_only_the_latest_round_is_kept(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    for number in (1, 2, 10):
        store.put(STUDY, number, "update", ASKED, b"h", str(number).encode())
    store.put(STUDY, 9, "counts", ASKED, b"h", b"")
    assert sorted(file.name for file in (tmp_path / STUDY).iterdir()) == ["counts.9", "update.10"]
    assert store.get(STUDY, 10, "update", ASKED) == (b"h", b"10")
    assert store.get(STUDY, 9, "counts", ASKED) == (b"h", b"")


def test_a_round_is_answered_once(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.put(STUDY, 5, "update", ASKED, b"h", b"p")
    with pytest.raises(PeerError, match="another request"):
        store.get(STUDY, 5, "update", OTHER)
    with pytest.raises(PeerError, match="over"):
        store.get(STUDY, 4, "update", ASKED)
    for number in (4, 5):
        with pytest.raises(PeerError, match="again"):
            store.put(STUDY, number, "update", ASKED, b"h", b"q")
    assert store.get(STUDY, 5, "update", ASKED) == (b"h", b"p")


def test_files_are_private_and_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers")
    store.put(STUDY, 1, "update", ASKED, b"h", b"p")
    leftover = tmp_path / "answers" / STUDY / ".update.2.x8f"
    leftover.write_bytes(b"half")
    store = AnswerStore(tmp_path / "answers")
    assert not leftover.exists()
    assert stat.S_IMODE((tmp_path / "answers" / STUDY / "update.1").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "answers" / STUDY).stat().st_mode) == 0o700


def test_a_crash_before_forgetting_the_older_answer_leaves_one_after_the_next_start(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.put(STUDY, 9, "update", ASKED, b"nine", b"")
    nine = (tmp_path / STUDY / "update.9").read_bytes()
    store.put(STUDY, 10, "update", ASKED, b"ten", b"")
    store.put(STUDY, 10, "counts", ASKED, b"counts", b"")
    (tmp_path / STUDY / "update.9").write_bytes(nine)
    store = AnswerStore(tmp_path)
    assert {file.name for file in (tmp_path / STUDY).iterdir()} == {"update.10", "counts.10"}
    assert store.get(STUDY, 10, "update", ASKED) == (b"ten", b"")
    assert store.latest(STUDY, "update") == 10
    assert store.latest(STUDY, "other") is None


@pytest.mark.parametrize("kind", [Attempts, Proposals])
def test_half_written_files_are_gone_after_the_next_start(tmp_path: Path, kind: type[Attempts | Proposals]) -> None:
    leftover = tmp_path / f".{STUDY}.json.x8f"
    leftover.write_bytes(b"half")
    kept = tmp_path / f"{STUDY}.json"
    kept.write_bytes(b"{}")
    kind(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_damaged_answer_is_not_sent(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.put(STUDY, 1, "update", ASKED, b"header", b"payload")
    path = tmp_path / STUDY / "update.1"
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"x", data.replace(b"payload", b"pbyload"), b"", b"[]\n", b"{}\n"):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="damaged"):
            store.get(STUDY, 1, "update", ASKED)


@pytest.mark.parametrize(
    ("study", "kind"), [("../" + "5" * 61, "update"), (STUDY, "../x"), (STUDY, "a.b"), ("", "update")]
)
def test_names_from_messages_never_become_other_paths(tmp_path: Path, study: str, kind: str) -> None:
    store = AnswerStore(tmp_path / "store")
    with pytest.raises(PeerError):
        store.put(study, 1, kind, ASKED, b"", b"")
    with pytest.raises(PeerError):
        store.get(study, 1, kind, ASKED)


@pytest.mark.parametrize(("latest", "left"), [(None, True), (1, True), (2, False), (3, False)])
def test_the_seed_of_an_answered_round_does_not_outlive_a_start(tmp_path: Path, latest: int | None, left: bool) -> None:
    answers = AnswerStore(tmp_path / "answers")
    attempts = Attempts(tmp_path / "attempts")
    attempts.begin(STUDY, "evaluation", 2, ASKED, 1)
    if latest is not None:
        answers.put(STUDY, latest, "counts", ASKED, b"h", b"p")
    answers.put(STUDY, 2, "update", ASKED, b"h", b"p")  # another kind of answer says nothing of this seed
    with LedgerFile(tmp_path / "ledger.jsonl", "north", Identity.generate()) as ledger:
        attempts.end_answered(answers, ledger)
        assert ledger.entries == ()
    assert (attempts.under_way(STUDY, "evaluation", 2, ASKED) is not None) == left


def test_a_seed_that_cannot_be_read_is_swept(tmp_path: Path) -> None:
    (tmp_path / f"{STUDY}.training.json").write_bytes(b"torn")
    with LedgerFile(tmp_path / "ledger.jsonl", "north", Identity.generate()) as ledger:
        Attempts(tmp_path).end_answered(AnswerStore(tmp_path / "answers"), ledger)
    assert not list(tmp_path.glob("*.json"))
