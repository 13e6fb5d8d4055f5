"""Deciding on a study: who, on exactly what was shown, and what will leave."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable
from typing import Any

import pytest

from consilium_client import cli
from consilium_client.administration import Administration
from consilium_shared.errors import ConfigurationError


@pytest.fixture
def running(site: Any, connect: Callable[[Any], Any]) -> Any:
    """A site with a proposal, whose commands reach its agent without a socket."""
    site.ask(site.coordinator.propose())
    return connect(site)


def test_showing_says_that_counts_will_leave_of_how_many_and_how_often(
    running: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.show("synthetic-study")
    held_back = running.desk.patients(running.coordinator.study).held_back
    shown = " ".join(capsys.readouterr().out.split())
    assert f"counts of the {held_back} held-back patients leave with noise" in shown
    assert "after rounds 1, 2, 3; in the cost above" in shown
    assert "patients: the number with noise (deviation 10)" in shown


def test_showing_says_when_none_leave(
    new_coordinator: Callable[..., Any],
    new_site: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    coordinator = new_coordinator(policy="allow_evaluation_counts: false")
    site = new_site(coordinator)
    site.ask(coordinator.propose())
    estimate = Administration(site.desk).estimate("synthetic-study")
    monkeypatch.setattr(cli, "ask", lambda *_, **__: estimate)
    cli.show("synthetic-study")
    assert "lets no evaluation counts leave" in " ".join(capsys.readouterr().out.split())


def test_the_person_at_the_keyboard_stands_in_the_ledger(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "dr-synthetic")
    cli.approve("synthetic-study", yes=True)
    assert running.desk.spending.approval(running.coordinator.study.digest).by == "dr-synthetic"


def test_an_account_without_a_name_must_say_who_decides(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    with pytest.raises(ConfigurationError, match="--by NAME"):
        cli.approve("synthetic-study", yes=True)
    with pytest.raises(ConfigurationError, match="--by NAME"):
        cli.reject("synthetic-study", "no reason")
    cli.approve("synthetic-study", by="Dr Synthetic", yes=True)


def test_what_changed_after_it_was_shown_is_not_approved(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_draw(question: str) -> bool:
        monkeypatch.setattr(running.desk.cohorts, "size", lambda *_: 200)
        return True

    monkeypatch.setattr("typer.confirm", another_draw)
    with pytest.raises(ConfigurationError, match="another plan"):
        cli.approve("synthetic-study", by="Dr Synthetic")
    assert running.desk.spending.approval(running.coordinator.study.digest) is None


def test_a_program_of_another_version_is_told_so(site: Any) -> None:
    desk = Administration(site.desk)
    old = {"command": "approve", "study": "s", "by": "b"}  # without the plan that was shown
    for request in (old, {"command": "burn"}, {"command": "status", "x": 1}):
        assert "another version" in json.loads(desk.handle(json.dumps(request).encode()))["error"]


def test_machine_readable_approval_never_asks(running: Any) -> None:
    with pytest.raises(ConfigurationError, match="--yes"):
        cli.approve("synthetic-study", by="Dr Synthetic", as_json=True)
