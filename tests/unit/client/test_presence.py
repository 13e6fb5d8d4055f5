"""A site's people see whether it is connected, and are told of proposals, absences and a lost connection."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from consilium_client.commands import conditions
from consilium_client.site import Home
from consilium_client.transport import contact
from consilium_client.transport.contact import Contact, Note


def test_a_contact_is_noted_and_its_end_with_the_cause(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert contact.read(tmp_path) == Contact() and contact.read(tmp_path).said() == "never"
    Note(tmp_path).answered()
    found = contact.read(tmp_path)
    assert found.connected() and found.said().startswith("since 20")
    assert not found.connected(time.time() + contact.FRESH_SECONDS + 1)
    Note(tmp_path).ended("clock: 60 s ahead")
    ended = contact.read(tmp_path)
    assert not ended.connected() and ended.seen == found.seen
    assert ended.said().startswith("not since 20") and ended.said().endswith("; clock: 60 s ahead")
    (tmp_path / "run" / contact.FILE).write_bytes(b"{")
    assert contact.read(tmp_path) == Contact()


def test_what_a_hospitals_people_should_know_is_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"study": "one", "digest": "d1", "state": "pending", "out": None}
    away = {"since": "2026-11-30", "reason": "data", "cure": "correct the path"}
    told: list[dict[str, Any]] = [
        about,
        {**about, "study": "two", "digest": "d2", "state": "refused"},
        {**about, "study": "three", "digest": "d3", "state": "approved", "out": away},
        {**about, "study": "four", "digest": "d4", "state": "approved"},
    ]
    monkeypatch.setattr(conditions, "ask", lambda *_: told)
    found = conditions.Conditions(Home(tmp_path)).now()
    assert {name: each.kind for name, each in found.items()} == {
        "proposal:d1": "proposal",
        "refused:d2": "proposal",
        "out:d3:2026-11-30": "out",
        "server": "server-away",
    }
    assert "consilium-site show one" in found["proposal:d1"].text
    assert "correct the path" in found["out:d3:2026-11-30"].text
