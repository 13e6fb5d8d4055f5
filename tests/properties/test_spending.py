"""Whatever is asked and wherever it crashes: the budget holds, and the ledger never says less than what ran."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from consilium_client.agent.accounts import Account, ChargedUse
from consilium_client.agent.spending import Spending
from consilium_client.state.draw_seeds import Use
from consilium_client.state.ledger_file import LedgerFile, read_ledger
from consilium_shared.errors import BudgetRefused
from consilium_shared.identity import Identity
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.event import DpSgdEvent, Event
from consilium_shared.privacy.plan import PrivacyPlan

SITE = Identity.generate()
BUDGET = Budget(1.3, 1e-5)
ROUNDOFF = 1e-9  # of composing by FFT
PLANS = {
    "a" * 64: PrivacyPlan(0.1, 1.0, 3.0, 10, 8, 1e-5, 1.0),
    "b" * 64: PrivacyPlan(0.05, 1.0, 2.0, 20, 5, 1e-6, 1.0),
    "c" * 64: PrivacyPlan(1.0, 1.0, 40.0, 4, 3, 1e-5, 1.0),
}


class Site(RuleBasedStateMachine):
    """A site that reserves, trains, settles and dies at any point; ``ran`` is the truth that only the test knows."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.ran: list[Event] = []
        self.pending: list[ChargedUse] = []
        self.trained: dict[int, int] = {}
        self.approved: set[str] = set()
        self._start()

    def _start(self) -> None:
        self.ledger = LedgerFile(self.folder / "ledger.jsonl", "north", SITE)
        self.spending = Spending(self.ledger)
        self.pending, self.trained = [], {}

    @initialize(study=st.sampled_from(sorted(PLANS)))
    def begin(self, study: str) -> None:
        self.spending.open_asset("icu", BUDGET, "1" * 64)
        self.approve(study)
        assert study in self.approved  # each alone is within the budget; not all of them together

    @rule(study=st.sampled_from(sorted(PLANS)))
    def approve(self, study: str) -> None:
        entries, plan = self._entries(), PLANS[study]
        try:
            self.spending.approve(Account(study, "s", "icu", plan, BUDGET), epsilon=plan.epsilon, by="IT")
        except BudgetRefused:
            assert self._entries() == entries  # a refusal costs nothing
            return
        self.approved.add(study)

    def _entries(self) -> int:
        return len(read_ledger(self.ledger.path, "north", SITE.public).entries)

    @rule(choice=st.integers(0, 2), number=st.integers(1, 3))
    def reserve(self, choice: int, number: int) -> None:
        study = sorted(self.approved)[choice % len(self.approved)]
        charges = len(self.ledger.books.charges)
        try:
            charged = self.spending.reserve(
                Account(study, "s", "icu", PLANS[study], BUDGET), Use("training", number, "0" * 64), b""
            )
        except BudgetRefused:
            assert len(self.ledger.books.charges) == charges
            return
        assert read_ledger(self.ledger.path, "north", SITE.public).entries[-1].seq == charged.seq
        self.pending.append(charged)

    @precondition(lambda self: any(r.seq not in self.trained for r in self.pending))
    @rule(part=st.sampled_from([0.0, 0.5, 1.0]))
    def train(self, part: float) -> None:
        charged = next(r for r in self.pending if r.seq not in self.trained)
        assert isinstance(charged.event, DpSgdEvent)
        steps = int(charged.event.steps * part)
        self.trained[charged.seq] = steps
        if steps:
            event = charged.event
            self.ran.append(DpSgdEvent(event.sampling_rate, event.noise_multiplier, steps))

    @precondition(lambda self: self.trained)
    @rule()
    def settle(self) -> None:
        charged = next(r for r in self.pending if r.seq in self.trained)
        self.pending.remove(charged)
        self.spending.settle(charged, self.trained.pop(charged.seq))

    @rule()
    def crash(self) -> None:
        self.ledger.close()
        self._start()
        assert self.ledger.recovered is None

    @precondition(lambda self: self.trained)
    @rule(data=st.data())
    def crash_in_the_middle_of_writing(self, data: st.DataObject) -> None:
        before = self.ledger.path.read_bytes()
        self.settle()
        after = self.ledger.path.read_bytes()
        self.ledger.close()
        self.ledger.path.write_bytes(after[: data.draw(st.integers(len(before), len(after) - 1))])
        self._start()

    @invariant()
    def the_budget_holds_and_the_ledger_never_understates(self) -> None:
        state = self.spending.state("icu")
        written = epsilon(state.events, BUDGET.delta)
        assert epsilon(self.ran, BUDGET.delta) <= written + ROUNDOFF
        assert written <= BUDGET.epsilon + ROUNDOFF
        for study, plan in PLANS.items():
            assert epsilon(state.study(study), plan.delta) <= plan.epsilon + ROUNDOFF

    def teardown(self) -> None:
        self.ledger.close()
        read_ledger(self.ledger.path, "north", SITE.public)
        shutil.rmtree(self.folder)


TestSite = Site.TestCase
TestSite.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
