"""Events, plans and budgets: what is accepted, what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.privacy.budget import Budget, affords, in_words
from consilium_shared.privacy.event import (
    DpSgdEvent,
    NonPrivateEvent,
    event_from_dict,
    event_to_dict,
    really_run,
)
from consilium_shared.privacy.plan import NonPrivatePlan, PrivacyPlan, plan_from_dict

EVENT = {"kind": "dp-sgd", "sampling_rate": 0.1, "noise_multiplier": 2, "steps": 3}


def _plan(**changes: Any) -> PrivacyPlan:
    numbers: dict[str, Any] = {
        "patients": 640,
        "expected_batch": 64,
        "steps_per_round": 5,
        "rounds": 4,
        "epsilon": 3.0,
        "delta": 1e-4,
        "clipping_norm": 0.5,
    }
    return PrivacyPlan.for_study(**{**numbers, **changes})


def test_events_survive_the_ledger() -> None:
    for event in (DpSgdEvent(0.1, 2.0, 3), NonPrivateEvent()):
        assert event_from_dict(event_to_dict(event)) == event
    assert event_from_dict(EVENT) == DpSgdEvent(0.1, 2.0, 3)


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"kind": "laplace"},
        {**EVENT, "extra": 1},
        {key: EVENT[key] for key in ("kind", "sampling_rate", "steps")},
        {**EVENT, "steps": 3.0},
        {**EVENT, "steps": True},
        {**EVENT, "steps": 0},
        {**EVENT, "noise_multiplier": 0},
        {**EVENT, "noise_multiplier": True},
        {**EVENT, "noise_multiplier": math.inf},
        {**EVENT, "noise_multiplier": math.nan},
        {**EVENT, "noise_multiplier": "2"},
        {**EVENT, "sampling_rate": 0},
        {**EVENT, "sampling_rate": 1.01},
        {**EVENT, "sampling_rate": math.nan},
        {"kind": "non-private", "steps": 1},
    ],
)
def test_any_other_record_is_refused(record: Any) -> None:
    with pytest.raises(LedgerError):
        event_from_dict(record)


def test_what_really_ran_is_a_part_of_what_was_charged() -> None:
    charged = DpSgdEvent(0.1, 2.0, 10)
    assert really_run(charged, 4) == DpSgdEvent(0.1, 2.0, 4)
    assert really_run(charged, 0) is None
    assert really_run(NonPrivateEvent(), 7) == NonPrivateEvent()
    for steps in (11, -1):
        with pytest.raises(LedgerError):
            really_run(charged, steps)


def test_a_plan_costs_at_most_its_epsilon_and_its_rounds_add_up_to_it() -> None:
    plan = _plan()
    assert plan.sampling_rate == 0.1
    assert plan.event() == DpSgdEvent(0.1, plan.noise_multiplier, 5)
    assert plan.event(4).steps == 20
    assert 2.9 < plan.cost() <= 3.0


def test_fewer_patients_than_a_batch_take_part_in_every_step() -> None:
    assert _plan(patients=60).sampling_rate == 1.0


def test_a_fixed_noise_multiplier_must_keep_the_promise() -> None:
    enough = _plan().noise_multiplier
    assert _plan(noise_multiplier=enough + 1).noise_multiplier == enough + 1
    with pytest.raises(ConfigurationError, match="noise_multiplier: auto"):
        _plan(noise_multiplier=enough - 0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": 1 / 640},
        {"patients": 0},
        {"expected_batch": 0},
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"clipping_norm": 0.0},
        {"clipping_norm": math.nan},
        {"rounds": 0},
        {"steps_per_round": 0},
    ],
)
def test_a_plan_refuses_numbers_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        _plan(**changes)


def test_plans_survive_the_ledger() -> None:
    for plan in (_plan(), NonPrivatePlan(steps_per_round=5, rounds=2)):
        assert plan_from_dict(plan.to_dict()) == plan
    for record in ({}, {"kind": "other"}, {**_plan().to_dict(), "rounds": 0}, {**_plan().to_dict(), "more": 1}):
        with pytest.raises(LedgerError):
            plan_from_dict(record)


def test_a_quote_shows_its_arithmetic() -> None:
    spent, more = [DpSgdEvent(0.1, 2.0, 100)], [DpSgdEvent(0.1, 1.0, 100)]
    quote = affords(Budget(3.0, 1e-5), spent, more)
    assert not quote.fits
    assert str(quote) == (
        f"spent ε {in_words(quote.spent)}, this would add {in_words(quote.added)} and make {in_words(quote.total)} "
        f"at δ 1e-05, limit 3.000: over by {in_words(quote.total - 3)}"
    )
    roomy = affords(Budget(quote.total, 1e-5), spent, more)
    assert roomy.fits and roomy.left == 0 and "over" not in str(roomy)
    assert affords(Budget(3.0, 1e-5), spent, ()).left == pytest.approx(3.0 - quote.spent)


def test_what_is_reserved_for_others_is_said_apart_from_what_is_spent() -> None:
    ran, held, asked = ([DpSgdEvent(0.1, 2.0, steps)] for steps in (100, 50, 20))
    quote = affords(Budget(9.0, 1e-5), ran, asked, held)
    alone = affords(Budget(9.0, 1e-5), [*ran, *held], asked)
    assert (quote.total, quote.added, quote.left) == (alone.total, alone.added, alone.left)
    assert quote.spent < alone.spent == quote.spent + quote.reserved
    assert str(quote) == (
        f"spent ε {in_words(quote.spent)}, {in_words(quote.reserved)} more is reserved for approved studies, "
        f"this would add {in_words(quote.added)} and make {in_words(quote.total)} at δ 1e-05, limit 9.000"
    )


def test_unlimited_budgets_and_unbounded_losses_are_said_in_words() -> None:
    assert affords(Budget(math.inf, 1e-5), [], [NonPrivateEvent()]).fits
    refused = affords(Budget(8.0, 1e-5), [], [NonPrivateEvent()])
    assert not refused.fits and "unbounded" in str(refused)
    assert not affords(Budget(8.0, 1e-5), [NonPrivateEvent()], []).fits


def test_spent_is_rounded_up_and_left_is_rounded_down() -> None:
    assert in_words(1.0001) == "1.001"
    assert in_words(1.0009, up=False) == "1.000"
    assert in_words(1.1) == "1.100"


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_a_budget_refuses_numbers_that_mean_nothing(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigurationError):
        Budget(epsilon, delta)
