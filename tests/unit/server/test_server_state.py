"""The server's durable state, and its questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium_server.state.checkpoint import Checkpoint, CheckpointFile
from consilium_server.study.exchange_state import ExchangeState
from consilium_shared.errors import IntegrityError


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint("s" * 64, number, np.full(3, number, np.float32), {"m": np.arange(3.0)}, {"round": number})


def test_a_checkpoint_is_read_as_it_was_written_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path)
    assert file.read("s" * 64) is None
    for number in (1, 2):
        file.write(checkpoint(number))
    found = file.read("s" * 64)
    assert found is not None
    assert (found.round, found.model.tolist(), found.optimizer["m"].tolist(), found.record) == (
        2,
        [2.0] * 3,
        [0.0, 1.0, 2.0],
        {"round": 2},
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_crash_between_the_two_files_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path)
    file.write(checkpoint(1))
    index, kept = file.index.read_bytes(), {f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")}
    file.write(checkpoint(2))
    file.index.write_bytes(index)  # as if the crash had come before the index was replaced
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    found = file.read("s" * 64)
    assert found is not None
    assert found.round == 1


def test_damaged_or_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path)
    file.write(checkpoint(1))
    with pytest.raises(IntegrityError, match="another study"):
        file.read("t" * 64)
    arrays = next(tmp_path.glob("*.safetensors"))
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="backup"):
        file.read("s" * 64)


SITES = ("a", "b", "c")


def question(minimum: int = 2) -> ExchangeState:
    return ExchangeState(SITES, minimum, opened=0.0, timeout=60.0)


def test_a_question_closes_when_everybody_has_answered() -> None:
    asked = question()
    for site in SITES:
        assert not asked.done(1.0)
        asked.answer(site)
    assert asked.done(1.0)


def test_a_site_that_is_away_delays_by_the_timeout_and_no_longer() -> None:
    asked = question()
    asked.answer("a")
    asked.answer("b")
    asked.problem("c", "unavailable")
    assert not asked.done(59.9)
    assert asked.done(60.0)
    assert asked.away() == {"c": "unavailable"}


def test_below_the_minimum_it_waits_for_ever_and_says_for_whom() -> None:
    asked = question()
    asked.answer("a")
    asked.problem("b", "unavailable")
    assert not asked.done(1e9)
    assert asked.away() == {"b": "unavailable", "c": "no answer yet"}


def test_it_closes_at_once_when_the_minimum_cannot_be_reached() -> None:
    asked = question()
    asked.refuse("a", "budget", "spent")
    asked.refuse("b", "rejected", "no")
    assert asked.done(0.0)
    assert not asked.enough()
    assert set(asked.stopped()) == {"a", "b"}


def test_a_failure_inside_a_site_is_asked_once_more_and_does_not_stop_it_for_the_study() -> None:
    asked = question()
    asked.refuse("a", "internal", "")
    assert "a" in asked.open()
    asked.refuse("a", "internal", "")
    assert "a" not in asked.open()
    assert asked.stopped() == {}


@given(st.lists(st.tuples(st.sampled_from(["answer", "refuse", "problem"]), st.sampled_from(SITES)), max_size=12))
def test_every_site_is_in_exactly_one_place(events: list[tuple[str, str]]) -> None:
    asked = question()
    for kind, site in events:
        legal = site in asked.open()
        arguments = {"answer": (), "refuse": ("budget", ""), "problem": ("unavailable",)}[kind]
        if legal:
            getattr(asked, kind)(site, *arguments)
        else:
            with pytest.raises(ValueError, match="already"):
                getattr(asked, kind)(site, *arguments)
        places = [*asked.answered, *asked.refused, *asked.open()]
        assert sorted(places) == sorted(SITES)
