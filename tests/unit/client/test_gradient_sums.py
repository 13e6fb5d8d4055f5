"""A site in a study with ``privacy.sums``: what it charges, keeps and masks is one private step, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from consilium_client.state.draw_seeds import DrawSeeds
from consilium_client.state.results import Results
from consilium_client.training import trainer
from consilium_shared.errors import PolicyRefusal
from consilium_shared.models.vector import width
from consilium_shared.privacy.event import DpSgdEvent, event_from_dict
from consilium_shared.private_sums import Grid, Integers
from consilium_shared.protocol.messages import Update
from consilium_shared.study import Study

NewSite = Callable[[Any], Any]


class Crash(BaseException):
    """Stands for kill -9 at one place: nothing after it runs in this process."""


def with_sums(coordinator: Any, **training: Any) -> Any:
    """The coordinator's study, each opened sum one step at a sampling rate of a half."""
    contract = coordinator.study.contract
    contract["training"] |= {"steps_per_round": 1, "expected_batch": 100, **training}
    contract["privacy"] |= {"sums": {"sampling_rate": 0.5}, "noise_multiplier": 4.0}
    coordinator.study = Study.model_validate(contract)
    coordinator.model = coordinator.pack(coordinator.study)
    return coordinator


@pytest.fixture
def site(coordinator: Any, new_site: NewSite) -> Any:
    made = new_site(with_sums(coordinator))
    made.approve()
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Integers]:
    """What each training gave, in their order."""
    found: list[Integers] = []
    train = trainer.train

    def note(*arguments: Any, **named: Any) -> Any:
        result = train(*arguments, **named)
        assert result.integers is not None
        found.append(result.integers)
        return result

    monkeypatch.setattr(trainer, "train", note)
    return found


def kept(site: Any) -> Integers:
    results, study = site.service.results, site.coordinator.study.digest
    result = results.get(study, "training", results.about(study, "training").round)
    return result.integers(0, result.about.parameters)


def test_what_is_opened_is_the_integers_that_training_gave_and_nothing_else(site: Any, trained: list[Integers]) -> None:
    c = site.coordinator
    for number in (1, 2):
        asked = c.train(number)
        answer = site.requests.handle(asked, c.model)
        assert np.array_equal(kept(site), trained[-1])
        opened = c.opened(asked, answer)  # the neighbour adds zeros
        exact = np.zeros(width(c.study), np.float32)
        Grid.of(c.study, exact.size).update(trained[-1], exact)
        assert np.array_equal(opened.mean, exact)
        assert opened.weight == 2, "how many vectors there are, and of no patients"
    assert not np.array_equal(trained[0], trained[1])


def test_each_sum_is_charged_as_one_step_of_the_contract_and_no_number_of_patients_leaves(site: Any) -> None:
    c = site.coordinator
    for number in (1, 2, 3):
        c.opened(c.train(number), site.requests.handle(c.train(number), c.model))
    bodies = [entry.body for entry in site.service.ledger.entries if entry.kind == "charge"]
    events = [event_from_dict(body.event.model_dump()) for body in bodies if body.purpose == "training"]
    assert events == [DpSgdEvent(0.5, 4.0, 1)] * 3
    assert site.charges("count") == 0
    approval = site.service.spending.approval(c.study.digest)
    assert (approval.plan.patients, approval.plan.count_noise) == (None, None)
    assert not list(c.site.store.rglob("patients*/*.json"))


@pytest.mark.parametrize("place", ["charged", "trained", "kept"])
def test_a_crash_gives_the_same_integers_on_the_same_charge(
    site: Any, trained: list[Integers], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    c, asked = site.coordinator, site.coordinator.train()

    def die(*_: Any, **__: Any) -> Any:
        raise Crash

    with monkeypatch.context() as dying:
        if place == "charged":
            dying.setattr(trainer, "train", die)
        elif place == "trained":
            dying.setattr(Results, "put", die)
        else:
            dying.setattr(DrawSeeds, "end", die)
        with pytest.raises(Crash):
            site.requests.handle(asked, c.model)
    site.restart()
    answer = site.requests.handle(asked, c.model)
    assert isinstance(c.read(answer), Update)
    assert all(np.array_equal(each, kept(site)) for each in trained)
    assert site.charges() == 1
    assert len(trained) == {"charged": 1, "trained": 2, "kept": 1}[place]


def test_after_a_dead_attempt_the_same_integers_go_under_other_masks_on_one_charge(
    site: Any, trained: list[Integers]
) -> None:
    c = site.coordinator
    first = site.requests.handle(c.train(), c.model)
    before = kept(site)
    site.restart()
    second = site.requests.handle(c.train(attempt=2), c.model)
    assert isinstance(c.read(second), Update)
    assert first[1] != second[1]
    assert np.array_equal(kept(site), before)
    assert (len(trained), site.charges()) == (1, 1)


def test_where_the_first_attempt_may_still_be_opened_there_is_fresh_noise_and_a_second_charge(
    new_coordinator: Callable[..., Any], new_site: NewSite, trained: list[Integers]
) -> None:
    c = new_coordinator(policy="threat_models: [malicious-server, honest-but-curious]")
    contract = c.study.contract
    contract["aggregation"] |= {"threat_model": "honest-but-curious"}
    c.study = Study.model_validate(contract)
    made = new_site(with_sums(c))
    c.others, c.abandoning = ("clinic-c", "hospital-b"), False  # enough to open the first attempt without this site
    made.approve()
    assert isinstance(made.ask(c.train(), c.model), Update)
    assert isinstance(made.ask(c.train(attempt=2), c.model), Update)
    assert (len(trained), made.charges()) == (2, 2)
    assert (trained[0] != trained[1]).mean() > 0.5


def test_a_study_whose_step_is_made_for_fewer_patients_than_are_here_is_approved_by_nobody(
    coordinator: Any, new_site: NewSite
) -> None:
    made = new_site(with_sums(coordinator, expected_batch=20))
    with pytest.raises(PolicyRefusal, match="privacy parameters"):
        made.approve()
    assert made.charges() == 0
