"""Whoever waits at the SuperLink is woken when there is something; one site cannot keep that from the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from consilium_server.superlink import wake
from consilium_shared.transport.long_polling import Holding


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was rung, by Flower's handlers that store nothing."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fleet_handlers, "push_messages", lambda **_: SimpleNamespace(objects_to_push=["chunk"]))
    monkeypatch.setattr(fleet_handlers, "push_object", lambda **_: None)
    monkeypatch.setattr(runtime_handlers, "push_messages", lambda *_: SimpleNamespace(objects_to_push=["chunk", "q1"]))
    monkeypatch.setattr(runtime_handlers, "push_object", lambda *_: None)
    monkeypatch.setattr(Holding, "ring", lambda _, *names: found.append(names))
    wake.hold_back_empty_answers(None)
    return found


def pushed(*ids: str, to: tuple[int, ...] = (0,)) -> Any:
    nodes = to * len(ids) if len(to) == 1 else to
    described = [SimpleNamespace(message_id=each, dst_node_id=node) for each, node in zip(ids, nodes, strict=True)]
    return SimpleNamespace(messages_list=[SimpleNamespace(metadata=each) for each in described])


def test_a_study_is_woken_by_the_last_object_of_a_reply_alone(rung: list[tuple[Any, ...]]) -> None:
    fleet_handlers.push_messages(pushed("reply"), None)  # type: ignore[arg-type]
    for each in ("chunk", "reply", "reply"):
        fleet_handlers.push_object(SimpleNamespace(object_id=each), None)  # type: ignore[arg-type]
    assert rung == [(wake.REPLIES,)]


def test_a_site_that_names_many_messages_at_once_keeps_nobodys_reply_waiting(rung: list[tuple[Any, ...]]) -> None:
    fleet_handlers.push_messages(pushed("reply"), None)  # type: ignore[arg-type]
    many = (str(number) for number in range(2 * wake.INCOMPLETE))
    fleet_handlers.push_messages(pushed("mine", *many), None)  # type: ignore[arg-type]
    fleet_handlers.push_object(SimpleNamespace(object_id="reply"), None)  # type: ignore[arg-type]
    assert rung == [(wake.REPLIES,)]


def test_an_id_that_is_none_is_not_kept(rung: list[tuple[Any, ...]]) -> None:
    long = "0" * (wake.ID_CHARACTERS + 1)
    fleet_handlers.push_messages(pushed(long), None)  # type: ignore[arg-type]
    fleet_handlers.push_object(SimpleNamespace(object_id=long), None)  # type: ignore[arg-type]
    assert rung == []


def test_a_site_is_woken_when_its_own_question_is_whole_and_not_when_a_part_of_it_is_there(
    rung: list[tuple[Any, ...]],
) -> None:
    task: Any = None
    runtime_handlers.push_messages(pushed("q1", "q2", to=(7, 8)), None, task)  # type: ignore[arg-type]
    assert rung == [(8,)]  # of q2 nothing is missing
    for each in ("chunk", "another's", "q1", "q1"):
        runtime_handlers.push_object(SimpleNamespace(object_id=each), None, task)  # type: ignore[arg-type]
    assert rung == [(8,), (7,)]
