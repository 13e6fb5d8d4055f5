"""Replies are received one by one, each object once, and nothing of a reply that never was complete stays."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run

from consilium_server.transport.study_run import Reply, StudyGrid, content_of
from consilium_shared.transport.long_polling import Waits

QUESTION, OTHER = "1" * 64, "2" * 64


class Store:
    """Stands for the SuperLink: announces a reply once, hands its objects out, forgets it when told to.

    Attributes:
        missing: ids of objects that are still being uploaded.
        pulls: how often each object was handed out.
        confirmed: how often each reply was.
        away: True: no request gets through.
    """

    def __init__(self, *replies: Message) -> None:
        self.replies = list(replies)
        self.contents = {
            each: found.deflate() for reply in replies for each, found in get_all_nested_objects(reply).items()
        }
        self.missing: set[str] = set()
        self.pulls: Counter[str] = Counter()
        self.confirmed: Counter[str] = Counter()
        self.away = False

    def of(self, kind: str) -> list[str]:
        return [each for each, content in self.contents.items() if content.startswith(kind.encode() + b" ")]

    def PullMessages(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        found, self.replies = self.replies, []
        return SimpleNamespace(messages_list=found, message_object_trees=[get_object_tree(each) for each in found])

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        there = request.object_id not in self.missing
        self.pulls[request.object_id] += there
        content = self.contents.get(request.object_id)
        return SimpleNamespace(object_found=content is not None, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        if self.away:
            raise httpx.ConnectError("away")
        self.confirmed[request.message_object_id] += 1


def reply(content: RecordDict, question: str = QUESTION) -> Message:
    return make_message(Metadata(1, "", 2, 1, question, "", 0.0, 60.0, "train"), content)


def grid(store: Store) -> StudyGrid:
    return StudyGrid(store, Run.create_empty(1), threading.Event(), Waits("/"))  # type: ignore[arg-type]


def receive(opened: StudyGrid, folder: Path) -> list[Reply]:
    return list(opened.receive({QUESTION, OTHER}, 10**9, folder))


def test_a_reply_that_is_still_uploading_is_taken_up_where_it_stood(tmp_path: Path) -> None:
    payload = b"".join(bytes([part]) * 5 * 1024**2 for part in range(3))
    store = Store(reply(content_of(b"late", payload, {})), reply(content_of(b"ready", b"", {}), OTHER))
    opened = grid(store)
    store.missing = {store.of("ArrayChunk")[1]}
    assert [each.header for each in receive(opened, tmp_path)] == [b"ready"]
    store.missing = set()
    (late,) = receive(opened, tmp_path)
    assert (late.question, late.header, late.payload.read(), late.problem) == (QUESTION, b"late", payload, None)
    assert set(store.pulls.values()) == {1} and store.pulls.keys() == store.contents.keys()
    assert set(store.confirmed.values()) == {1}
    assert receive(opened, tmp_path) == []


def test_a_reply_whose_removal_failed_is_removed_and_handed_out_later_once(tmp_path: Path) -> None:
    ours, foreign = content_of(b"h", b"payload", {}), RecordDict({})
    for content, expected in ((ours, (None, b"payload")), (foreign, ("malformed", b""))):
        store = Store(reply(content))
        opened = grid(store)
        store.away = True
        with pytest.raises(httpx.ConnectError):
            receive(opened, tmp_path)
        store.away = False
        (found,) = receive(opened, tmp_path)
        assert (found.problem, found.payload.read()) == expected
        assert list(store.confirmed.values()) == [1] and receive(opened, tmp_path) == []


def test_an_object_that_the_superlink_lost_makes_the_reply_lost(tmp_path: Path) -> None:
    store = Store(reply(content_of(b"h", b"payload", {})))
    del store.contents[store.of("ArrayChunk")[0]]
    (found,) = receive(grid(store), tmp_path)
    assert (found.problem, found.header, found.payload.size) == ("lost", b"", 0)
    assert list(store.confirmed.values()) == [1]


def test_what_was_never_complete_is_forgotten_here_and_there(tmp_path: Path) -> None:
    payload = b"".join(bytes([part]) * 5 * 1024**2 for part in range(3))
    store = Store(reply(content_of(b"h", payload, {})), reply(RecordDict({"x": ConfigRecord({"x": 1})}), OTHER))
    opened = grid(store)
    store.missing = {store.of("ArrayChunk")[2]}
    receive(opened, tmp_path)
    assert open_below(tmp_path) == 1
    opened.forget()
    assert open_below(tmp_path) == 0 and list(tmp_path.iterdir()) == []
    assert len(store.confirmed) == 2
    store.missing = set()
    assert receive(opened, tmp_path) == []


def open_below(folder: Path) -> int:
    """Number of files below a folder that this process holds open."""
    held = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum(str(each).startswith(f"{folder}/") for each in held)
