"""A result is kept whole or not at all, and no longer than it may serve; nor is the seed that it came from."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilium_client.state import results as module
from consilium_client.state.draw_seeds import DrawSeeds, Use
from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.results import About, Results
from consilium_shared.errors import IntegrityError
from consilium_shared.identity import Identity

STUDY, OTHER, MODEL = "5" * 64, "6" * 64, "a" * 64
UPDATE = np.arange(10, dtype=np.float32) - 4.5
COUNTS = np.asarray([3, -1, 2**40], dtype=np.int64)


def about(number: int = 2, purpose: Any = "training", counts: int = 3, counted: bool = True) -> About:
    fields: dict[str, Any] = {
        "round": number,
        "attempt": 1,
        "model": MODEL,
        "counted": counted,
        "epsilon": 0.5,
        "counts": counts,
    }
    return About(purpose=purpose, weight=7, parameters=UPDATE.size if purpose == "training" else 0, **fields)


def put(results: Results, found: About, study: str = STUDY) -> None:
    results.put(study, found, UPDATE if found.parameters else UPDATE[:0], COUNTS if found.counts else None)


def test_a_result_is_read_as_it_was_put_also_after_a_restart(tmp_path: Path) -> None:
    put(Results(tmp_path), about())
    found = Results(tmp_path).get(STUDY, "training", 2)
    assert found is not None and found.about == about()
    assert found.update(0, 10).tolist() == UPDATE.tolist()
    assert found.update(3, 4).tolist() == UPDATE[3:7].tolist()
    assert found.counts().tolist() == COUNTS.tolist()
    assert Results(tmp_path).get(STUDY, "evaluation", 2) is None
    assert Results(tmp_path).get(OTHER, "training", 2) is None


def test_where_no_counts_were_asked_for_there_are_none(tmp_path: Path) -> None:
    results = Results(tmp_path)
    put(results, about(counts=0))
    found = results.get(STUDY, "training", 2)
    assert found is not None and found.counts().size == 0


def test_one_result_a_purpose_is_kept_in_files_that_nobody_else_reads(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    for number in (1, 2):
        put(results, about(number))
    put(results, about(2, "evaluation"))
    files = sorted((tmp_path / "results").iterdir())
    assert [file.name for file in files] == [f"{STUDY}.evaluation", f"{STUDY}.training"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "results").stat().st_mode) == 0o700
    kept = results.about(STUDY, "training")
    assert kept is not None and kept.round == 2


def test_what_must_not_be_used_any_more_is_gone_and_nothing_else(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for study in (STUDY, OTHER):
        put(results, about(), study)
        put(results, about(2, "evaluation"), study)
    results.drop(STUDY, "training")
    assert results.get(STUDY, "training", 2) is None and results.get(STUDY, "evaluation", 2) is not None
    results.forget(STUDY)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [f"{OTHER}.evaluation", f"{OTHER}.training"]
    results.drop(STUDY, "training")  # nothing is left to drop, and that is fine


def test_no_damage_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 256)  # digests in several pieces
    results = Results(tmp_path)
    put(results, about())
    file = tmp_path / f"{STUDY}.training"
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if results.about(STUDY, "training") != about():  # the first line, or what is left of it
            continue
        with pytest.raises(IntegrityError, match="move it away, and the round's next attempt is worked on anew"):
            results.get(STUDY, "training", 2)
    for damaged in (whole[:-1], whole + b"x", whole[: len(whole) - 50]):
        file.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            results.get(STUDY, "training", 2)


def test_what_a_kill_left_half_written_is_gone_after_the_next_start(tmp_path: Path) -> None:
    put(Results(tmp_path), about())
    (tmp_path / f".{STUDY}.training.x7_abcde").write_bytes(b"half")
    assert Results(tmp_path).get(STUDY, "training", 2) is not None
    assert [file.name for file in tmp_path.iterdir()] == [f"{STUDY}.training"]


# -- the seeds that results came from


def ended(folder: Path, results: Results, purpose: Any) -> bool:
    """Whether a seed for round 2 is gone after a start with these results."""
    seeds, use = DrawSeeds(folder / "attempts"), Use(purpose, 2, MODEL)
    seeds.begin(STUDY, use, 1)
    with LedgerFile(folder / "ledger.jsonl", "north", Identity.generate()) as ledger:
        seeds.end_kept(results, ledger)
        assert ledger.entries == ()
    return seeds.under_way(STUDY, use) is None


@pytest.mark.parametrize(("kept", "gone"), [(None, False), (1, False), (2, True), (3, True)])
@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_the_seed_of_a_kept_result_does_not_outlive_a_start(
    tmp_path: Path, purpose: str, kept: int | None, gone: bool
) -> None:
    results = Results(tmp_path / "results")
    if kept is not None:
        put(results, about(kept, purpose))
    if purpose == "evaluation":  # an update without counts says nothing of this seed
        put(results, about(3, counts=0))
    assert ended(tmp_path, results, purpose) == gone


@pytest.mark.parametrize(("counts", "counted", "gone"), [(3, True, True), (3, False, False), (0, True, False)])
def test_counts_that_ride_on_the_next_rounds_update_end_their_seed_if_they_are_this_sites(
    tmp_path: Path, counts: int, counted: bool, gone: bool
) -> None:
    results = Results(tmp_path / "results")
    put(results, about(3, counts=counts, counted=counted))
    assert ended(tmp_path, results, "evaluation") == gone


def test_a_seed_that_cannot_be_read_is_swept(tmp_path: Path) -> None:
    (tmp_path / f"{STUDY}.training.json").write_bytes(b"torn")
    with LedgerFile(tmp_path / "ledger.jsonl", "north", Identity.generate()) as ledger:
        DrawSeeds(tmp_path).end_kept(Results(tmp_path / "results"), ledger)
    assert not list(tmp_path.glob("*.json"))
