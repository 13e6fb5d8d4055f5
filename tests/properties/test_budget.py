"""Whatever a coordinator asks, however often, and wherever the agent dies: what really ran stays within the budget, and
one result is in one sum that anybody can open.

The agent is the real one, with its files; only the training itself is left out. Studies, requests, attempts,
repetitions and crashes are random; a crash strikes before any write, rename, removal or flush to the disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.neighbours import Sum
from tests.support.site import CONTRACT, Coordinator, Site

from consilium_client.agent import secure_sums
from consilium_client.agent.accounts import Account
from consilium_client.agent.masking import Masks, masked
from consilium_client.agent.replay_guard import round_of
from consilium_client.state.draw_seeds import Use
from consilium_client.state.ledger_file import read_ledger
from consilium_client.state.results import Result
from consilium_client.training import evaluation, trainer
from consilium_shared import limits
from consilium_shared.errors import BudgetRefused, LedgerError, PeerError, PolicyRefusal
from consilium_shared.ledger.entry import Approve
from consilium_shared.metrics import Layout
from consilium_shared.models.vector import pack
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import Event, GaussianEvent
from consilium_shared.privacy.plan import Plan
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Close, Closing, Counts, Shares, Signed, Update
from consilium_shared.secagg.site import Contribution
from consilium_shared.secagg.terms import Terms
from consilium_shared.study import Study

BUDGET, DELTA = 2.4, 1e-3
ROUNDOFF = 1e-9  # of composing by FFT
ASSET = "synthetic-table"
POLICY = "threat_models: [malicious-server, honest-but-curious]"
WRITES = ("write", "replace", "unlink", "fsync")


def study(number: int, epsilon: float, rounds: int, evaluated: bool, curious: bool) -> Study:
    """Where the coordinator is ``curious`` two of three sites must give up an attempt before it is dead, else one."""
    training = {**CONTRACT["training"], "rounds": rounds, "steps_per_round": 1 + number}
    return Study.model_validate(
        {
            **CONTRACT,
            "study": f"study-{number}",
            "training": training,
            "privacy": {**CONTRACT["privacy"], "epsilon": epsilon},
            "evaluation": {"epsilon": epsilon / 4} if evaluated else {},
            "aggregation": {"min_sites": 2, "threat_model": "honest-but-curious" if curious else "malicious-server"},
        }
    )


STUDIES = [
    study(0, 1.0, 3, True, curious=True),
    study(1, 1.5, 2, False, curious=True),
    study(2, 2.0, 2, True, curious=False),
    study(3, 0.5, 4, True, curious=True),
]
COHORTS = [("hospital-b",), ("clinic-c", "hospital-b")]
DIES = st.none() | st.none() | st.integers(0, 40)


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
        self.sent: list[tuple[Study, bytes, tuple[bytes, bytes]]] = []
        self.last: tuple[Study, int, int, bool, bytes] | None = None
        """What was asked for last, at which attempt."""
        self.terms: dict[str, Terms] = {}
        self.vectors: dict[str, bytes] = {}
        """Digest of the terms to the result that was masked under them."""
        self.masked_under: dict[bytes, list[str]] = {}
        """Result to the digests of the terms, in order."""
        self.signed: dict[str, tuple[Sum, str]] = {}
        self.opened: set[str] = set()
        """Digests of the terms of sums that were opened."""
        self.patches: list[Any] = [
            patch.object(secure_sums, "masked", self.mask),
            patch.object(trainer, "train", self.train),
            patch.object(trainer, "check_independence", lambda _: None),
            patch.object(evaluation, "noised_counts", self.count),
        ]
        for each in self.patches:
            each.start()
        self.coordinator = Coordinator(self.folder / "federation", BUDGET, policy=POLICY)
        self.site = Site(self.coordinator)

    def train(self, _: bytes, study: Study, records: Any, plan: Plan, *, seed: bytes, **__: Any) -> Any:
        """What the trainer would run."""
        event = plan.event()
        assert self.ran.setdefault(seed, event) == event, "one draw, and two kinds of noise"
        draw = np.random.default_rng(list(seed))
        return trainer.TrainResult(draw.standard_normal(6).astype(np.float32), plan.steps_per_round, 64, None)

    def count(self, _: bytes, study: Study, *__: Any, noise_multiplier: float, seed: bytes, **___: Any) -> Any:
        """What the evaluation would release."""
        event = GaussianEvent(noise_multiplier)
        assert self.ran.setdefault(seed, event) == event, "one draw, and two kinds of noise"
        return np.random.default_rng(list(seed)).integers(-9, 9, Layout.of(study).width)

    def mask(self, kept: Result, study: Study, contribution: Contribution, masks: Masks, *, counts: bool) -> Any:
        """What would leave, noted before it does."""
        result = kept.update(0, kept.about.parameters).tobytes() + kept.counts().tobytes()
        under = contribution.terms.digest
        self.terms[under] = contribution.terms
        assert self.vectors.setdefault(under, result) == result, "one mask, and two vectors"
        places = self.masked_under.setdefault(result, [])
        if under not in places:
            places.append(under)
        return masked(kept, study, contribution, masks, counts=counts)

    @initialize(first=st.sampled_from(STUDIES))
    def propose(self, first: Study) -> None:
        for each in STUDIES:
            self.site.ask(self.coordinator.propose(each))
        self._decide(first, yes=True)

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
        service = self.site.service
        try:
            proposal = service.proposals.find(which.digest)
            if not yes:
                service.reject(proposal, "tester", "test")
            elif service.spending.approval(which.digest) is None:
                service.approvals.approve(proposal, "tester")
        except (BudgetRefused, PolicyRefusal) as refusal:
            note(str(refusal))

    @rule(
        which=st.sampled_from(STUDIES),
        number=st.integers(1, 5),
        evaluate=st.booleans(),
        crafted=st.booleans(),
        cohort=st.sampled_from(COHORTS),
        dies=DIES,
    )
    def ask(
        self, which: Study, number: int, evaluate: bool, crafted: bool, cohort: tuple[str, ...], dies: int | None
    ) -> None:
        """Any round, in any order, repeated, with another model, with a kill between any two writes."""
        self._ask(which, number, 1, evaluate, pack(np.full(6, float(crafted), np.float32), which), cohort, True, dies)

    @rule(which=st.sampled_from(STUDIES), cohort=st.sampled_from(COHORTS), dies=DIES)
    def go_on(self, which: Study, cohort: tuple[str, ...], dies: int | None) -> None:
        """As an honest coordinator: the round after the last that the site answered, in the end the evaluation."""
        if self.last is not None and self.site.service.spending.approval(which.digest) is None:
            which = self.last[0]
        number = round_of(self.site.service.responses.latest(which.digest, "update") or 0) + 1
        evaluate = number > which.training.rounds
        model = pack(np.zeros(6, np.float32), which)
        self._ask(which, number - evaluate, 1, evaluate, model, cohort, True, dies)

    @rule(
        more=st.integers(0, 3),
        cohort=st.sampled_from(COHORTS),
        abandoning=st.booleans(),
        crafted=st.booleans(),
        dies=DIES,
    )
    def try_again(self, more: int, cohort: tuple[str, ...], abandoning: bool, crafted: bool, dies: int | None) -> None:
        """Another attempt at what was asked for last; the others give up the one before, or do not."""
        if self.last is not None:
            which, number, attempt, evaluate, model = self.last
            model = pack(np.full(6, 2.0, np.float32), which) if crafted and more == 3 else model
            self._ask(which, number, attempt + more, evaluate, model, cohort, abandoning, dies)

    def _ask(
        self,
        which: Study,
        number: int,
        attempt: int,
        evaluate: bool,
        model: bytes,
        cohort: tuple[str, ...],
        abandoning: bool,
        dies: int | None,
    ) -> None:
        if attempt > limits.ATTEMPTS:
            return
        c = self.coordinator
        c.others, c.abandoning = cohort, abandoning
        self.last = which, number, attempt, evaluate, model
        try:
            with killed_at(dies):
                header = (c.evaluate if evaluate else c.train)(number, model, which, attempt)
                answer = self.site.requests.handle(header, model)
        except Killed:
            self.site.restart()
            return
        if isinstance(c.read(answer), Update | Counts):
            assert self.answers.setdefault((header, model), answer) == answer, "one question, two answers"
            if (which, header, answer) not in self.sent:
                self.sent.append((which, header, answer))

    @rule(back=st.integers(0, 3), leave_out=st.booleans(), dies=DIES)
    def sign(self, back: int, leave_out: bool, dies: int | None) -> None:
        """Survivors of any sum that the site is in; a neighbour that gave the attempt up does not help."""
        if not self.sent:
            return
        which, header, answer = self.sent[-1 - back % len(self.sent)]
        try:
            total = self.coordinator.sum(header, answer, which, without=("clinic-c",) if leave_out else ())
        except PeerError:
            return
        try:
            with killed_at(dies):
                said = self.coordinator.read(self.site.requests.handle(*total.survivors()))
        except Killed:
            self.site.restart()
            return
        if isinstance(said, Signed):
            before = self.signed.setdefault(total.terms.digest, (total, said.signature))
            assert before[1] == said.signature, "two sets of survivors were signed"

    @rule(back=st.integers(0, 3), dies=DIES)
    def open(self, back: int, dies: int | None) -> None:
        """What is opened is the sum of what was masked."""
        if not self.signed:
            return
        total, signature = list(self.signed.values())[-1 - back % len(self.signed)]
        try:
            request = total.open(signature)
        except PeerError:  # a neighbour signed another set
            return
        try:
            with killed_at(dies):
                answer = self.site.requests.handle(*request)
        except Killed:
            self.site.restart()
            return
        if isinstance(self.coordinator.read(answer), Shares):
            with suppress(PeerError):  # opened already
                opened = total.read(answer[1])
                self.opened.add(total.terms.digest)
                result = self.vectors[total.terms.digest]
                if total.terms.slot.purpose == "training":
                    update = np.frombuffer(result[:24], np.float32)
                    weight = opened.weight - (len(total.total.survivors) - 1)
                    np.testing.assert_allclose(opened.mean * opened.weight / weight, update, atol=1e-3)
                    result = result[24:]
                assert result == (b"" if opened.counts is None else opened.counts.tobytes())

    @rule(which=st.sampled_from(STUDIES), dies=DIES)
    def close(self, which: Study, dies: int | None) -> None:
        """The study is said to be over, as soon as its last round was answered."""
        if round_of(self.site.service.responses.latest(which.digest, "update") or 0) < which.training.rounds:
            return
        recorded = self.coordinator.recorded(which.training.rounds)
        header = messages.encode(Close(**self.coordinator.common(which), recorded=recorded), self.coordinator.key)
        try:
            with killed_at(dies):
                answer = self.coordinator.read(self.site.requests.handle(header, b""))
        except Killed:
            self.site.restart()
            return
        if isinstance(answer, Closing):
            service = self.site.service
            assert not list(service.results.folder.glob(f"{which.digest}.*"))
            assert not (service.sums.folder / which.digest).exists()

    @rule(choices=st.lists(st.tuples(st.sampled_from(STUDIES), st.integers(1, 4)), min_size=2, max_size=4))
    def charge_at_once(self, choices: list[tuple[Study, int]]) -> None:
        """Several threads ask for a charge in the same moment; none of them trains."""
        spending = self.site.service.spending
        budget = self.site.service.config.policy.budget(ASSET)

        def charge(which: Study, number: int) -> None:
            approval = spending.approval(which.digest)
            if approval is not None:
                with suppress(BudgetRefused, PolicyRefusal, LedgerError):  # a witnessed round: LedgerError
                    account = Account(which.digest, which.study, ASSET, approval.plan, budget)
                    spending.reserve(account, Use("training", number, "0" * 64), b"")

        with ThreadPoolExecutor(len(choices)) as threads:
            for done in [threads.submit(charge, *choice) for choice in choices]:
                done.result()

    @invariant()
    def what_ran_stays_within_ledger_and_budget(self) -> None:
        ledger = self.site.service.ledger
        verified = read_ledger(ledger.path, "hospital-a", ledger._identity.public)
        assert verified.head == ledger.head
        state = self.site.service.spending.state(ASSET)
        written = epsilon(state.events, DELTA)
        shown = {(e.body.study, e.body.plan.patients) for e in verified.entries if isinstance(e.body, Approve)}  # type: ignore[union-attr]
        truth = [*self.ran.values(), *(GaussianEvent(10.0) for _ in shown)]
        assert epsilon(truth, DELTA) <= written + ROUNDOFF
        assert written <= BUDGET + ROUNDOFF
        for each in STUDIES:
            limit = each.privacy.epsilon
            assert limit is not None
            assert epsilon(state.study(each.digest), DELTA) <= limit + ROUNDOFF

    @invariant()
    def what_is_approved_is_there_when_its_round_comes(self) -> None:
        """No refusal for the asset's budget, from which a coordinator could read what others spent."""
        spending = self.site.service.spending
        held = [event for each in spending.reserved(ASSET) for event in each.events]
        assert epsilon([*spending.state(ASSET).events, *held], DELTA) <= BUDGET + ROUNDOFF
        refused = [e.body for e in self.site.service.ledger.entries if e.kind == "refuse" and e.body.reason == "budget"]  # type: ignore[attr-defined]
        assert all(each.detail.startswith("study ") for each in refused), refused  # type: ignore[attr-defined]

    @invariant()
    def one_result_is_in_one_sum_that_anybody_can_open(self) -> None:
        for places in self.masked_under.values():
            for earlier, later in combinations(places, 2):
                assert self.terms[earlier].dead(self.terms[later].adverts)
            assert not set(places[:-1]) & self.opened, "its sum was opened, and the same result is in another"

    def teardown(self) -> None:
        for each in self.patches:
            each.stop()
        self.site.service.close()
        shutil.rmtree(self.folder)


TestAsked = Asked.TestCase
TestAsked.settings = settings(
    max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
