"""What a coordinator cannot get out of a site: by asking too early, too often, with crafted models or hostile text."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from consilium_client import data
from consilium_client.agent import requests
from consilium_client.training import trainer
from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import ConfigurationError, DataError, IntegrityError, LedgerError, PolicyRefusal
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import ApprovalStatus, Counts, Refusal, Update
from consilium_shared.study import Study

NewSite = Callable[[Any], Any]
NewCoordinator = Callable[..., Any]


def reason(answer: messages.Answer) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def crafted(study: Study) -> bytes:
    """A model whose score is one feature, a thousand times as large: its counts would tell that feature's value."""
    from consilium_shared.models import build
    from consilium_shared.models.vector import pack, to_vector

    return pack(np.full_like(to_vector(build(study)), 1000.0), study)


def variant(base: Study, **changes: Any) -> Study:
    return Study.model_validate({**base.contract, **changes})


# -- evaluation


@pytest.mark.parametrize("number", [1, 3, 4])
def test_no_counts_before_anything_was_trained_whatever_the_round_and_the_model(site: Any, number: int) -> None:
    c = site.coordinator
    site.approve()
    model = crafted(c.study)
    assert reason(site.ask(c.evaluate(number, model), model)) == "policy"
    assert reason(site.ask(c.evaluate(number), c.model)) == "policy"
    assert site.charges("evaluation") == 0


def test_there_is_no_round_0_to_count_after(site: Any) -> None:
    c = site.coordinator
    site.approve()
    body = {**json.loads(c.evaluate(1))["body"], "round": 0}
    signature = c.key.sign(messages.REQUEST_DOMAIN, canonical_bytes(body)).hex()
    assert reason(site.ask(canonical_bytes({"body": body, "signature": signature}), c.model)) == "malformed"


def test_counts_leave_in_a_sum_of_their_own_once_after_the_last_round_and_after_no_other(site: Any) -> None:
    c = site.coordinator
    site.approve()
    model = crafted(c.study)
    for number in (1, 2):
        assert isinstance(site.ask(c.train(number), c.model), Update)
        for asked in (1, 2, 3):
            over = asked < number  # the record of it was shown
            assert reason(site.ask(c.evaluate(asked, model), model)) == ("stale-round" if over else "policy")
    assert isinstance(site.ask(c.train(3), c.model), Update)
    assert reason(site.ask(c.evaluate(2, model), model)) == "stale-round"
    site.restart()
    assert isinstance(site.ask(c.evaluate(3), c.model), Counts)
    assert reason(site.ask(c.evaluate(3, model), model)) == "stale-round"
    assert reason(site.ask(c.evaluate(3, model, attempt=2), model)) == "stale-round"
    assert site.charges("evaluation") == 3


def test_counts_that_ride_on_an_update_are_of_the_model_that_the_round_begins_with_and_of_no_other(site: Any) -> None:
    c = site.coordinator
    site.approve()
    model = crafted(c.study)
    assert isinstance(site.ask(c.train(1), c.model), Update)
    assert isinstance(site.ask(c.train(2), c.model), Update)
    assert reason(site.ask(c.train(2, model), model)) == "stale-round"
    assert reason(site.ask(c.train(2, model, attempt=2), model)) == "stale-round"
    assert site.charges("evaluation") == 1


def test_counts_leave_only_after_the_rounds_that_the_study_names(new_site: NewSite, coordinator: Any) -> None:
    site, c = new_site(coordinator), coordinator
    study = variant(c.study, evaluation={"every": 2, "epsilon": 0.5})
    c.study, c.model = study, c.pack(study)
    site.approve(study)
    counted = {}
    for number in (1, 2, 3):
        asked = c.train(number)
        counted[number - 1] = c.opened(asked, site.requests.handle(asked, c.model)).counts is not None
    assert counted == {0: False, 1: False, 2: True}
    assert isinstance(site.ask(c.evaluate(3), c.model), Counts)  # the last
    charged = [entry.body for entry in site.service.ledger.entries if entry.kind == "charge"]
    assert [charge.round for charge in charged if charge.purpose == "evaluation"] == [2, 3]


def test_a_site_may_let_no_counts_leave_and_still_train(new_coordinator: NewCoordinator, new_site: NewSite) -> None:
    c = new_coordinator(policy="allow_evaluation_counts: false")
    site = new_site(c)
    site.approve()
    for number in (1, 2, 3):
        assert isinstance(site.ask(c.train(number), c.model), Update)
    assert reason(site.ask(c.evaluate(), c.model)) == "policy"
    assert site.charges("evaluation") == 0


def test_too_few_patients_are_for_the_hospital_to_see_and_not_for_the_coordinator(
    new_coordinator: NewCoordinator, new_site: NewSite
) -> None:
    c = new_coordinator(policy="minimum_held_back: 60")
    site = new_site(c)
    standing = site.ask(c.propose())
    assert isinstance(standing, ApprovalStatus)
    assert standing.state == "pending"
    with pytest.raises(PolicyRefusal, match="fewer held-back patients than the 60"):
        site.approve()


# -- failures after the charge


def test_a_failure_while_training_ends_the_draw_and_keeps_the_charge(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    site.approve()

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("this says nothing")

    monkeypatch.setattr(trainer, "train", fail)
    assert reason(site.ask(c.train(), c.model)) == "internal"
    assert not list(site.service.draw_seeds.folder.glob("*.json"))
    assert site.service.spending.state("synthetic-table").studies[0].unsettled == 1
    monkeypatch.undo()
    assert isinstance(site.ask(c.train(), c.model), Update)
    assert site.charges() == 2


def test_a_model_that_cannot_be_trained_with_privacy_is_refused_before_a_charge(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = site.coordinator
    site.approve()

    def dependent(_: Study) -> None:
        raise ConfigurationError("a sample's gradient depends on others")

    monkeypatch.setattr(trainer, "check_independence", dependent)
    assert reason(site.ask(c.train(), c.model)) == "internal"
    assert site.charges() == 0


# -- text and memory


def test_a_refusal_quotes_no_terminal_escape_and_no_long_text(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    c = site.coordinator
    for key in ("\x1b]0;owned\x07", "\u202eevil", "k" * 20_000):
        contract = {**c.study.contract, key: 1}
        proposal = messages.Propose(**c.common(), contract=contract, roster_document=c.roster)
        with caplog.at_level(logging.DEBUG):
            answer = site.ask(messages.encode(proposal, c.key))
        assert reason(answer) == "malformed"
        assert answer.detail.isprintable()
        assert len(answer.detail) <= limits.DETAIL_CHARACTERS
    assert "\x1b" not in caplog.text
    assert "\x1b" not in site.service.ledger.path.read_text()


def test_what_nobody_foresaw_is_an_answer_too(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c = site.coordinator

    def fail(*_: Any) -> None:
        raise OverflowError

    monkeypatch.setattr(messages, "decode_request", fail)
    assert reason(site.ask(c.propose())) == "malformed"


def test_a_data_error_stays_in_the_sites_log(
    site: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(*_: Any) -> None:
        raise DataError("secret.csv: no column 'x'")

    c = site.coordinator
    site.approve()
    site.service.data._records = None
    monkeypatch.setattr(data, "load", unreadable)
    refusal = site.ask(c.train(), c.model)
    assert reason(refusal) == "data"
    assert "secret.csv" not in refusal.detail
    assert "secret.csv: no column 'x'" in caplog.text


def test_whether_the_data_can_be_used_is_not_told_to_whoever_proposes(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise DataError("secret.csv: no column 'x'")

    monkeypatch.setattr(data, "load", unreadable)
    assert isinstance(site.ask(site.coordinator.propose()), ApprovalStatus)
    with pytest.raises(DataError, match="no column"):  # the hospital's people are told
        site.service.estimates.of(site.coordinator.study)


def test_short_answers_are_not_kept_without_end(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REMEMBERED", 3)
    c = site.coordinator
    site.approve()
    for number in range(4, 12):
        assert reason(site.ask(c.train(number), c.model)) == "policy"
    assert len(site.requests.handler._given) == 3


# -- proposals and data


def test_polling_a_pending_study_reads_no_data_again(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    c = site.coordinator
    load, read = data.load, []

    def counted(spec: Any, study: Study, *more: Any) -> Any:
        read.append(study.study)
        return load(spec, study, *more)

    monkeypatch.setattr(data, "load", counted)
    site.approve()
    other = variant(c.study, study="other")
    for _ in range(3):
        assert isinstance(site.ask(c.propose(other)), ApprovalStatus)
    assert read == ["synthetic-study"]
    for number in (1, 2):
        assert isinstance(site.ask(c.train(number), c.model), Update)
        assert isinstance(site.ask(c.propose(other)), ApprovalStatus)
    assert read == ["synthetic-study"]
    site.approve(other)
    assert read == ["synthetic-study", "other"]


def test_undecided_proposals_are_bounded_and_a_decision_makes_room(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNDECIDED_PROPOSALS", 2)
    c = site.coordinator
    first, second, third = (variant(c.study, study=name) for name in ("one", "two", "three"))
    assert isinstance(site.ask(c.propose(first)), ApprovalStatus)
    assert isinstance(site.ask(c.propose(second)), ApprovalStatus)
    refusal = site.ask(c.propose(third))
    assert reason(refusal) == "policy"
    assert "undecided" in refusal.detail
    assert isinstance(site.ask(c.propose(first)), ApprovalStatus)  # those that are kept stay
    site.approve(second)
    assert isinstance(site.ask(c.propose(third)), ApprovalStatus)


def test_only_the_plan_that_was_shown_can_be_approved(site: Any) -> None:
    c = site.coordinator
    site.ask(c.propose())
    proposal = site.service.proposals.find(c.study.digest)
    shown = site.service.estimates.of(c.study).plan.to_dict()
    with pytest.raises(ConfigurationError, match="another plan"):
        site.service.approvals.approve(proposal, "tester", {**shown, "noise_multiplier": shown["noise_multiplier"] * 2})
    assert site.service.spending.approval(c.study.digest) is None
    site.service.approvals.approve(proposal, "tester", shown)


# -- the ledger


def test_an_agent_whose_ledger_cannot_be_written_ends(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from consilium_client.agent.main import ending_when_broken

    c, ended = site.coordinator, list[Any]()
    handle = ending_when_broken(site.service, site.requests.handle, ended.append)
    handle(c.propose(), b"")
    asked = c.train()
    assert ended == []

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(site.service.ledger), "_write", full)
    with pytest.raises((LedgerError, IntegrityError)):
        handle(asked, c.model + b"x")
    assert ended == [1]


def test_a_changed_policy_is_in_the_ledger_after_a_start(site: Any) -> None:
    assert "policy" not in site.kinds()  # the opening of the asset names the first
    file = site.coordinator.site.config_file
    file.write_text(file.read_text().replace("minimum_patients: 20", "minimum_patients: 21"))
    site.restart()
    assert site.kinds()[-1] == "policy"
    assert site.service.ledger.entries[-1].body.digest == site.service.config.policy.digest
    before = site.kinds()
    site.restart()
    assert site.kinds() == before
