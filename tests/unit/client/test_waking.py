"""A site that waits costs little: pauses of the SuperNode's loop, and what an agent imports when."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from consilium_client.agent.main import warming
from consilium_client.transport import supernode
from consilium_client.transport.supernode import HELD_PAUSE_S, IDLE_AFTER_S, IDLE_POLL_S, POLL_S, Polling
from consilium_shared.transport.long_polling import Waits


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock on which nothing passes by itself, and the pauses that were made."""
    clock = SimpleNamespace(now=0.0, pauses=[])
    monkeypatch.setattr(supernode, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.pauses.append))
    return clock


def test_after_an_answer_that_was_held_back_the_supernode_looks_again_at_once(paused: Any) -> None:
    waits = Waits("/")
    polling = Polling(waits)
    waits.held = True
    polling.sleep(3)
    assert paused.pauses == [HELD_PAUSE_S]


def test_where_no_answer_is_held_back_it_pauses_and_for_longer_when_idle(paused: Any) -> None:
    polling = Polling(Waits("/"))
    polling.sleep(3)
    paused.now = IDLE_AFTER_S + 1
    polling.sleep(3)
    assert paused.pauses == [POLL_S, IDLE_POLL_S]


def test_the_waiting_for_the_courier_ends_with_what_it_stores_and_the_next_is_a_new_one() -> None:
    polling = Polling(Waits("/"))
    done: list[Any] = []
    stored: Any = SimpleNamespace(wait=done.append, clear=lambda: done.append("cleared"))
    polling.stored = stored
    polling.sleep(0.5)
    assert done == [0.5, "cleared"], "cleared before the loop looks again: what is stored after that ends the next"


def test_an_agent_begins_to_import_what_training_needs_with_the_first_message_and_once() -> None:
    warmed: list[int] = []
    begun = threading.Event()

    def warm() -> None:
        warmed.append(1)
        begun.set()

    handle = warming(lambda header: header, warm)
    assert warmed == []
    assert [handle(b"one"), handle(b"two")] == [b"one", b"two"]
    assert begun.wait(60)
    assert warmed == [1]
