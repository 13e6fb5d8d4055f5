"""Whatever a coordinator asks, however often, and wherever the agent dies: what really ran stays within the budget.

The agent is the real one, with its files; only the training itself is left out. Studies, requests, repetitions and
crashes are random; a crash strikes before any write, rename, removal or flush to the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.unit.conftest import CONTRACT, Coordinator, Site

from consilium_client import evaluation
from consilium_client.store import read_ledger
from consilium_client.training import trainer
from consilium_shared.errors import BudgetRefused, LedgerError, PolicyRefusal
from consilium_shared.ledger.entry import Approve
from consilium_shared.messages import Counts, Update
from consilium_shared.metrics import Layout
from consilium_shared.models.vector import pack
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import Event, GaussianEvent
from consilium_shared.privacy.plan import Plan
from consilium_shared.study import Study

BUDGET, DELTA = 2.4, 1e-3
ROUNDOFF = 1e-9  # of composing by FFT
ASSET = "synthetic-table"
WRITES = ("write", "replace", "unlink", "fsync")


def study(number: int, epsilon: float, rounds: int, evaluated: bool) -> Study:
    training = {**CONTRACT["training"], "rounds": rounds, "steps_per_round": 1 + number}
    return Study.model_validate(
        {
            **CONTRACT,
            "study": f"study-{number}",
            "training": training,
            "privacy": {**CONTRACT["privacy"], "epsilon": epsilon},
            "evaluation": {"epsilon": epsilon / 4} if evaluated else {},
        }
    )


STUDIES = [study(0, 1.0, 3, True), study(1, 1.5, 2, False), study(2, 2.0, 2, True), study(3, 0.5, 4, True)]


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs in this process."""


@contextmanager
def killed_at(write: int | None) -> Iterator[None]:
    """The process dies before the durable write of that number; never, for None."""
    left = [write]

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if left[0] is not None:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            return function(*arguments, **named)

        return call

    originals = {name: getattr(os, name) for name in WRITES}
    try:
        for name, function in originals.items():
            setattr(os, name, guarded(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(os, name, function)


class Asked(RuleBasedStateMachine):
    """A site under a coordinator that asks for anything. ``ran`` is the truth that only the test knows."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.ran: dict[bytes, Event] = {}
        """By the seed of the draw: the same draw made twice is one release."""
        self.answers: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}
        self.patches = [
            patch.object(trainer, "train", self.train),
            patch.object(trainer, "check_independence", lambda _: None),
            patch.object(evaluation, "noised_counts", self.count),
        ]
        for each in self.patches:
            each.start()
        self.coordinator = Coordinator(self.folder / "federation", epsilon=BUDGET)
        self.site = Site(self.coordinator)

    def train(self, _: bytes, study: Study, records: Any, plan: Plan, *, seed: bytes, **__: Any) -> Any:
        """What the trainer would run."""
        event = plan.event()
        assert self.ran.setdefault(seed, event) == event, "one draw, and two kinds of noise"
        draw = np.random.default_rng(list(seed))
        return trainer.TrainResult(draw.standard_normal(6).astype(np.float32), plan.steps_per_round, 64)

    def count(self, _: bytes, study: Study, *__: Any, noise_multiplier: float, seed: bytes, **___: Any) -> Any:
        """What the evaluation would release."""
        event = GaussianEvent(noise_multiplier)
        assert self.ran.setdefault(seed, event) == event, "one draw, and two kinds of noise"
        return np.random.default_rng(list(seed)).integers(-9, 9, Layout.of(study).width)

    @initialize()
    def propose(self) -> None:
        for each in STUDIES:
            self.site.ask(self.coordinator.propose(each))

    @rule()
    def lose_the_drawn_numbers(self) -> None:
        """An older backup was restored, without them."""
        shutil.rmtree(self.coordinator.site.store / "cohorts", ignore_errors=True)
        self.site.restart()

    @rule(which=st.sampled_from(STUDIES), yes=st.booleans(), dies=st.none() | st.integers(0, 12))
    def decide(self, which: Study, yes: bool, dies: int | None) -> None:
        try:
            with killed_at(dies):
                self._decide(which, yes)
        except Killed:
            self.site.restart()

    def _decide(self, which: Study, yes: bool) -> None:
        desk = self.site.desk
        try:
            proposal = desk.proposals.find(which.digest)
            if not yes:
                desk.reject(proposal, "tester", "test")
            elif desk.spending.approval(which.digest) is None:
                desk.approve(proposal, "tester")
        except (BudgetRefused, PolicyRefusal) as refusal:
            note(str(refusal))
        except Exception as error:  # it was never kept: the budget did not cover it when it was proposed
            assert "no study" in str(error), error

    @rule(
        which=st.sampled_from(STUDIES),
        number=st.integers(1, 5),
        evaluate=st.booleans(),
        crafted=st.booleans(),
        dies=st.none() | st.integers(0, 30),
    )
    def ask(self, which: Study, number: int, evaluate: bool, crafted: bool, dies: int | None) -> None:
        """Any round, in any order, repeated, with another model, with a kill between any two writes."""
        model = pack(np.full(6, float(crafted), np.float32), which)
        say = self.coordinator.evaluate if evaluate else self.coordinator.train
        header = say(number, model, which)
        try:
            with killed_at(dies):
                answer = self.site.requests.handle(header, model)
        except Killed:
            self.site.restart()
            return
        if isinstance(self.coordinator.read(answer), Update | Counts):
            assert self.answers.setdefault((header, model), answer) == answer, "one question, two answers"

    @rule(choices=st.lists(st.tuples(st.sampled_from(STUDIES), st.integers(1, 4)), min_size=2, max_size=4))
    def charge_at_once(self, choices: list[tuple[Study, int]]) -> None:
        """Several threads ask for a charge in the same moment; none of them trains."""
        spending = self.site.desk.spending
        budget = self.site.desk.config.policy.budget(ASSET)

        def charge(which: Study, number: int) -> None:
            approval = spending.approval(which.digest)
            if approval is not None:
                with suppress(BudgetRefused, PolicyRefusal, LedgerError):  # a witnessed round: LedgerError
                    spending.reserve(which.digest, which.study, ASSET, number, approval.plan, budget)

        with ThreadPoolExecutor(len(choices)) as threads:
            for done in [threads.submit(charge, *choice) for choice in choices]:
                done.result()

    @invariant()
    def what_ran_stays_within_ledger_and_budget(self) -> None:
        ledger = self.site.desk.ledger
        verified = read_ledger(ledger.path, "hospital-a", ledger._identity.public)
        assert verified.head == ledger.head
        state = self.site.desk.spending.state(ASSET)
        written = epsilon(state.events, DELTA)
        shown = {(e.body.study, e.body.plan.patients) for e in verified.entries if isinstance(e.body, Approve)}  # type: ignore[union-attr]
        truth = [*self.ran.values(), *(GaussianEvent(10.0) for _ in shown)]
        assert epsilon(truth, DELTA) <= written + ROUNDOFF
        assert written <= BUDGET + ROUNDOFF
        for each in STUDIES:
            limit = each.privacy.epsilon
            assert limit is not None
            assert epsilon(state.study(each.digest), DELTA) <= limit + ROUNDOFF

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()
        self.site.desk.close()
        shutil.rmtree(self.folder)


TestAsked = Asked.TestCase
TestAsked.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
