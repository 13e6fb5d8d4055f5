"""Whatever ends the agent while it tries its machine is not tried for ever: smaller pieces, or a refusal says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.client.test_machine import a_plan, a_study

from consilium_client.agent.administration import Administration
from consilium_client.agent.machine import Machine
from consilium_client.commands.checks import resources as doctor
from consilium_client.state.trials import Trials
from consilium_client.training import fit
from consilium_client.training.rehearsal import rehearse
from consilium_shared.errors import ConsiliumError, MachineError
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertise, Refusal, Update

ABOUT = {"study": "a" * 64, "rows": 32, "what": "largest pieces"}


class Killed(BaseException):
    """Stands for what Linux does when memory ends: nothing of the program runs any more."""


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "threads", lambda *_: 1)


def die_in(patch: pytest.MonkeyPatch, name: str, dies: Callable[[int], bool], tried: list[int]) -> None:
    """In ``fit.name`` the program is ended for pieces of which ``dies`` says so; nothing that follows in it runs."""
    real = getattr(fit, name)

    def killed(*arguments: Any) -> Any:
        rows = arguments[4 if name == "rehearse" else 3]
        tried.append(rows)
        if dies(rows):
            patch.setattr(Trials, "stopped", lambda _: None)
            raise Killed
        return real(*arguments)

    patch.setattr(fit, name, killed)


@pytest.mark.parametrize("name", ["rehearse", "dependence"])
def test_pieces_that_ended_the_agent_twice_give_way_to_smaller_ones(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, tried = a_study(), list[int]()
    die_in(monkeypatch, name, lambda rows: rows > 1, tried)
    for _ in range(2):
        with pytest.raises(Killed):
            Machine(tmp_path).fit(study, a_plan(study), "cpu", "book-keeping")
    assert Machine(tmp_path).fit(study, a_plan(study), "cpu", "book-keeping").rows == 1
    assert tried == [32, 32, 1]


def test_pieces_on_all_cores_that_ended_the_agent_twice_give_way_to_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, real, tried = a_study(), rehearse, list[int]()
    monkeypatch.setattr(fit, "threads", lambda *_: 3)

    def killed(*arguments: Any) -> None:
        tried.append(arguments[5])
        if arguments[5] > 1:
            monkeypatch.setattr(Trials, "stopped", lambda _: None)
            raise Killed
        real(*arguments)

    monkeypatch.setattr(fit, "rehearse", killed)
    for _ in range(2):
        with pytest.raises(Killed):
            Machine(tmp_path).fit(study, a_plan(study), "cpu", "book-keeping")
    found = Machine(tmp_path).fit(study, a_plan(study), "cpu", "book-keeping")
    assert (found.rows, found.workers, tried) == (32, 1, [3, 3, 1])


def test_a_study_that_no_piece_is_small_enough_for_is_refused_with_the_reason_until_somebody_says_retry(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    site.approve()
    asked, tried = c.train(), list[int]()
    with monkeypatch.context() as full:
        die_in(full, "rehearse", lambda _: True, tried)
        for _ in range(4):
            with pytest.raises(Killed):
                site.ask(asked, c.model)
            site.restart()
        said = site.ask(asked, c.model)
        assert isinstance(said, Refusal) and "its log says why" in said.detail and tried == [32, 32, 1, 1]
        with pytest.raises(ConsiliumError, match="ended again and again while it tried pieces of 32"):
            doctor._rows(c.site)
        keys = messages.encode(Advertise(**c.common(), of="training", round=2, attempt=1), c.key)
        assert isinstance(site.ask(keys), Refusal), "nor is a key given"
    assert site.charges() == 0
    assert Administration(site.service).retry("synthetic-study")["ended"] == 2
    assert isinstance(site.ask(c.train(1, attempt=2), c.model), Update)


def test_a_trial_that_ends_by_itself_or_by_its_people_leaves_no_mark(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    with trials.trying(ABOUT):
        assert trials.times(ABOUT) == 1
        (file,) = tmp_path.glob("*.json")
        assert file.stat().st_mode & 0o777 == 0o600
    assert trials.times(ABOUT) == 0
    with pytest.raises(MemoryError), trials.trying(ABOUT):
        raise MemoryError
    assert not [*tmp_path.glob("*.json")]
    with trials.trying(ABOUT):
        trials.stopped()  # SIGTERM: the agent ends in the midst of it
        assert Trials(tmp_path).times(ABOUT) == 0


def test_one_end_is_not_held_against_the_machine_and_two_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "stopped", lambda _: None)
    for times in (1, 2):
        with Trials(tmp_path).trying(ABOUT):
            pass
        gone = Trials(tmp_path).gone_wrong(ABOUT)
        assert gone == "" if times == 1 else "ended 2 times" in gone
    assert Trials(tmp_path).gone_wrong({**ABOUT, "rows": 1}) == ""
    assert [*Trials(tmp_path).all()] == [ABOUT]
    (file,) = tmp_path.glob("*.json")
    file.write_bytes(b'{"format":2}')
    assert Trials(tmp_path).gone_wrong(ABOUT) == "", "a mark that cannot be read is none"


def test_a_machine_that_failed_is_asked_before_a_key_is_given_and_one_that_is_not_known_is_not_tested_then(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    site.approve()
    tested: list[int] = []

    def failing(_: Any, where: torch.device, way: str, rows: int) -> str:
        tested.append(rows)
        return "its rows differ"

    def keys(number: int) -> messages.Answer:
        return site.ask(messages.encode(Advertise(**c.common(), of="training", round=number, attempt=1), c.key))

    with monkeypatch.context() as broken:
        broken.setattr(fit, "dependence", failing)
        asked = c.train()
        assert tested == [], "keys are given at once where nothing is known"
        assert isinstance(site.ask(asked, c.model), Refusal) and tested == [32, 1]
        assert isinstance(keys(2), Refusal)
        site.restart()
        assert isinstance(keys(3), Refusal) and tested == [32, 1], "the finding is kept: nobody tests again"
    for file in (c.site.store / "machine").glob("*.json"):
        file.unlink()
    site.restart()
    assert not isinstance(keys(3), Refusal)


def test_a_machine_that_had_too_little_memory_is_tried_again_when_a_key_is_asked_for(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    site.approve()

    def short(*_: Any) -> None:
        raise MemoryError

    keys = messages.encode(Advertise(**c.common(), of="training", round=2, attempt=1), c.key)
    with monkeypatch.context() as today:
        today.setattr(fit, "rehearse", short)
        assert isinstance(site.ask(c.train(), c.model), Refusal)
        assert isinstance(site.ask(keys), Refusal)
    assert not isinstance(site.ask(keys), Refusal)


def test_without_any_store_nothing_is_marked() -> None:
    study = a_study()
    assert fit.fitting(study, a_plan(study), "cpu", "book-keeping").rows == 32
    with pytest.raises(MachineError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "dependence", lambda *_: "its rows differ")
        fit.fitting(study, a_plan(study), "cpu", "book-keeping")
