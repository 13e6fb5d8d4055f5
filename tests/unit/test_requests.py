"""The site's answers: idempotent, charged once, and the same after a crash between any two durable writes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from consilium_client import evaluation
from consilium_client.answers import AnswerStore
from consilium_client.store import LedgerFile
from consilium_shared import messages
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.messages import Counts, Refusal, Standing, Update
from consilium_shared.metrics import Layout
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.study import Study


class Crash(BaseException):
    """Stands for kill -9 at one place: nothing after it runs in this process."""


def reason(answer: messages.Answer) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def test_a_study_is_pending_until_it_is_approved_and_costs_nothing_until_then(site: Any) -> None:
    c = site.coordinator
    standing = site.ask(c.propose())
    assert isinstance(standing, Standing)
    assert standing.state == "pending"
    assert reason(site.ask(c.train(), c.model)) == "pending"
    site.approve()
    assert isinstance(site.ask(c.train(), c.model), Update)
    assert site.charges() == 1


def test_asking_again_while_nothing_changes_adds_nothing_to_the_ledger(site: Any) -> None:
    c = site.coordinator
    first = site.requests.handle(c.propose(), b"")
    before = site.kinds()
    for _ in range(3):
        assert site.requests.handle(c.propose(), b"") == first
    assert site.kinds() == before


def test_a_round_is_charged_before_and_settled_and_released_after(site: Any) -> None:
    c = site.coordinator
    site.approve()
    before = len(site.kinds())
    site.ask(c.train(), c.model)
    assert site.kinds()[before:] == ["charge", "settle", "release"]
    assert site.charges("count") == 1
    before = len(site.kinds())
    answer = site.requests.handle(c.train(2), c.model)
    assert site.kinds()[before:] == ["witness", "charge", "settle", "release"]
    released = site.desk.ledger.entries[-1].body
    assert released.sha256 == digest(answer[0])  # type: ignore[attr-defined]
    assert released.bytes == len(answer[0]) + len(answer[1])  # type: ignore[attr-defined]


def test_the_same_question_gets_the_same_bytes_without_a_second_charge(site: Any) -> None:
    c = site.coordinator
    site.approve()
    first = site.requests.handle(c.train(), c.model)
    assert site.requests.handle(c.train(), c.model) == first
    site.restart()
    assert site.requests.handle(c.train(), c.model) == first
    assert site.charges() == 1
    assert site.kinds().count("release") == 2  # the standing and the update


def test_another_model_or_an_older_round_is_refused_and_costs_nothing(site: Any) -> None:
    c = site.coordinator
    site.approve()
    site.ask(c.train(1), c.model)
    site.ask(c.train(2), c.model)
    other = pack(to_vector(build(c.study)) + 1, c.study)
    assert reason(site.ask(c.train(2, other), other)) == "stale-round"
    assert reason(site.ask(c.train(1), c.model)) == "stale-round"
    assert site.charges() == 2


def test_more_rounds_than_approved_are_refused(site: Any) -> None:
    c = site.coordinator
    site.approve()
    assert reason(site.ask(c.train(4), c.model)) == "policy"
    assert site.charges() == 0


def test_bytes_that_are_no_model_of_the_study_are_refused_before_a_charge(site: Any) -> None:
    c = site.coordinator
    site.approve()
    wrong = b"not a model"
    assert reason(site.ask(c.train(1, wrong), wrong)) == "model"
    assert reason(site.ask(c.train(), c.model + b"x")) == "malformed"
    assert site.charges() == 0


def test_nobody_else_can_ask(site: Any) -> None:
    c = site.coordinator
    site.approve()
    c.key = Identity.generate()
    before = site.kinds()
    assert reason(site.ask(c.train(), c.model)) == "bad-signature"
    assert reason(site.ask(b"{}", b"")) == "malformed"
    assert site.kinds() == before


def test_a_withdrawn_approval_stops_the_next_round(site: Any) -> None:
    c = site.coordinator
    site.approve()
    site.ask(c.train(1), c.model)
    site.desk.spending.reject(study=c.study.digest, name="synthetic-study", by="tester", reason="test")
    assert reason(site.ask(c.train(2), c.model)) == "rejected"
    assert reason(site.ask(c.propose())) == "rejected"
    assert site.charges() == 1


def test_an_unaffordable_study_is_refused_when_it_is_proposed(
    new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any]
) -> None:
    coordinator = new_coordinator(epsilon=0.5)
    poor = new_site(coordinator)
    refusal = poor.ask(coordinator.propose())
    assert reason(refusal) == "budget"
    assert isinstance(refusal, Refusal)
    assert "0.5" not in refusal.detail  # the arithmetic is in the ledger and stays at the site
    assert "0.5" in poor.desk.ledger.entries[-2].body.detail  # type: ignore[attr-defined]


def test_evaluation_gives_noised_counts_of_the_held_back_patients_charged_before_they_leave(site: Any) -> None:
    c = site.coordinator
    site.approve()
    site.ask(c.train(), c.model)
    before = len(site.kinds())
    answer = site.requests.handle(c.evaluate(), c.model)
    assert site.kinds()[before:] == ["charge", "settle", "release"]
    assert isinstance(c.read(answer), Counts)
    layout, counts = Layout.of(c.study), np.frombuffer(answer[1], dtype="<i8")
    sigma = site.desk.spending.approval(c.study.digest).plan.evaluation_noise
    held_back = len(site.desk.records(c.study)) - site.desk.records(c.study).train.sum()
    assert abs(layout.parts(counts)["confusion"].sum() - held_back) < 6 * 2 * layout.deviations(sigma)["confusion"]
    assert site.requests.handle(c.evaluate(), c.model) == answer
    assert site.charges("evaluation") == 1


def test_with_privacy_no_counts_leave_that_are_not_paid_for(site: Any) -> None:
    c = site.coordinator
    c.study = Study.model_validate({**c.study.contract, "evaluation": {}})
    site.approve()
    site.ask(c.train(), c.model)
    assert reason(site.ask(c.evaluate(), c.model)) == "policy"
    assert site.charges("evaluation") == 0


def test_the_whole_study_with_its_counts_and_its_number_of_patients_costs_what_was_approved(site: Any) -> None:
    c = site.coordinator
    site.approve()
    plan = site.desk.spending.approval(c.study.digest).plan
    for number in (1, 2, 3):
        assert isinstance(site.ask(c.train(number), c.model), Update)
        assert isinstance(site.ask(c.evaluate(number), c.model), Counts)
    events = site.desk.spending.state("synthetic-table").study(c.study.digest)
    assert sorted(map(str, events)) == sorted(map(str, [*plan.events()[:-1], *[plan.event()] * 3]))
    assert 1.9 < epsilon(events, 1e-3) <= 2.0


def test_only_the_noised_number_of_patients_is_in_what_leaves_and_in_the_ledger(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    monkeypatch.setattr(secrets.SystemRandom, "gauss", lambda _, mean, deviation: mean + 1.23 * deviation)
    site.approve()
    plan = site.desk.spending.approval(c.study.digest).plan
    assert plan.patients == site.desk.patients(c.study).train + round(1.23 * c.study.privacy.count_noise)
    answer = site.requests.handle(c.train(), c.model)
    assert np.frombuffer(answer[1], "<f4")[-1] == plan.patients
    assert plan.sampling_rate == min(1.0, 16 / plan.patients)


@pytest.mark.parametrize("place", ["begin", "charge", "counted", "put", "settle", "release"])
def test_a_crash_while_evaluating_repeats_the_very_same_counts_on_the_same_charge(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    site = new_site(coordinator)
    site.approve()
    site.ask(coordinator.train(), coordinator.model)
    seen: list[bytes] = []
    noised = evaluation.noised_counts

    def note(*arguments: Any, **named: Any) -> Any:
        seen.append(noised(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(evaluation, "noised_counts", note)
    with monkeypatch.context() as dying:
        crash_at(dying, "trained" if place == "counted" else place)
        with pytest.raises(Crash):
            site.requests.handle(coordinator.evaluate(), coordinator.model)
    site.restart()
    answer = site.requests.handle(coordinator.evaluate(), coordinator.model)
    assert isinstance(coordinator.read(answer), Counts)
    assert all(counts.tobytes() == answer[1] for counts in map(np.int64, seen))
    assert site.charges("evaluation") == 1
    assert site.kinds().count("settle") == 2
    assert not list((coordinator.site.store / "attempts").glob("*.json"))


@pytest.mark.parametrize("place", ["begin", "charge", "trained", "put", "settle", "release"])
def test_a_crash_between_any_two_writes_repeats_the_round_on_the_same_charge(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    site = new_site(coordinator)
    site.approve()
    crash_at(monkeypatch, place)
    with pytest.raises(Crash):
        site.requests.handle(coordinator.train(), coordinator.model)
    monkeypatch.undo()
    site.restart()
    answer = site.requests.handle(coordinator.train(), coordinator.model)
    update = coordinator.read(answer)
    assert isinstance(update, Update)
    assert site.charges() == 1
    assert update.epsilon is not None
    assert update.epsilon <= 2.0
    assert not list((coordinator.site.store / "attempts").glob("*.json"))  # the seed is gone
    assert site.kinds().count("settle") == 1
    for number in (2, 3):  # the whole study still fits its ε
        assert isinstance(site.ask(coordinator.train(number), coordinator.model), Update)


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_the_seed_of_an_answered_round_goes_at_the_next_start_even_if_nobody_asks_again(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    site = new_site(coordinator)
    site.approve()
    asked = coordinator.train()
    if purpose == "evaluation":
        site.ask(asked, coordinator.model)
        asked = coordinator.evaluate()
    with monkeypatch.context() as dying:
        crash_at(dying, "settle")
        with pytest.raises(Crash):
            site.requests.handle(asked, coordinator.model)
    assert list((coordinator.site.store / "attempts").glob("*.json"))
    site.restart()
    assert not list((coordinator.site.store / "attempts").glob("*.json"))
    charges = site.desk.ledger.books.charges.values()
    assert [each.settled for each in charges if each.body.purpose == purpose] == [2 if purpose == "training" else 1]


def test_a_repeated_round_is_the_very_same_draw(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash threw away and what leaves in the end are one release: the same patients, the same noise."""
    site = new_site(coordinator)
    site.approve()
    seen: list[bytes] = []
    put = AnswerStore.put

    def note(store: AnswerStore, *arguments: Any) -> Any:
        seen.append(arguments[-1])
        if len(seen) == 1:
            raise Crash
        return put(store, *arguments)

    monkeypatch.setattr(AnswerStore, "put", note)
    with pytest.raises(Crash):
        site.requests.handle(coordinator.train(), coordinator.model)
    site.restart()
    site.requests.handle(coordinator.train(), coordinator.model)
    assert seen[0] == seen[1]


def test_another_request_never_runs_on_a_kept_seed(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = new_site(coordinator)
    site.approve()
    crash_at(monkeypatch, "trained")
    with pytest.raises(Crash):
        site.requests.handle(coordinator.train(), coordinator.model)
    monkeypatch.undo()
    site.restart()
    other = pack(to_vector(build(coordinator.study)) + 1, coordinator.study)
    assert isinstance(site.ask(coordinator.train(1, other), other), Update)
    assert site.charges() == 2  # a charge of its own


def crash_at(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Die just before the durable write that ``place`` names (``trained``: after the last step)."""
    from consilium_client.attempts import Attempts

    append = LedgerFile.append

    def die(*_: Any, **__: Any) -> None:
        raise Crash

    def guarded(ledger: LedgerFile, kind: str, fields: dict[str, Any]) -> Any:
        if kind == place:
            raise Crash
        return append(ledger, kind, fields)

    if place == "begin":
        monkeypatch.setattr(Attempts, "begin", die)
    elif place in ("trained", "put"):
        monkeypatch.setattr(AnswerStore, "put", die)
    else:
        monkeypatch.setattr(LedgerFile, "append", guarded)
