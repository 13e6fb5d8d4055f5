"""Accounts of the site over its ledger: every use of the data is charged before it begins, and settled afterwards.

All sums are computed from the ledger's events; no ε that a file contains is believed. A charge counts in full until it
is settled, so a crash can make the ledger say more than was spent, never less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from consilium_client.agent.accounts import Account, Approval, ChargedUse
from consilium_client.agent.reservations import Reserved, left, reserved, uses_left
from consilium_client.state.draw_seeds import Use
from consilium_client.state.ledger_file import LedgerFile
from consilium_shared.errors import BudgetRefused, ConfigurationError, PolicyRefusal
from consilium_shared.ledger.entry import Approve, Open, Policy, Purpose, Reject
from consilium_shared.ledger.spending import AssetSpending, asset_spending
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.budget import Budget, Quote, affords, alone_of, in_words
from consilium_shared.privacy.event import Event, event_from_dict, event_to_dict
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_from_dict


class Spending:
    """The site's accounts over its ledger. Safe to use from several threads.

    It raises refusals and does not write them down: whoever answers the request appends the ``refuse`` entry.
    """

    def __init__(self, ledger: LedgerFile) -> None:
        self._ledger = ledger

    def open_asset(self, asset: str, budget: Budget, policy_digest: str, reason: str = "") -> None:
        """Enter the budget that holds for an asset, unless the ledger has it already.

        Raises:
            ConfigurationError: the ledger has another budget for the asset, and no reason is given for the change, or
                that of the change before.
        """
        with self._ledger.exclusive():
            before = self._ledger.books.assets.get(asset)
            if before is not None:
                if _budget_of(before) == budget:
                    return
                if not reason or reason == before.reason:
                    raise ConfigurationError(
                        f"the budget of asset {asset!r} is not the one in the ledger, "
                        f"{_in_words(_budget_of(before))}; to change it, say why in site.yaml, under "
                        f"policy.budgets.{asset}.reason, in other words than the last time"
                    )
            self._ledger.append(
                "open",
                {
                    "asset": asset,
                    "unit": "patient",
                    "epsilon": _finite(budget.epsilon),
                    "delta": budget.delta,
                    "policy": policy_digest,
                    "reason": reason,
                },
            )

    def note_policy(self, policy_digest: str) -> None:
        """Enter the digest of the site's policy, unless the last entry that names one has it."""
        with self._ledger.exclusive():
            named = [
                entry.body.policy if isinstance(entry.body, Open) else entry.body.digest
                for entry in self._ledger.entries
                if isinstance(entry.body, Open | Policy)
            ]
            if not named or named[-1] != policy_digest:
                self._ledger.append("policy", {"digest": policy_digest, "reason": ""})

    def state(self, asset: str) -> AssetSpending:
        """Spending on an asset; unsettled charges in full."""
        with self._ledger.exclusive():
            return asset_spending(self._ledger.books, asset)

    def reserved(self, asset: str) -> tuple[Reserved, ...]:
        """Reservations of an asset: what approved studies may still take (``reservations.py``)."""
        with self._ledger.exclusive():
            return reserved(self._ledger.books, asset)

    def approve_cost(self, account: Account) -> Quote:
        """Cost of the whole study, or of what is left of it, on top of everything that ever touched the asset and
        of what is reserved for other approved studies."""
        with self._ledger.exclusive():
            others = [each for each in self.reserved(account.asset) if each.study != account.study]
            return self._quote(account, others)

    def _quote(self, account: Account, others: Iterable[Reserved]) -> Quote:
        promised = [event for each in others for event in each.events]
        own = left(self._ledger.books, account.study, account.plan)
        return affords(account.budget, self.state(account.asset).events, own, promised)

    def alone(self, account: Account) -> float | None:
        """ε of the asset, with what is left of the study and all that is reserved, by its own shares of noise alone.

        That is what remains where the encryption of every sum with shared noise fails, or the others add no noise; None
        where no noise is shared.
        """
        with self._ledger.exclusive():
            others = [each for each in self.reserved(account.asset) if each.study != account.study]
            own = left(self._ledger.books, account.study, account.plan)
            events = [*self.state(account.asset).events, *(event for each in others for event in each.events), *own]
            return alone_of(events, account.budget.delta)

    def approve(self, account: Account, *, epsilon: float, by: str, roster: str | None = None) -> Quote:
        """Enter the approval of a study.

        Args:
            account: the study, with the plan that is approved.
            epsilon: most that it may cost; infinity without privacy.
            by: who approves.
            roster: digest of the roster that this person was shown.

        Returns:
            What the whole study will cost.

        Raises:
            BudgetRefused: the asset's budget does not cover all of its rounds.
        """
        with self._ledger.exclusive():
            quote = self.approve_cost(account)
            if not quote.fits:
                raise BudgetRefused(f"asset {account.asset!r} cannot afford the study: {quote}")
            _check_alone(account, self.alone(account))
            plan = account.plan
            shared = {"epsilon_alone": plan.cost_alone()} if isinstance(plan, PrivacyPlan) and plan.shared else {}
            self._ledger.append(
                "approve",
                {
                    "study": account.study,
                    "name": account.name,
                    "asset": account.asset,
                    "epsilon": _finite(epsilon),
                    "by": by,
                    "plan": account.plan.to_dict(),
                    "roster": roster,
                    **{key: _finite(value) for key, value in shared.items()},
                },
            )
            self._charge_count(account.study)
            return quote

    def charge_counts(self) -> None:
        """Charge what a crash left between an approval and the charge for its number of patients; on every start."""
        with self._ledger.exclusive():
            for study in list(self._ledger.books.decisions):
                self._charge_count(study)

    def _charge_count(self, study: str) -> None:
        """The noised number of patients stands in the approval, for whoever reads the ledger: it is charged at once.

        Another approval of the study with another draw is charged again.
        """
        books = self._ledger.books
        approval = books.decisions.get(study)
        if not isinstance(approval, Approve) or books.has_counted(study, approval.plan):
            return
        event = plan_from_dict(approval.plan.model_dump()).count_event()
        assert event is not None  # noqa: S101 - a plan with a number of patients has its noise
        delta = books.assets[approval.asset].delta
        after = affords(Budget(math.inf, delta), self.state(approval.asset).events, [event]).total
        self._ledger.append(
            "charge",
            {
                "study": study,
                "name": approval.name,
                "asset": approval.asset,
                "round": 0,
                "attempt": self.attempts(study, 0, "count") + 1,
                "event": event_to_dict(event),
                "delta": delta,
                "epsilon_after": _finite(after),
                "purpose": "count",
            },
        )

    def reject(self, *, study: str, name: str, by: str, reason: str) -> None:
        """Enter that a study was refused, or an approval withdrawn; the next ``reserve`` fails."""
        self._ledger.append("reject", {"study": study, "name": name, "by": by, "reason": reason})

    def approval(self, study: str) -> Approval | None:
        """The approval in force for a study's digest, or None: nobody decided, or the last decision was no."""
        with self._ledger.exclusive():
            decision = self._ledger.books.decisions.get(study)
        if not isinstance(decision, Approve):
            return None
        limit = math.inf if decision.epsilon is None else decision.epsilon
        plan = plan_from_dict(decision.plan.model_dump())
        return Approval(study, decision.name, decision.asset, limit, decision.by, plan, decision.roster)

    def reserve(self, account: Account, use: Use, seed: bytes) -> ChargedUse:
        """Charge a round's training, or its evaluation; when this returns the charge is on the disk and it may run.

        What a study needs is reserved for it since its approval, so no other study makes this fail: the coordinator
        reads nothing about others from what is refused here. That a study is charged for again and again ends with its
        own plan. What is left is a budget that was made smaller since, or approvals of programs that reserved nothing:
        then what cannot be finished, beside what has begun, is not begun.

        Args:
            account: the study, as approved.
            use: what for. A round that was charged before is charged again, as a new attempt.
            seed: of the draw that the charge pays for; it is on the disk before.

        Raises:
            BudgetRefused: with the arithmetic, when the history of the asset with this round would cost more than the
                asset's budget, or that of the study more than was approved.
            PolicyRefusal: the study is not approved, or not like this.
            ConfigurationError: the budget is not the one that the ledger has for the asset.
        """
        with self._ledger.exclusive():
            of_asset, study_epsilon = self.check(account, [use])
            number, event = self.attempts(account.study, use.round, use.purpose) + 1, _event(account.plan, use.purpose)
            alone = alone_of([*self.state(account.asset).events, event], account.budget.delta)
            entry = self._ledger.append(
                "charge",
                {
                    "study": account.study,
                    "name": account.name,
                    "asset": account.asset,
                    "round": use.round,
                    "attempt": number,
                    "event": event_to_dict(event),
                    "delta": account.budget.delta,
                    "epsilon_after": _finite(of_asset.total),
                    "purpose": use.purpose,
                    **({} if alone is None else {"epsilon_alone_after": _finite(alone)}),
                },
            )
        return ChargedUse(account.study, use, entry.seq, number, event, study_epsilon, seed)

    def settle(self, charged: ChargedUse, steps: int) -> None:
        """Write down how many steps really ran, durably; once.

        Raises:
            LedgerError: settled already, or more steps than were charged.
        """
        self._ledger.append("settle", {"charge_seq": charged.seq, "steps": steps})

    def check(self, account: Account, uses: Sequence[Use]) -> tuple[Quote, float]:
        """Check that uses of the data can all be charged now; none is.

        Returns:
            What they come to for the asset; and ε of this study's own history with them, at the study's δ, infinity
            without privacy.

        Raises:
            BudgetRefused, PolicyRefusal, ConfigurationError: as ``reserve``.
        """
        study, asset, plan, budget = account.study, account.asset, account.plan, account.budget
        with self._ledger.exclusive():
            limit = min(self._check_approved(account, use.round) for use in uses)
            opened = self._ledger.books.assets.get(asset)
            if opened is None or _budget_of(opened) != budget:
                raise ConfigurationError(f"the ledger has another budget for asset {asset!r}; restart the agent")
            events, state = [_event(plan, use.purpose) for use in uses], self.state(asset)
            of_study = None
            if isinstance(plan, PrivacyPlan):  # first what follows from the study's own plan, whatever others did
                of_study = affords(Budget(limit, plan.delta), state.study(study), events)
                if not of_study.fits:
                    raise BudgetRefused(f"study {account.name!r} at this site: {of_study}")
                self._check_uses(account, plan, [use.purpose for use in uses])
            begun = {each.study for each in state.studies if each.rounds}
            if study not in begun:
                others = [each for each in self.reserved(asset) if each.study in begun]
                whole = self._quote(account, others)
                if not whole.fits:
                    raise BudgetRefused(f"asset {asset!r} cannot afford the study any more: {whole}")
            of_asset = affords(budget, state.events, events)
            if not of_asset.fits:
                raise BudgetRefused(f"asset {asset!r}: {of_asset}")
            _check_alone(account, alone_of([*state.events, *events], budget.delta))
            return of_asset, math.inf if of_study is None else of_study.total

    def _check_uses(self, account: Account, plan: PrivacyPlan, purposes: Sequence[Purpose]) -> None:
        for purpose in dict.fromkeys(purposes):
            if uses_left(self._ledger.books, account.study, plan, purpose) < purposes.count(purpose):
                raise BudgetRefused(
                    f"study {account.name!r} at this site: as many charges for {purpose} as its plan pays for were "
                    "made, some of them for the same round"
                )

    def attempts(self, study: str, round_number: int, purpose: Purpose = "training") -> int:
        """Number of charges of a round for that purpose."""
        with self._ledger.exclusive():
            return self._ledger.books.attempts(study, round_number, purpose)

    def begun(self, study: str) -> bool:
        """True where any round's training was charged for a study's digest."""
        with self._ledger.exclusive():
            charges = self._ledger.books.charges.values()
            return any((each.body.study, each.body.purpose) == (study, "training") for each in charges)

    def unsettled(self, account: Account, use: Use, number: int, seed: bytes) -> ChargedUse | None:
        """The charge of that number for a use that was never settled, to run on with its seed.

        None when there is none, or it is another event: a study that was approved again with another plan runs other
        steps than were charged. It needs a new charge, and the old one stands in full. Only for the caller that can
        run the very same draw again (``state/draw_seeds.py``).

        Raises:
            PolicyRefusal: the study is not approved any more, or not like this.
        """
        wanted = (account.study, use.purpose, use.round, number)
        with self._ledger.exclusive():
            for charged in self._ledger.books.charges.values():
                body = charged.body
                if (body.study, body.purpose, body.round, body.attempt) == wanted and charged.settled is None:
                    event = _event(account.plan, use.purpose)
                    if event_from_dict(body.event.model_dump()) != event:
                        return None
                    self._check_approved(account, use.round)
                    spent = self.study_epsilon(account.study)
                    return ChargedUse(account.study, use, charged.seq, number, event, spent, seed)
        return None

    def study_epsilon(self, study: str) -> float:
        """ε that an approved study has spent here so far, at its own δ; infinity without privacy, once it ran."""
        approval = self.approval(study)
        if approval is None:
            raise PolicyRefusal("pending", "the study is not approved here")
        events = self.state(approval.asset).study(study)
        if not isinstance(approval.plan, PrivacyPlan):
            return math.inf if events else 0.0
        return epsilon(events, approval.plan.delta)

    def decision(self, study: str) -> Approve | Reject | None:
        """The last decision on a study's digest, or None."""
        with self._ledger.exclusive():
            return self._ledger.books.decisions.get(study)

    def decided(self) -> frozenset[str]:
        """Digests of the studies on which somebody here decided."""
        with self._ledger.exclusive():
            return frozenset(self._ledger.books.decisions)

    def _check_approved(self, account: Account, round_number: int) -> float:
        """The approved ε of the account's study; raises PolicyRefusal where it is not approved, or not like this."""
        approval = self.approval(account.study)
        if approval is None:
            decided = account.study in self._ledger.books.decisions
            raise PolicyRefusal(
                "rejected" if decided else "pending",
                "the hospital said no to this study" if decided else "nobody at the hospital has approved this study",
            )
        if (approval.name, approval.asset, approval.plan) != (account.name, account.asset, account.plan):
            raise PolicyRefusal("policy", "not the name, the asset and the plan that were approved for this study")
        rounds = account.plan.rounds
        if not 1 <= round_number <= rounds:
            raise PolicyRefusal("policy", f"round {round_number} of a study approved for {rounds} rounds")
        return approval.epsilon


def _check_alone(account: Account, alone: float | None) -> None:
    """Raises BudgetRefused where the asset's own shares of noise alone would protect it less than the policy asks."""
    if alone is not None and alone > account.most_alone:
        raise BudgetRefused(
            f"asset {account.asset!r}: with this study its own shares of noise alone would limit all studies to "
            f"ε {in_words(alone)}, and site.yaml permits {account.most_alone:g} "
            f"(policy.budgets.{account.asset}.shared_noise.max_epsilon_alone)"
        )


def _event(plan: Plan, purpose: Purpose) -> Event:
    event = plan.event() if purpose == "training" else plan.evaluation_event()
    if event is None:
        raise PolicyRefusal("policy", "the approved plan lets no evaluation counts leave")
    return event


def _budget_of(opened: Open) -> Budget:
    return Budget(math.inf if opened.epsilon is None else opened.epsilon, opened.delta)


def _in_words(budget: Budget) -> str:
    limit = "unlimited" if math.isinf(budget.epsilon) else f"ε {budget.epsilon:g}"
    return f"{limit} at δ {budget.delta:g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
