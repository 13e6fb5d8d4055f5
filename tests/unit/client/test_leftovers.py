"""A study that the hospital says no to leaves no update, answer, key or seed on the disk, and does nothing twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.client.test_secure_sums import CURIOUS, Crash, other, reason

from consilium_client.agent import leftovers
from consilium_client.agent.absence import BY_POLICY
from consilium_client.agent.secure_sums import SecureSums
from consilium_client.state.results import Results
from consilium_client.state.sum_store import SumStore
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertise, Update
from consilium_shared.study import Study


def left(site: Any) -> list[str]:
    """Files of the study in the site's store, but the proposal and the number of patients that may leave."""
    store: Path = site.service.home.store
    found = [file.relative_to(store).as_posix() for file in store.rglob("*") if file.is_file()]
    study = site.coordinator.study.digest
    return sorted(
        name.replace(study, "STUDY")
        for name in found
        if study in name and name.split("/")[0] not in ("studies", "cohorts")
    )


def approve_again(site: Any) -> None:
    site.service.approvals.approve(site.service.proposals.find(site.coordinator.study.digest), "tester")
    site.coordinator.neighbours._met.clear()


def withdraw(site: Any) -> None:
    site.service.reject(site.service.proposals.find(site.coordinator.study.digest), "tester", "we stop")


@pytest.fixture
def worked(site: Any) -> Any:
    """A site whose update has left and whose sum was never opened."""
    site.approve()
    assert isinstance(site.ask(site.coordinator.train(), site.coordinator.model), Update)
    sums = ["sums/STUDY/session.json", "sums/STUDY/training.1.1"]
    assert left(site) == ["answers/STUDY/update.18", "pace/STUDY.json", "results/STUDY.training", *sums]
    return site


def test_after_a_rejection_nothing_is_left_but_what_was_worked_on_and_the_ledger(worked: Any) -> None:
    session = worked.service.sums.session(worked.coordinator.study.digest)
    withdraw(worked)
    assert left(worked) == ["sums/STUDY/worked.json"]
    stayed = (worked.service.home.store / "sums" / worked.coordinator.study.digest / "worked.json").read_text()
    assert session.seed not in stayed and all(what in stayed for what in session.seen)
    assert worked.kinds()[-1] == "reject"
    assert reason(worked.ask(worked.coordinator.train(1, attempt=2), worked.coordinator.model)) == "rejected"
    assert left(worked) == ["sums/STUDY/worked.json"], "nor does a refused request leave anything"


def test_what_a_crash_left_of_a_rejection_goes_at_the_next_start(worked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as dying:
        dying.setattr(Results, "forget", die)
        with pytest.raises(Crash):
            withdraw(worked)
    worked.restart()
    assert left(worked) == ["sums/STUDY/worked.json"]


def test_what_could_be_masked_again_goes_before_the_proof_of_where_it_was(
    worked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails in between leaves no result whose attempts nobody knows any more."""

    def fail(*_: Any) -> None:
        raise OSError

    with monkeypatch.context() as failing:
        failing.setattr(SumStore, "forget_secrets", fail)
        with pytest.raises(OSError):
            withdraw(worked)
    assert "results/STUDY.training" not in left(worked) and "sums/STUDY/training.1.1" in left(worked)


def test_a_study_that_is_approved_and_rejected_again_within_one_request_leaves_nothing_either(
    worked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    withdraw(worked)
    approve_again(worked)
    c, contribute = worked.coordinator, SecureSums.contribute

    def meanwhile(*arguments: Any) -> Any:
        made = contribute(*arguments)
        withdraw(worked)
        assert "results/STUDY.training" in left(worked)
        return made

    worked.service.leftovers.forget_rejected = lambda: None  # as where the keys were asked for before
    asked = c.train(1, attempt=2)
    del worked.service.leftovers.forget_rejected
    monkeypatch.setattr(SecureSums, "contribute", meanwhile)
    worked.ask(asked, c.model)
    assert left(worked) == ["sums/STUDY/worked.json"]


def test_while_a_request_is_answered_nothing_is_deleted_and_afterwards_everything(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.approve()
    c, contribute = site.coordinator, SecureSums.contribute
    asked = c.train()

    def meanwhile(*arguments: Any) -> Any:
        made = contribute(*arguments)
        other_thread = threading.Thread(target=withdraw, args=(site,))
        other_thread.start()
        other_thread.join()
        assert "results/STUDY.training" in left(site)
        return made

    monkeypatch.setattr(SecureSums, "contribute", meanwhile)
    assert isinstance(site.ask(asked, c.model), Update)
    assert left(site) == ["sums/STUDY/worked.json"]


def test_approved_again_a_private_round_is_drawn_and_charged_anew(worked: Any) -> None:
    c = worked.coordinator
    withdraw(worked)
    patients = worked.service.patient_counts.noised(c.study, 10**6, 1)
    approve_again(worked)
    assert worked.service.patient_counts.noised(c.study, 1, 1) == patients, "the number of patients is drawn once"
    assert isinstance(worked.ask(c.train(1, attempt=2), c.model), Update)
    assert worked.charges() == 2


@pytest.mark.parametrize("tombstone", [True, False])
def test_approved_again_a_round_without_privacy_is_not_worked_on_a_second_time(
    new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any], tombstone: bool
) -> None:
    """Not even where somebody deleted what stayed: the ledger has the release."""
    c = new_coordinator(epsilon="unlimited", policy=f"allow_without_privacy: true\n  {CURIOUS}")
    changes = {"privacy": {"mode": "none"}, "evaluation": {}}
    c.study = Study.model_validate({**c.study.contract, **changes})
    c.model = c.pack(c.study)
    site = new_site(c)
    site.approve()
    assert isinstance(site.ask(c.train(), c.model), Update)
    withdraw(site)
    if not tombstone:
        (site.service.home.store / "sums" / c.study.digest / "worked.json").unlink()
    approve_again(site)
    model = other(site, 0.5)
    assert reason(site.ask(c.train(1, model, attempt=2), model)) == "sum"
    if tombstone:
        assert reason(site.ask(c.train(2, c.model), c.model)) == "sum", "the same model in another round"
    assert site.charges() == 1


def test_approved_again_the_same_question_is_not_answered_with_a_deleted_key(site: Any) -> None:
    site.approve()
    c = site.coordinator
    asked = messages.encode(Advertise(**c.common(), round=1, attempt=1, of="training"), c.key)
    before = site.ask(asked)
    assert site.ask(asked) == before
    withdraw(site)
    approve_again(site)
    assert site.ask(asked).advert.key != before.advert.key
    assert isinstance(site.ask(c.train(), c.model), Update), "the site knows the key that it gave"


# -- studies of which nothing is heard any more


def in_days(site: Any, days: float) -> datetime:
    """So many days after the last entry of the ledger."""
    return datetime.fromisoformat(site.service.ledger.entries[-1].time) + timedelta(days=days)


def test_a_study_of_which_nothing_was_heard_for_as_long_as_the_policy_says_leaves_nothing_and_reserves_nothing(
    worked: Any,
) -> None:
    spending, charged = worked.service.spending, worked.charges()
    held = left(worked)
    worked.service.leftovers.end_quiet(None, in_days(worked, 10_000))
    worked.service.leftovers.end_quiet(30, in_days(worked, 29.9))
    assert left(worked) == held and spending.reserved("synthetic-table")
    worked.service.leftovers.end_quiet(30, in_days(worked, 30.1))
    assert left(worked) == ["sums/STUDY/worked.json"]
    assert spending.reserved("synthetic-table") == () and worked.charges() == charged > 0
    entry = worked.service.ledger.entries[-1]
    assert (entry.kind, entry.body.by) == ("reject", BY_POLICY) and "nothing was asked since" in entry.body.reason


def test_a_request_of_a_study_that_was_ended_is_told_why_also_after_a_restart_and_until_it_is_approved_again(
    worked: Any,
) -> None:
    worked.service.leftovers.end_quiet(30, in_days(worked, 31))
    c = worked.coordinator
    again = c.train(1, attempt=2)
    for _ in range(2):
        said = worked.ask(again, c.model)
        assert (said.reason, said.detail.startswith("nothing was asked here for so long")) == ("rejected", True)
        worked.restart()
    approve_again(worked)
    assert isinstance(worked.ask(c.train(1, attempt=3), c.model), Update)


def test_silence_is_looked_at_when_the_program_starts(worked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = worked.coordinator.site
    home.config_file.write_text(home.config_file.read_text().replace("policy:\n", "policy:\n  quiet_days: 8\n"))
    worked.restart()
    assert "sums/STUDY/session.json" in left(worked)
    later = in_days(worked, 8.1)
    monkeypatch.setattr(leftovers, "datetime", SimpleNamespace(now=lambda _: later))
    worked.restart()
    assert left(worked) == ["sums/STUDY/worked.json"]


def test_a_study_that_was_closed_or_never_approved_is_not_ended_for_its_silence(site: Any) -> None:
    site.ask(site.coordinator.propose())
    site.service.leftovers.end_quiet(8, in_days(site, 400))
    assert "reject" not in site.kinds()
    site.approve()
    about = {"study": site.coordinator.study.digest, "round": 3, "message": "closing", "sha256": "0" * 64, "bytes": 1}
    site.service.ledger.append("release", about)
    site.service.leftovers.end_quiet(8, in_days(site, 400))
    assert "reject" not in site.kinds()


def test_while_a_request_is_answered_no_study_is_ended(worked: Any) -> None:
    with worked.service.leftovers.working:
        worked.service.leftovers.end_quiet(8, in_days(worked, 400))
        assert worked.kinds()[-1] != "reject"
