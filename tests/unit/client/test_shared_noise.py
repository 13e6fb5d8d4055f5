"""A site whose noise is a share: approved with both ε, charged as one step, refused where that would not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.sharing import EMPTY
from tests.unit.client.test_gradient_sums import Crash, kept

from consilium_client.agent.administration import Administration
from consilium_client.commands import screen
from consilium_client.state.results import Results
from consilium_client.training import trainer
from consilium_shared.errors import BudgetRefused, LedgerError, PolicyRefusal
from consilium_shared.models.vector import width
from consilium_shared.privacy.event import DpSgdEvent, SharedDpSgdEvent, event_from_dict, event_to_dict
from consilium_shared.privacy.measured_noise import expected_noise
from consilium_shared.protocol.messages import Update
from consilium_shared.study import Study

NewSite = Callable[[Any], Any]
EVENT = SharedDpSgdEvent(0.5, 4.0, 1, honest_sites=2, colluding_sites=1)


def sharing(coordinator: Any, permit: str = "{permit: true}", **sums: Any) -> Any:
    """The coordinator's study with the noise of two honest sites of three; the site's policy on it in ``permit``."""
    contract = coordinator.study.contract
    contract["training"] |= {"steps_per_round": 1, "expected_batch": 100}
    shared = {"sampling_rate": 0.5, "honest_sites": 2, "empty_coordinates": EMPTY, **sums}
    contract["privacy"] |= {"sums": shared, "noise_multiplier": 4.0}
    contract["aggregation"] |= {"min_sites": 3, "corrupt_sites": 1}
    coordinator.study = Study.model_validate(contract)
    coordinator.model = coordinator.pack(coordinator.study)
    coordinator.others = ("clinic-c", "hospital-b")
    file = coordinator.site.config_file
    file.write_text(file.read_text().replace("delta: 1.0e-3}", f"delta: 1.0e-3, shared_noise: {permit}}}"))
    return coordinator


@pytest.fixture
def site(coordinator: Any, new_site: NewSite) -> Any:
    made = new_site(sharing(coordinator))
    made.approve()
    return made


def bodies(site: Any, kind: str) -> list[Any]:
    return [entry.body for entry in site.service.ledger.entries if entry.kind == kind]


def test_approval_charge_and_screen_have_both_epsilons(site: Any) -> None:
    c = site.coordinator
    c.opened(c.train(1), site.requests.handle(c.train(1), c.model))
    (approved,), (charge,) = bodies(site, "approve"), [b for b in bodies(site, "charge") if b.purpose == "training"]
    assert event_from_dict(charge.event.model_dump()) == EVENT
    plan = site.service.spending.approval(c.study.digest).plan
    assert approved.epsilon_alone == pytest.approx(plan.cost_alone(), abs=1e-6) and plan.cost_alone() > plan.cost()
    assert charge.epsilon_alone_after > charge.epsilon_after
    shown = Administration(site.service).estimate(c.study.digest)
    text = "\n".join(line[0] for line in screen.described(shown))
    for said in ("THEIR NOISE IS SHARED", "not more than 1 hospital of the 3 work against the others", "by own noise"):
        assert said in text
    (asset,) = Administration(site.service).budget()
    assert asset["alone"] > asset["spent"]
    assert "share noise" in "".join(screen.alone([asset]))


def test_what_is_opened_has_the_share_and_its_measure(site: Any) -> None:
    c = site.coordinator
    opened = c.opened(c.train(), site.requests.handle(c.train(), c.model))  # the neighbours add zeros
    size = width(c.study)
    assert opened.mean.size == size and opened.noise.coordinates == EMPTY
    own = opened.noise.found / expected_noise(c.study, 1, size)
    assert 0.6 < own < 1.5, "one share, of three that are expected"
    assert opened.noise.expected == pytest.approx(3 * expected_noise(c.study, 1, size), rel=1e-5)


@pytest.mark.parametrize("place", ["trained", "kept"])
def test_a_crash_and_a_dead_attempt_give_the_same_share_on_one_charge(
    site: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    c, asked, found = site.coordinator, site.coordinator.train(), list[Any]()
    train = trainer.train

    def note(*arguments: Any, **named: Any) -> Any:
        found.append(train(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(trainer, "train", note)
    with monkeypatch.context() as dying:
        dying.setattr(Results, "put" if place == "trained" else "drop", lambda *_, **__: (_ for _ in ()).throw(Crash()))
        if place == "trained":
            with pytest.raises(Crash):
                site.requests.handle(asked, c.model)
        else:
            site.requests.handle(asked, c.model)
    site.restart()
    assert isinstance(site.ask(c.train(attempt=2), c.model), Update)
    assert all(np.array_equal(each.integers, kept(site)) for each in found)
    assert (len(found), site.charges()) == ({"trained": 2, "kept": 1}[place], 1)
    assert (site.coordinator.site.store / "results").exists()


def test_a_cohort_without_enough_honest_sites_gets_neither_charge_nor_vector(site: Any) -> None:
    c = site.coordinator
    c.others = ("hospital-b",)
    answer = site.ask(c.train(), c.model)
    assert answer.kind == "refusal" and "fewer than the 3" in answer.detail
    assert site.charges() == 0


def test_a_site_without_a_word_on_it_takes_part_in_no_such_study(coordinator: Any, new_site: NewSite) -> None:
    made = new_site(sharing(coordinator, "{}"))
    answer = made.ask(coordinator.propose())
    assert answer.kind == "refusal" and "permits none such" in answer.detail
    with pytest.raises(PolicyRefusal, match="permits none such"):
        Administration(made.service).approve(coordinator.study.digest, "Dr Ono", {})


def test_the_second_epsilon_of_all_studies_together_is_held_at_the_approval(
    coordinator: Any, new_site: NewSite
) -> None:
    c = sharing(coordinator, "{permit: true, max_epsilon_alone: 1.4}")
    made = new_site(c)
    made.approve()
    alone = made.service.spending.approval(c.study.digest).plan.cost_alone()
    assert alone < 1.4
    again = Study.model_validate({**c.study.contract, "version": 2})
    with pytest.raises(BudgetRefused, match="own shares of noise alone would limit all studies"):
        made.approve(again)


def test_no_ledger_takes_a_charge_of_another_noise_than_was_approved(site: Any) -> None:
    c = site.coordinator
    site.requests.handle(c.train(), c.model)
    charge = next(b for b in bodies(site, "charge") if b.purpose == "training").model_dump(exclude_unset=True)
    for wrong in (
        DpSgdEvent(0.5, 4.0, 1),
        SharedDpSgdEvent(0.5, 4.0, 1, honest_sites=3, colluding_sites=1),
        SharedDpSgdEvent(0.5, 4.0, 1, honest_sites=2, colluding_sites=2),
    ):
        with pytest.raises(LedgerError, match="not the approved plan's"):
            site.service.ledger.append("charge", {**charge, "round": 2, "attempt": 1, "event": event_to_dict(wrong)})
