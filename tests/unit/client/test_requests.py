"""The site's answers: idempotent, charged once, and the same after a crash between any two durable writes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consilium_client.state.draw_seeds import DrawSeeds
from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.responses import Staged
from consilium_client.state.results import Results
from consilium_client.state.sum_store import SumStore
from consilium_client.training import evaluation, trainer
from consilium_shared.canonical import digest
from consilium_shared.errors import BudgetRefused
from consilium_shared.identity import Identity
from consilium_shared.metrics import Layout
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import ApprovalStatus, Counts, Refusal, Update
from consilium_shared.study import Study


class Crash(BaseException):
    """Stands for kill -9 at one place: nothing after it runs in this process."""


def reason(answer: messages.Answer) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def test_a_study_is_pending_until_it_is_approved_and_costs_nothing_until_then(site: Any) -> None:
    c = site.coordinator
    standing = site.ask(c.propose())
    assert isinstance(standing, ApprovalStatus)
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
    asked, before = c.train(), len(site.kinds())
    site.ask(asked, c.model)
    assert site.kinds()[before:] == ["charge", "settle", "release"]
    assert site.charges("count") == 1
    asked, before = c.train(2), len(site.kinds())
    answer = site.requests.handle(asked, c.model)
    assert site.kinds()[before:] == ["witness", "charge", "charge", "settle", "settle", "release"]
    charged = [entry.body for entry in site.service.ledger.entries if entry.kind == "charge"][-2:]
    assert [(charge.purpose, charge.round) for charge in charged] == [("training", 2), ("evaluation", 1)]
    released = site.service.ledger.entries[-1].body
    assert released.sha256 == digest(answer[0])
    assert released.bytes == len(answer[0]) + len(answer[1])
    assert released.counts and not released.again


def test_keys_signatures_and_shares_stand_in_the_ledger_before_they_leave(site: Any) -> None:
    c = site.coordinator
    site.approve()
    before = len(site.kinds())
    asked = c.train()
    assert [entry.body.message for entry in site.service.ledger.entries[before:]] == ["advertised", "handshaken"]
    answer, before = site.requests.handle(asked, c.model), len(site.kinds())
    total = c.sum(asked, answer)
    signed = site.requests.handle(*total.survivors())
    shares = site.requests.handle(*total.open(c.read(signed).signature))
    said = [entry.body for entry in site.service.ledger.entries[before:]]
    assert [(each.message, each.sha256, each.bytes) for each in said] == [
        (kind, digest(header), len(header) + len(payload))
        for kind, (header, payload) in (("signed", signed), ("shares", shares))
    ]


def test_the_same_question_gets_the_same_bytes_without_a_second_charge(site: Any) -> None:
    c = site.coordinator
    site.approve()
    first = site.requests.handle(c.train(), c.model)
    assert site.requests.handle(c.train(), c.model) == first
    site.restart()
    assert site.requests.handle(c.train(), c.model) == first
    assert site.charges() == 1
    said = [entry.body.message for entry in site.service.ledger.entries if entry.kind == "release"]
    assert said == ["standing", "advertised", "handshaken", "update"]


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
    site.service.spending.reject(study=c.study.digest, name="synthetic-study", by="tester", reason="test")
    assert reason(site.ask(c.train(2), c.model)) == "rejected"
    assert reason(site.ask(c.propose())) == "rejected"
    assert site.charges() == 1


def test_what_is_left_of_a_budget_changes_no_answer_to_a_proposal(
    new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any]
) -> None:
    """Nothing spent, some of it, all of it: only the hospital's own people see a difference."""
    c = new_coordinator(epsilon=2.5)
    site = new_site(c)
    asked = [variant(c.study, f"probe-{10 * each:.0f}", each) for each in (0.3, 1.9, 2.5, 9.9)]

    def standings() -> list[tuple[str, str]]:
        return [(answer.kind, answer.state) for answer in (site.ask(c.propose(each)) for each in asked)]

    assert standings() == [("standing", "pending")] * 4
    site.approve()
    assert standings() == [("standing", "pending")] * 4
    for number in (1, 2, 3):
        assert isinstance(site.ask(c.train(number), c.model), Update)
    site.restart()
    entries = site.kinds()
    assert standings() == [("standing", "pending")] * 4
    assert site.kinds()[len(entries) :] == ["release"] * 4
    assert reason(site.ask(c.propose(variant(c.study, "beyond", 10.1)))) == "policy"  # maximum_epsilon is public
    for each in asked[1:]:
        with pytest.raises(BudgetRefused, match="over by"):
            site.approve(each)
        assert site.ask(c.propose(each)).state == "pending"
    assert "approve" not in site.kinds()[len(entries) :]
    assert "charge" not in site.kinds()[len(entries) :]


def test_two_studies_that_are_decided_on_at_once_are_not_both_approved_beyond_the_budget(
    new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any]
) -> None:
    c = new_coordinator(epsilon=2.6)
    site = new_site(c)
    both = [variant(c.study, name, 2.0) for name in ("one", "two")]
    for each in both:
        assert isinstance(site.ask(c.propose(each)), ApprovalStatus)
        assert site.service.estimates.of(each).quote.fits  # alone

    def decide(which: Study) -> bool:
        try:
            site.service.approvals.approve(site.service.proposals.find(which.digest), "tester")
        except BudgetRefused:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(decide, both)) == [False, True]
    assert site.kinds().count("charge") == 1  # the number of patients of the one that was approved
    (approved,) = (each for each in both if site.service.spending.approval(each.digest) is not None)
    for number in (1, 2, 3):
        asked = c.train(number, c.pack(approved), approved, recorded=None if number == 1 else c.recorded(number - 1))
        assert isinstance(site.ask(asked, c.pack(approved)), Update)


def variant(base: Study, name: str, epsilon: float) -> Study:
    """The same study at another ε, under a name of its own."""
    privacy = {**base.contract["privacy"], "epsilon": epsilon}
    evaluation = {"epsilon": epsilon / 4}
    return Study.model_validate({**base.contract, "study": name, "privacy": privacy, "evaluation": evaluation})


def noised_of_held_back(site: Any, counts: Any) -> bool:
    """Whether the confusion matrix of the counts is that of the held-back patients, but for the noise."""
    study, records = site.coordinator.study, site.service.data.records(site.coordinator.study)
    layout = Layout.of(study)
    sigma = site.service.spending.approval(study.digest).plan.evaluation_noise
    held_back = len(records) - records.train.sum()
    off = abs(layout.parts(counts)["confusion"].sum() - held_back)
    return bool(0 < off < 6 * 2 * layout.deviations(sigma)["confusion"])


def test_counts_of_the_model_before_ride_on_a_rounds_update_noised_and_charged_before_they_leave(site: Any) -> None:
    c = site.coordinator
    site.approve()
    first = c.train()
    assert c.opened(first, site.requests.handle(first, c.model)).counts is None
    assert site.charges("evaluation") == 0
    second = c.train(2)
    answer = site.requests.handle(second, c.model)
    opened = c.opened(second, answer)
    assert opened.counted == 2  # the neighbour's are zeros
    assert noised_of_held_back(site, opened.counts)
    assert site.requests.handle(second, c.model) == answer
    assert site.charges("evaluation") == 1


def test_a_round_whose_counts_cannot_be_paid_for_is_refused_before_its_training_is_charged(
    site: Any, contract: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two failures in a round with counts use up two evaluations, the last ones, and leave a round of training."""
    training, c = {**contract["training"], "rounds": 6}, site.coordinator
    c.study = Study.model_validate({**contract, "training": training, "evaluation": {"epsilon": 0.5, "every": 3}})
    c.model = c.pack(c.study)
    site.approve()
    for number in (1, 2, 3):
        assert isinstance(site.ask(c.train(number), c.model), Update)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("of the machine")

    with monkeypatch.context() as failing:
        failing.setattr(trainer, "train", fails)
        for attempt in (1, 2):
            assert site.ask(c.train(4, attempt=attempt), c.model).reason == "internal"
    assert (site.charges("training"), site.charges("evaluation")) == (5, 2)
    assert site.ask(c.train(4, attempt=3), c.model).reason == "budget"
    assert (site.charges("training"), site.charges("evaluation")) == (5, 2)
    assert not list((c.site.store / "attempts").glob("*.json"))


def trained_to_the_end(site: Any) -> None:
    site.approve()
    for number in (1, 2, 3):
        assert isinstance(site.ask(site.coordinator.train(number), site.coordinator.model), Update)


def test_evaluation_gives_noised_counts_of_the_held_back_patients_charged_before_they_leave(site: Any) -> None:
    c = site.coordinator
    trained_to_the_end(site)
    asked, before = c.evaluate(), len(site.kinds())
    answer = site.requests.handle(asked, c.model)
    assert site.kinds()[before:] == ["charge", "settle", "release"]
    assert isinstance(c.read(answer), Counts)
    opened = c.opened(asked, answer)
    assert opened.counted == 2
    assert noised_of_held_back(site, opened.counts)
    assert site.requests.handle(asked, c.model) == answer
    assert site.charges("evaluation") == 3  # two rode on the updates of rounds 2 and 3


def test_with_privacy_no_counts_leave_that_are_not_paid_for(site: Any) -> None:
    c = site.coordinator
    c.study = Study.model_validate({**c.study.contract, "evaluation": {}})
    c.model = c.pack(c.study)
    trained_to_the_end(site)
    assert reason(site.ask(c.evaluate(), c.model)) == "policy"
    assert site.charges("evaluation") == 0


def test_the_whole_study_with_its_counts_and_its_number_of_patients_costs_what_was_approved(site: Any) -> None:
    c = site.coordinator
    site.approve()
    plan = site.service.spending.approval(c.study.digest).plan
    for number in (1, 2, 3):
        assert isinstance(site.ask(c.train(number), c.model), Update)
    assert isinstance(site.ask(c.evaluate(), c.model), Counts)
    events = site.service.spending.state("synthetic-table").study(c.study.digest)
    assert sorted(map(str, events)) == sorted(map(str, [*plan.events()[:-1], *[plan.event()] * 3]))
    assert 1.9 < epsilon(events, 1e-3) <= 2.0


def test_only_the_noised_number_of_patients_is_in_what_leaves_and_in_the_ledger(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    monkeypatch.setattr(secrets.SystemRandom, "gauss", lambda _, mean, deviation: mean + 1.23 * deviation)
    site.approve()
    plan = site.service.spending.approval(c.study.digest).plan
    assert plan.patients == site.service.data.patients(c.study).train + round(1.23 * c.study.privacy.count_noise)
    asked = c.train()
    assert c.opened(asked, site.requests.handle(asked, c.model)).weight == plan.patients + 1  # the neighbour's is 1
    assert plan.sampling_rate == min(1.0, 16 / plan.patients)


@pytest.mark.parametrize("place", ["state", "begin", "charge", "counted", "keep", "settle", "store", "release"])
@pytest.mark.parametrize("rides", [True, False])
def test_a_crash_while_evaluating_repeats_the_very_same_counts_on_the_same_charge(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, place: str, rides: bool
) -> None:
    site = new_site(coordinator)
    site.approve()
    for number in (1,) if rides else (1, 2, 3):
        site.ask(coordinator.train(number), coordinator.model)
    asked, before = coordinator.train(2) if rides else coordinator.evaluate(), site.charges("evaluation")
    seen: list[Any] = []
    noised = evaluation.noised_counts

    def note(*arguments: Any, **named: Any) -> Any:
        seen.append(noised(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(evaluation, "noised_counts", note)
    with monkeypatch.context() as dying:
        crash_at(dying, "keep" if place == "counted" else place)
        with pytest.raises(Crash):
            site.requests.handle(asked, coordinator.model)
    site.restart()
    answer = site.requests.handle(asked, coordinator.model)
    assert isinstance(coordinator.read(answer), Update | Counts)
    opened = coordinator.opened(asked, answer)
    assert all(counts.tolist() == opened.counts.tolist() for counts in seen)
    assert len(seen) == (2 if place in ("counted", "keep") else 1)
    assert site.charges("evaluation") == before + 1
    assert site.kinds().count("settle") == site.charges() + site.charges("evaluation")
    assert not list((coordinator.site.store / "attempts").glob("*.json"))


@pytest.mark.parametrize("place", ["state", "begin", "charge", "keep", "settle", "store", "release"])
def test_a_crash_between_any_two_writes_repeats_the_round_on_the_same_charge(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    site = new_site(coordinator)
    site.approve()
    asked = coordinator.train()
    crash_at(monkeypatch, place)
    with pytest.raises(Crash):
        site.requests.handle(asked, coordinator.model)
    monkeypatch.undo()
    site.restart()
    answer = site.requests.handle(asked, coordinator.model)
    update = coordinator.read(answer)
    assert isinstance(update, Update)
    assert site.charges() == 1
    assert update.epsilon is not None
    assert update.epsilon <= 2.0
    assert not list((coordinator.site.store / "attempts").glob("*.json"))  # the seed is gone
    assert site.kinds().count("settle") == 1
    for number in (2, 3):  # the whole study still fits its ε
        assert isinstance(site.ask(coordinator.train(number), coordinator.model), Update)


@pytest.mark.parametrize("rides", [True, False])
@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_the_seed_of_a_kept_result_goes_at_the_next_start_even_if_nobody_asks_again(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, purpose: str, rides: bool
) -> None:
    site = new_site(coordinator)
    site.approve()
    before = () if purpose == "training" else (1,) if rides else (1, 2, 3)
    for number in before:
        site.ask(coordinator.train(number), coordinator.model)
    alone = purpose == "evaluation" and not rides
    asked = coordinator.evaluate() if alone else coordinator.train(len(before) + 1)
    with monkeypatch.context() as dying:
        crash_at(dying, "settle")
        with pytest.raises(Crash):
            site.requests.handle(asked, coordinator.model)
    assert list((coordinator.site.store / "attempts").glob("*.json"))
    site.restart()
    assert not list((coordinator.site.store / "attempts").glob("*.json"))
    charges = [each for each in site.service.ledger.books.charges.values() if each.body.purpose == purpose]
    assert charges
    assert all(each.settled == (2 if purpose == "training" else 1) for each in charges)


def test_a_repeated_round_is_the_very_same_draw(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash threw away and what leaves in the end are one release: the same patients, the same noise."""
    site = new_site(coordinator)
    site.approve()
    asked = coordinator.train()
    seen: list[bytes] = []
    put = Results.put

    def note(results: Results, study: str, about: Any, update: Any, counts: Any) -> Any:
        seen.append(update.tobytes())
        if len(seen) == 1:
            raise Crash
        return put(results, study, about, update, counts)

    monkeypatch.setattr(Results, "put", note)
    with pytest.raises(Crash):
        site.requests.handle(asked, coordinator.model)
    site.restart()
    site.requests.handle(asked, coordinator.model)
    assert seen[0] == seen[1]


def test_the_masked_bytes_of_a_repeated_round_are_the_same_too(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two different vectors under one mask would tell their difference."""
    site = new_site(coordinator)
    site.approve()
    asked = coordinator.train()
    seen: list[bytes] = []
    commit = Staged.commit

    def note(staged: Staged, *arguments: Any) -> Any:
        seen.append(staged.sha256.encode())
        if len(seen) == 1:
            raise Crash
        return commit(staged, *arguments)

    monkeypatch.setattr(Staged, "commit", note)
    with pytest.raises(Crash):
        site.requests.handle(asked, coordinator.model)
    site.restart()
    site.requests.handle(asked, coordinator.model)
    assert seen[0] == seen[1]


def test_another_request_never_runs_on_a_kept_seed(
    coordinator: Any, new_site: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = new_site(coordinator)
    site.approve()
    asked = coordinator.train()
    crash_at(monkeypatch, "keep")
    with pytest.raises(Crash):
        site.requests.handle(asked, coordinator.model)
    monkeypatch.undo()
    site.restart()
    other = pack(to_vector(build(coordinator.study)) + 5e-7, coordinator.study)  # as another machine may round
    assert reason(site.ask(coordinator.train(1, other), other)) == "sum"  # these keys are for the other model's sum
    assert site.charges() == 1
    assert isinstance(site.ask(coordinator.train(1, other, attempt=2), other), Update)
    assert site.charges() == 2  # a charge of its own


def crash_at(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Die just before the durable write that ``place`` names: of the sum's state, the seed, the result, the answer
    (``state``, ``begin``, ``keep``, ``store``), or of an entry of that kind."""
    append = LedgerFile.append

    def die(*_: Any, **__: Any) -> None:
        raise Crash

    def guarded(ledger: LedgerFile, kind: str, fields: dict[str, Any]) -> Any:
        if kind == place:
            raise Crash
        return append(ledger, kind, fields)

    writers: dict[str, tuple[Any, str]] = {
        "state": (SumStore, "put"),
        "begin": (DrawSeeds, "begin"),
        "keep": (Results, "put"),
        "store": (Staged, "commit"),
    }
    if place in writers:
        monkeypatch.setattr(*writers[place], die)
    else:
        monkeypatch.setattr(LedgerFile, "append", guarded)
