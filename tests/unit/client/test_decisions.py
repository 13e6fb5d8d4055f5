"""Deciding on a study: who, on exactly what was shown, and what will leave."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from consilium_client.agent.administration import Administration
from consilium_client.commands import cli
from consilium_client.site import Home as SiteHome
from consilium_shared.errors import BudgetRefused, ConfigurationError
from consilium_shared.privacy.budget import in_words
from consilium_shared.protocol.messages import Update
from consilium_shared.study import Study


@pytest.fixture
def running(site: Any, connect: Callable[[Any], Any]) -> Any:
    """A site with a proposal, whose commands reach its agent without a socket."""
    site.ask(site.coordinator.propose())
    return connect(site)


def test_showing_says_that_counts_will_leave_of_how_many_and_how_often(
    running: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.show("synthetic-study")
    held_back = running.service.data.patients(running.coordinator.study).held_back
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
    estimate = Administration(site.service).estimate("synthetic-study")
    monkeypatch.setattr(cli, "ask", lambda *_, **__: estimate)
    cli.show("synthetic-study")
    assert "lets no evaluation counts leave" in " ".join(capsys.readouterr().out.split())


def test_the_person_at_the_keyboard_stands_in_the_ledger(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "dr-synthetic")
    cli.approve("synthetic-study", yes=True)
    assert running.service.spending.approval(running.coordinator.study.digest).by == "dr-synthetic"


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
        monkeypatch.setattr(running.service.patient_counts, "noised", lambda *_: 200)
        return True

    monkeypatch.setattr("typer.confirm", another_draw)
    with pytest.raises(ConfigurationError, match="another plan"):
        cli.approve("synthetic-study", by="Dr Synthetic")
    assert running.service.spending.approval(running.coordinator.study.digest) is None


def test_a_program_of_another_version_is_told_so(site: Any) -> None:
    service = Administration(site.service)
    old = {"command": "approve", "study": "s", "by": "b"}  # without the plan that was shown
    for request in (old, {"command": "burn"}, {"command": "status", "x": 1}):
        assert "another version" in json.loads(service.handle(json.dumps(request).encode()))["error"]


def test_machine_readable_approval_never_asks(running: Any) -> None:
    with pytest.raises(ConfigurationError, match="--yes"):
        cli.approve("synthetic-study", by="Dr Synthetic", as_json=True)


@pytest.mark.parametrize("yes", [True, False])
def test_what_the_budget_does_not_cover_is_not_approved_and_nobody_is_asked(
    new_coordinator: Callable[..., Any],
    new_site: Callable[[Any], Any],
    connect: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    yes: bool,
) -> None:
    coordinator = new_coordinator(epsilon=1.5)
    site = connect(new_site(coordinator))
    site.ask(coordinator.propose())
    before = site.kinds()
    monkeypatch.setattr("typer.confirm", lambda _: pytest.fail("asked for what cannot be"))
    with pytest.raises(BudgetRefused, match=r"cannot afford the study: .* over by .*Nothing was approved or charged"):
        cli.approve("synthetic-study", by="Dr Synthetic", yes=yes)
    assert "over by" in " ".join(capsys.readouterr().out.split())
    assert site.kinds() == before


def test_show_and_budget_say_the_same_of_what_is_spent_reserved_and_left(
    running: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    c = running.coordinator
    cli.approve("synthetic-study", by="Dr Synthetic", yes=True)
    other = Study.model_validate({**c.study.contract, "study": "other"})
    running.ask(c.propose(other))
    seen = []
    for number in (1, 2, 3):
        assert isinstance(running.ask(c.train(number), c.model), Update)
        capsys.readouterr()
        cli.budget(as_json=True)
        (asset,) = json.loads(capsys.readouterr().out)
        cli.show("other", as_json=True)
        shown = json.loads(capsys.readouterr().out)
        same = ("limit", "delta", "spent", "reserved")
        assert [shown["budget"][key] for key in same] == [asset[key] for key in same]
        assert asset["left"] == pytest.approx(asset["epsilon"] - asset["spent"] - asset["reserved"], abs=1e-5)
        assert f"spent ε {in_words(asset['spent'])}"[:-1] in shown["arithmetic"]
        assert "more is reserved for approved studies" in shown["arithmetic"]
        (own,) = asset["studies"]
        assert own["epsilon"] + own["reserved"] == pytest.approx(2.0, abs=0.01)
        seen.append((asset["spent"], asset["reserved"], asset["left"]))
    spent, reserved, left = zip(*seen, strict=True)
    assert spent == tuple(sorted(spent))
    assert reserved == tuple(sorted(reserved, reverse=True))
    assert left == pytest.approx([left[0]] * 3, abs=1e-5)
    cli.reject("synthetic-study", "over", by="Dr Synthetic")
    capsys.readouterr()
    cli.budget(as_json=True)
    (asset,) = json.loads(capsys.readouterr().out)
    assert asset["reserved"] == 0
    assert asset["left"] == pytest.approx(asset["epsilon"] - asset["spent"], abs=1e-5)


def test_what_is_approved_already_is_not_asked_about_again(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.approve("synthetic-study", by="Dr Synthetic", yes=True)
    monkeypatch.setattr("typer.confirm", lambda _: pytest.fail("asked for what is decided"))
    with pytest.raises(ConfigurationError, match="approved already, by Dr Synthetic"):
        cli.approve("synthetic-study", by="Dr Other")


def test_without_anybody_to_answer_the_message_says_how_to_decide(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: str) -> bool:
        raise click.Abort

    monkeypatch.setattr("typer.confirm", nobody)
    with pytest.raises(ConfigurationError, match=r"nothing was decided.* give --yes"):
        cli.approve("synthetic-study", by="Dr Synthetic")
    assert running.service.spending.approval(running.coordinator.study.digest) is None


def test_a_command_in_a_folder_that_is_no_home_says_so(tmp_path: Path, coordinator: Any) -> None:
    for command in (cli.studies, cli.budget, cli.status):
        with pytest.raises(ConfigurationError, match=r"is no site's home.* --home or CONSILIUM_SITE_HOME"):
            command(home=tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is no site's home"):
        SiteHome(tmp_path / "elsewhere").config()
    with pytest.raises(ConfigurationError, match=r"programs are not running.* start them: consilium-site up"):
        cli.studies(home=coordinator.site.root)


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([f"P{i},a,{i % 7},{i % 3}" for i in range(60)], "DOES NOT FIT classes: only records of a"),
        (
            [f"P{i},{'ab'[i % 2]},4.5,{i % 3}" for i in range(60)],
            "odd x: all 60 values are 4.5; is it the right column?",
        ),
    ],
)
def test_what_does_not_fit_is_shown_before_anybody_decides(
    running: Any, capsys: pytest.CaptureFixture[str], rows: list[str], shown: str
) -> None:
    file = running.coordinator.site.root / "synthetic.csv"
    file.write_text("\n".join(["patient,label,x,y", *rows]) + "\n", encoding="utf-8")
    cli.show("synthetic-study")
    assert shown in " ".join(capsys.readouterr().out.split())
    cli.show("synthetic-study", as_json=True)
    assert json.loads(capsys.readouterr().out)["fit"][0]["what"] in shown


def test_a_study_that_leaves_no_record_is_shown_with_the_cause_and_cannot_be_approved(running: Any) -> None:
    file = running.coordinator.site.root / "synthetic.csv"
    file.write_text("patient,label,x,y\n" + "".join(f"P{i},ill,1,2\n" for i in range(60)), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="label: 60 of 60 rows say 'ill'"):
        cli.approve("synthetic-study", by="Dr Synthetic", yes=True)
    file.write_text("patient,label,z,y\n" + "".join(f"P{i},a,1,2\n" for i in range(60)), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="no column 'x'"):
        cli.approve("synthetic-study", by="Dr Synthetic", yes=True)
    assert "approve" not in running.kinds()
