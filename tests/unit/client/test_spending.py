"""Charged before spent: what is reserved, refused, settled, and what a crash leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consilium_client.agent.accounts import Account, ChargedUse
from consilium_client.agent.spending import Spending
from consilium_client.state.draw_seeds import Use
from consilium_client.state.ledger_file import LedgerFile
from consilium_shared.errors import BudgetRefused, ConfigurationError, LedgerError, PolicyRefusal
from consilium_shared.identity import Identity
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.event import DpSgdEvent, NonPrivateEvent
from consilium_shared.privacy.plan import NonPrivatePlan, Plan, PrivacyPlan

SITE = Identity.generate()
BUDGET = Budget(3.95, 1e-5)
UNLIMITED = Budget(math.inf, 1e-5)
PLAN = PrivacyPlan.for_study(
    patients=1000, expected_batch=50, steps_per_round=10, rounds=4, epsilon=3.0, delta=1e-5, clipping_norm=1.0
)
COUNTED = replace(PLAN, patients=1000, count_noise=10.0)
OPEN_PLAN = NonPrivatePlan(steps_per_round=10, rounds=4)
MODEL, SEED = "0" * 64, bytes(32)
FIRST = Use("training", 1, MODEL)
A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[LedgerFile]:
    with LedgerFile(tmp_path / "ledger.jsonl", "north", SITE) as ledger:
        yield ledger


def _approved(ledger: LedgerFile, *studies: str, plan: Plan = PLAN, budget: Budget = BUDGET) -> Spending:
    spending = Spending(ledger)
    spending.open_asset("icu", budget, "1" * 64)
    for study in studies:
        limit = plan.epsilon if isinstance(plan, PrivacyPlan) else math.inf
        spending.approve(_account(study, plan=plan, budget=budget), epsilon=limit, by="Dr Ono")
    return spending


def _account(study: str, **changes: Any) -> Account:
    return replace(Account(study, "sepsis", "icu", PLAN, BUDGET), **changes)


def _reserve(spending: Spending, study: str, number: int, **changes: Any) -> ChargedUse:
    return spending.reserve(_account(study, **changes), Use("training", number, MODEL), SEED)


def test_a_whole_study_costs_what_was_approved(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    for number in range(1, 5):
        reservation = _reserve(spending, A, number)
        assert ledger.entries[-1].kind == "charge" and reservation.number == 1
        spending.settle(reservation, 10)
    assert reservation.study_epsilon == spending.study_epsilon(A) == PLAN.cost() <= 3.0
    (study,) = spending.state("icu").studies
    assert (study.rounds, study.unsettled, len(study.events)) == ((1, 2, 3, 4), 0, 4)


def test_a_reservation_without_settlement_counts_in_full_after_a_restart(tmp_path: Path) -> None:
    with LedgerFile(tmp_path / "ledger.jsonl", "north", SITE) as ledger:
        _reserve(_approved(ledger, A), A, 1)
    with LedgerFile(tmp_path / "ledger.jsonl", "north", SITE) as ledger:
        spending = Spending(ledger)
        assert spending.state("icu").events == (PLAN.event(),)
        approval = spending.approval(A)
        assert approval is not None and approval.plan == PLAN
        again = _reserve(spending, A, 1)
        assert again.number == 2
        spending.settle(again, 0)
        assert spending.state("icu").events == (PLAN.event(),)
        assert spending.state("icu").studies[0].unsettled == 1


def test_steps_that_did_not_run_are_given_back(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    reservation = _reserve(spending, A, 1)
    with pytest.raises(LedgerError, match="only 10 were charged"):
        spending.settle(reservation, 11)
    spending.settle(reservation, 3)
    assert spending.state("icu").events == (DpSgdEvent(0.05, PLAN.noise_multiplier, 3),)
    with pytest.raises(LedgerError, match="settled already"):
        spending.settle(reservation, 3)


def test_a_study_stops_at_what_was_approved_with_the_arithmetic(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    for _ in range(4):  # a round that is asked for again and again is charged again and again
        _reserve(spending, A, 1)
    before = ledger.head
    with pytest.raises(BudgetRefused, match=r"study 'sepsis'.*spent ε .* limit 3\.000: over by") as refusal:
        _reserve(spending, A, 2)
    assert refusal.value.reason_code == "budget"
    assert ledger.head == before, "nothing is charged for what is refused"


def test_a_charge_of_another_event_is_not_run_on(ledger: LedgerFile) -> None:
    """The study was approved again with another plan: what was charged is not what would run now."""
    spending = _approved(ledger, A)
    _reserve(spending, A, 1)
    assert spending.unsettled(_account(A), FIRST, 1, SEED) is not None
    less_noise = PrivacyPlan(0.05, 1.0, PLAN.noise_multiplier / 2, 10, 4, 1e-5, 3.0)
    spending.approve(_account(A), epsilon=3.0, by="Dr Ono")
    assert spending.unsettled(_account(A), FIRST, 1, SEED) is not None, "the same plan again is the same event"
    spending.open_asset("icu", UNLIMITED, "1" * 64, reason="for this test")
    spending.approve(_account(A, plan=less_noise, budget=UNLIMITED), epsilon=9.0, by="Dr Ono")
    assert spending.unsettled(_account(A, plan=less_noise), FIRST, 1, SEED) is None
    assert spending.state("icu").studies[0].unsettled == 1, "the old charge stands in full"


def test_studies_share_the_budget_of_the_asset(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A, B)
    for study in (A, B):
        for number in (1, 2, 3, 4):
            _reserve(spending, study, number)
    both = epsilon(spending.state("icu").events, 1e-5)
    assert 3.0 < both <= BUDGET.epsilon
    with pytest.raises(BudgetRefused, match="asset 'icu' cannot afford the study"):
        _approved(ledger, C)
    assert spending.approval(C) is None


def test_two_studies_that_fit_alone_and_not_together_are_not_both_approved_and_the_second_costs_nothing(
    ledger: LedgerFile,
) -> None:
    spending = _approved(ledger, A, plan=COUNTED, budget=Budget(3.5, 1e-5))  # nothing of it has run
    before = ledger.head
    second = replace(COUNTED, patients=900)
    with pytest.raises(BudgetRefused, match=r"spent ε 0\.\d+, \d\.\d+ more is reserved for .* over by"):
        _approved(ledger, B, plan=second, budget=Budget(3.5, 1e-5))
    assert ledger.head == before, "not even its number of patients was charged"
    assert spending.approval(B) is None


def test_what_is_approved_is_never_refused_for_what_others_do(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A, B)
    for study in (A, B):
        _reserve(spending, study, 1)
    with pytest.raises(BudgetRefused, match=r"asset 'icu' cannot afford the study: .*reserved for approved studies"):
        _approved(ledger, C)
    for _ in range(3):  # what A is asked for again goes off A's own rounds, and off nobody else's
        _reserve(spending, A, 1)
    with pytest.raises(BudgetRefused, match="study 'sepsis' at this site"):
        _reserve(spending, A, 2)
    for number in (2, 3, 4):
        _reserve(spending, B, number)
    assert spending.reserved("icu") == ()
    assert epsilon(spending.state("icu").events, 1e-5) <= BUDGET.epsilon


def test_a_study_of_much_noise_is_charged_for_no_more_rounds_than_were_reserved(ledger: LedgerFile) -> None:
    """Its ε would have room: what is beyond the plan's own rounds would come out of what others were promised."""
    loud = replace(PLAN, noise_multiplier=4 * PLAN.noise_multiplier)
    spending = _approved(ledger, A, plan=loud)
    for _ in range(4):
        _reserve(spending, A, 1, plan=loud)
    assert spending.study_epsilon(A) < loud.epsilon / 2
    with pytest.raises(BudgetRefused, match="as many charges for training as its plan pays for"):
        _reserve(spending, A, 2, plan=loud)


def test_what_was_not_taken_returns_when_the_approval_is_withdrawn(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A, B)
    spending.settle(_reserve(spending, A, 1), 10)
    with pytest.raises(BudgetRefused):
        _approved(ledger, C)
    spending.reject(study=B, name="sepsis", by="IT", reason="the coordinator has stopped it")
    assert [each.study for each in spending.reserved("icu")] == [A]
    _approved(ledger, C)


def test_rounds_without_this_site_return_when_a_later_record_is_witnessed_and_all_of_it_at_the_last(
    ledger: LedgerFile,
) -> None:
    spending = _approved(ledger, A)
    assert spending.reserved("icu")[0].events == (PLAN.event(4),)
    ledger.append("witness", {"study": A, "round": 2, "record": "1" * 64, "heads": {}})  # it was away in 1 and 2
    assert spending.reserved("icu")[0].events == (PLAN.event(2),)
    _reserve(spending, A, 3)
    _reserve(spending, A, 3)
    assert spending.reserved("icu") == ()
    with pytest.raises(BudgetRefused, match="as many charges"):
        _reserve(spending, A, 4)
    spending.approve(_account(B), epsilon=3.0, by="Dr Ono")
    ledger.append("witness", {"study": B, "round": 4, "record": "2" * 64, "heads": {}})
    assert spending.reserved("icu") == ()


def test_a_budget_made_smaller_keeps_a_study_from_beginning_that_cannot_end(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A, B)
    _reserve(spending, A, 1)
    less = Budget(3.2, 1e-5)
    spending.open_asset("icu", less, "1" * 64, reason="ethics board 12/26")
    with pytest.raises(BudgetRefused, match=r"cannot afford the study any more: spent .* more is reserved"):
        _reserve(spending, B, 1, budget=less)
    for number in (2, 3, 4):
        _reserve(spending, A, number, budget=less)


def test_a_crash_while_running_can_leave_the_last_round_unaffordable_and_then_it_is_refused(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    charged = 0
    with pytest.raises(BudgetRefused):
        for _ in range(1000):
            _reserve(spending, A, 1)
            charged += 1
    assert charged >= 4


def test_another_asset_has_its_own_budget(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    _reserve(spending, A, 1)
    spending.open_asset("xray", BUDGET, "1" * 64)
    assert spending.state("xray").events == ()
    with pytest.raises(PolicyRefusal):
        _reserve(spending, A, 2, asset="xray")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"plan": OPEN_PLAN},
        {"plan": PrivacyPlan(0.06, 1.0, PLAN.noise_multiplier, 10, 4, 1e-5, 3.0)},
        {"plan": PrivacyPlan(0.05, 1.0, PLAN.noise_multiplier + 1, 10, 4, 1e-5, 3.0)},
        {"plan": PrivacyPlan(0.05, 1.0, PLAN.noise_multiplier, 11, 4, 1e-5, 3.0)},
        {"plan": PrivacyPlan(0.05, 1.0, PLAN.noise_multiplier, 10, 5, 1e-5, 3.0)},
        {"round_number": 0},
        {"round_number": 5},
    ],
)
def test_what_was_not_approved_is_refused(ledger: LedgerFile, changes: dict[str, Any]) -> None:
    spending = _approved(ledger, A)
    arguments = {"number": changes.pop("round_number", 1), **changes}
    with pytest.raises(PolicyRefusal) as refusal:
        _reserve(spending, A, **arguments)
    assert refusal.value.reason_code == "policy"


def test_without_an_approval_or_after_its_withdrawal_nothing_is_reserved(ledger: LedgerFile) -> None:
    spending = _approved(ledger)
    with pytest.raises(PolicyRefusal) as refusal:
        _reserve(spending, A, 1)
    assert refusal.value.reason_code == "pending"
    _approved(ledger, A)
    spending.reject(study=A, name="sepsis", by="Dr Ono", reason="the ethics board asked for more")
    with pytest.raises(PolicyRefusal) as refusal:
        _reserve(spending, A, 1)
    assert refusal.value.reason_code == "rejected"


def test_use_without_privacy_needs_an_unlimited_budget_and_ends_every_guarantee(ledger: LedgerFile) -> None:
    with pytest.raises(BudgetRefused, match="unbounded"):
        _approved(ledger, A, plan=OPEN_PLAN)
    spending = Spending(ledger)
    spending.open_asset("icu", UNLIMITED, "1" * 64, reason="study without privacy, ethics board 12/26")
    _approved(ledger, A, plan=OPEN_PLAN, budget=UNLIMITED)
    reservation = _reserve(spending, A, 1, plan=OPEN_PLAN, budget=UNLIMITED)
    assert math.isinf(reservation.study_epsilon)
    assert ledger.entries[-1].body.epsilon_after is None  # type: ignore[attr-defined]
    spending.settle(reservation, 10)
    assert spending.state("icu").events == (NonPrivateEvent(),)
    assert math.isinf(spending.study_epsilon(A))
    spending.open_asset("icu", BUDGET, "1" * 64, reason="a limit again")
    with pytest.raises(BudgetRefused, match="spent ε unbounded"):
        _approved(ledger, B)


def test_a_budget_changes_only_with_a_reason_and_never_behind_the_ledger(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    entries = len(ledger.entries)
    spending.open_asset("icu", BUDGET, "1" * 64)
    assert len(ledger.entries) == entries, "the same budget again is no entry"
    with pytest.raises(ConfigurationError, match="say why"):
        spending.open_asset("icu", Budget(50.0, 1e-5), "1" * 64)
    with pytest.raises(ConfigurationError, match="another budget"):
        _reserve(spending, A, 1, budget=Budget(50.0, 1e-5))
    spending.open_asset("icu", Budget(50.0, 1e-5), "1" * 64, reason="ethics board 12/26")
    _reserve(spending, A, 1, budget=Budget(50.0, 1e-5))
    with pytest.raises(ConfigurationError, match="other words"):
        spending.open_asset("icu", Budget(90.0, 1e-5), "1" * 64, reason="ethics board 12/26")


def test_a_policy_is_entered_when_it_is_another_than_the_last(ledger: LedgerFile) -> None:
    spending = _approved(ledger)  # the opening names it
    spending.note_policy("1" * 64)
    assert [entry.kind for entry in ledger.entries] == ["open"]
    for _ in range(2):
        spending.note_policy("2" * 64)
    spending.note_policy("1" * 64)
    assert [entry.kind for entry in ledger.entries] == ["open", "policy", "policy"]


def test_a_number_in_the_file_is_not_believed(ledger: LedgerFile) -> None:
    spending = _approved(ledger, A)
    _reserve(spending, A, 1)
    honest = ledger.entries[-1].body.model_dump()
    ledger.append("charge", {**honest, "attempt": 2, "epsilon_after": 0.0})
    assert spending.study_epsilon(A) == epsilon([PLAN.event(2)], 1e-5)
