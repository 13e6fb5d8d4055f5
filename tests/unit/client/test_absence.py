"""A site that is out of a study which it approved says so to its own people, with reason and cure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from consilium_client.agent import absence
from consilium_client.agent.administration import Administration
from consilium_client.agent.refusals import CURES
from consilium_client.commands import cli
from consilium_shared.protocol.messages import Refusal

NAME = "synthetic-study"


@pytest.fixture
def running(site: Any, connect: Callable[[Any], Any]) -> Any:
    """A site that approved the study, and has not read its data since."""
    site.approve()
    site.restart()
    return connect(site)


def listed(site: Any) -> dict[str, Any]:
    (found,) = Administration(site.service).studies()
    return found


def told(site: Any, command: Callable[..., None], capsys: pytest.CaptureFixture[str], *named: str) -> str:
    capsys.readouterr()
    command(*named, home=site.coordinator.site.root)
    return " ".join(capsys.readouterr().out.split())


def lose(site: Any) -> tuple[Path, str]:
    """The data, and a round that is refused for it."""
    table = site.coordinator.site.root / "synthetic.csv"
    rows = table.read_text()
    table.write_text("patient,label\n")
    assert isinstance(site.ask(site.coordinator.train(1), site.coordinator.model), Refusal)
    return table, rows


def test_a_site_that_takes_part_is_not_out(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    running.ask(running.coordinator.train(1), running.coordinator.model)
    assert listed(running)["out"] is None
    assert "what brings it back" not in told(running, cli.studies, capsys)


def test_a_refusal_that_people_can_mend_is_shown_with_round_reason_and_cure_until_the_site_answers_again(
    running: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    table, rows = lose(running)
    out = listed(running)["out"]
    assert (out["round"], out["reason"], out["cure"]) == (1, "data", CURES["data"])
    for said in (told(running, cli.status, capsys), told(running, cli.studies, capsys)):
        assert f"what brings it back: {CURES['data']}" in said
        assert "data of round 1: the site's data cannot be used as the study asks" in said
    table.write_text(rows)
    assert f"what brings it back: {CURES['data']}" in told(running, cli.show, capsys, NAME)
    running.ask(running.coordinator.train(1), running.coordinator.model)
    assert listed(running)["out"] is None


def test_a_restart_does_not_forget_it_and_being_asked_what_was_decided_is_no_return(running: Any) -> None:
    lose(running)
    running.restart()
    running.ask(running.coordinator.propose())
    assert listed(running)["out"]["reason"] == "data"


def test_what_was_refused_before_a_decision_is_not_shown_after_it(running: Any) -> None:
    lose(running)
    running.service.reject(running.service.proposals.find(NAME), "tester", "synthetic reason")
    assert listed(running)["out"] is None


def test_a_study_that_was_never_closed_and_long_not_heard_of_is_named_with_how_to_end_it(
    running: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert listed(running)["quiet_since"] is None
    monkeypatch.setattr(absence, "QUIET", timedelta(seconds=-1))
    last = running.service.ledger.entries[-1].time
    assert listed(running)["quiet_since"] == last
    said = told(running, cli.studies, capsys)
    assert f"nothing was heard of it since {last}" in said and "consilium-site reject ends it here" in said
    running.service.ledger.append(
        "release",
        {"study": running.coordinator.study.digest, "round": 3, "message": "closing", "sha256": "0" * 64, "bytes": 1},
    )
    assert listed(running)["quiet_since"] is None
