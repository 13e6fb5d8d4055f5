"""Spending, recomputed from the events of a verified ledger and compared with what was allowed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

from consilium_audit.fitting import Fitting, Use
from consilium_audit.payments import Contradiction, payments
from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.ledger.chain import Books, Charged
from consilium_shared.ledger.entry import Approve, Charge, Open, Purpose, Refuse, Settle
from consilium_shared.ledger.spending import asset_spending
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.accountant import Pair, as_steps, epsilon, epsilon_of_steps
from consilium_shared.privacy.budget import alone_of, in_words
from consilium_shared.privacy.event import Event, event_from_dict, really_run
from consilium_shared.privacy.plan import PrivacyPlan, plan_from_dict

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
TOLERANCE = 1e-6
"""In ε. The same sum on another machine may differ in its last digits."""


@dataclass(frozen=True)
class PurposeAccount:
    """Account of one study's charges to the asset for one purpose.

    Attributes:
        charges: how many were made for it.
        epsilon: of these alone, at the study's δ; infinity without privacy. Purposes do not add up: they compose.
    """

    charges: int
    epsilon: float


@dataclass(frozen=True)
class StudyAccount:
    """One study at one site.

    Attributes:
        epsilon: recomputed; infinity without privacy once it ran.
        delta: the study's own, at which ``epsilon`` holds; None without privacy.
        approved: ε that the hospital approved; infinity without privacy.
        rounds: how many were charged.
        unsettled: charges of rounds that count in full because nobody wrote down what ran, or what is written there
            cannot be. (The one for the number of patients always does.)
        purposes: training, evaluation and count, as far as anything was charged for them.
        refused: reason code to how often.
        alone: ε by this site's own shares of the noise alone; None where it shared none.
    """

    study: str
    name: str
    epsilon: float
    delta: float | None
    approved: float
    rounds: int
    unsettled: int
    purposes: dict[Purpose, PurposeAccount]
    refused: dict[str, int]
    alone: float | None = None


@dataclass(frozen=True)
class AssetAccount:
    """One asset's budget over its lifetime: everything composed at the budget's own δ."""

    asset: str
    epsilon: float
    delta: float
    limit: float
    studies: tuple[StudyAccount, ...]
    """Every study that was charged or approved, in the order of its first entry of that kind."""
    alone: float | None = None
    """ε by this site's own shares of the noise alone: what is left should sums with shared noise be broken; None where
    it shared none."""

    @property
    def left(self) -> float:
        """ε between what is spent and the limit, at least 0."""
        return math.inf if math.isinf(self.limit) else max(0.0, self.limit - self.epsilon)


@dataclass(frozen=True)
class SiteAccount:
    """One site's ledger, summed up.

    Attributes:
        refusals: (study's digest or None, reason code) to how often.
        contradictions: where the ledger itself shows that something was not paid for, or settled as if it had not run.
            What such a charge paid for is counted in full; what left without any charge is in no number.
    """

    site: str
    entries: int
    assets: tuple[AssetAccount, ...]
    refusals: dict[tuple[str | None, str], int]
    contradictions: tuple[Contradiction, ...]

    def of_study(self, study: str) -> tuple[AssetAccount, StudyAccount] | None:
        """The account of a study's digest with that of its asset; None when it was never approved here."""
        found = ((asset, each) for asset in self.assets for each in asset.studies if each.study == study)
        return next(found, None)


@contextmanager
def computing() -> Iterator[None]:
    """Turn errors of computing with a file's numbers into LedgerError."""
    try:
        yield
    except (ConfigurationError, ArithmeticError, ValueError) as error:
        raise LedgerError(f"no cost can be computed from its events: {error}") from error


def cost(events: Sequence[Event], delta: float) -> float:
    """ε of the events at ``delta``; raises LedgerError where the file's numbers allow none to be computed."""
    with computing():
        return epsilon(events, delta)


def cost_alone(events: Sequence[Event], delta: float) -> float | None:
    """ε at ``delta`` by own shares of the noise alone; None where none is shared. Raises LedgerError as ``cost``."""
    with computing():
        return alone_of(events, delta)


def account(ledger: VerifiedLedger) -> SiteAccount:
    """The site's account; raises LedgerError when its numbers make no sense."""
    approvals: dict[str, Approve] = {}
    refusals: dict[tuple[str | None, str], int] = {}
    for entry in ledger.entries:
        if isinstance(entry.body, Approve):
            approvals.pop(entry.body.study, None)
            approvals[entry.body.study] = entry.body
        elif isinstance(entry.body, Refuse):
            key = (entry.body.study, entry.body.reason)
            refusals[key] = refusals.get(key, 0) + 1
    paid = payments(ledger)
    here: dict[str, dict[str, list[Charged]]] = {name: {} for name in ledger.books.assets}
    for each in paid.charges:
        here[each.body.asset].setdefault(each.body.study, []).append(each)
    for approval in approvals.values():
        here[approval.asset].setdefault(approval.study, [])
    refused: dict[str | None, dict[str, int]] = {}
    for (study, reason), count in refusals.items():
        refused.setdefault(study, {})[reason] = count
    assets = tuple(
        AssetAccount(
            asset=name,
            epsilon=cost(ran(charge for charges in here[name].values() for charge in charges), opened.delta),
            delta=opened.delta,
            limit=limit_of(opened),
            studies=tuple(
                _study_account(approvals[study], charges, refused.get(study, {}))
                for study, charges in here[name].items()
            ),
            alone=cost_alone(ran(charge for charges in here[name].values() for charge in charges), opened.delta),
        )
        for name, opened in ledger.books.assets.items()
    )
    return SiteAccount(ledger.site, len(ledger.entries), assets, refusals, paid.contradictions)


def _study_account(approval: Approve, charges: Sequence[Charged], refused: dict[str, int]) -> StudyAccount:
    delta = study_delta(approval)
    purposes = {}
    for purpose in PURPOSES:
        those = [each for each in charges if each.body.purpose == purpose]
        if those:
            purposes[purpose] = PurposeAccount(len(those), cost_at(ran(those), delta))
    return StudyAccount(
        study=approval.study,
        name=approval.name,
        epsilon=cost_at(ran(charges), delta),
        delta=delta,
        approved=limit_of(approval),
        rounds=len({each.body.round for each in charges if each.body.purpose == "training"}),
        unsettled=sum(each.settled is None and each.body.purpose != "count" for each in charges),
        purposes=purposes,
        refused=refused,
        alone=None if delta is None else cost_alone(ran(charges), delta),
    )


def ran(charges: Iterable[Charged]) -> list[Event]:
    """Events of these charges: what ran, and in full what was never settled."""
    events = []
    for each in charges:
        event: Event | None = _event(each.body)
        if each.settled is not None and event is not None:
            event = really_run(event, each.settled)
        if event is not None:
            events.append(event)
    return events


def _event(charge: Charge) -> Event:
    return event_from_dict(charge.event.model_dump())


def study_delta(approval: Approve) -> float | None:
    """δ of the approved plan; None without privacy."""
    plan = plan_from_dict(approval.plan.model_dump())
    return plan.delta if isinstance(plan, PrivacyPlan) else None


def study_epsilons(ledger: VerifiedLedger, study: str, at: Iterable[int]) -> Iterator[tuple[int, float]]:
    """ε that a study had spent there when each of these entries was the last, in their order, at the study's δ."""
    wanted, delta, approved = set(at), None, False
    steps: Counter[Pair] = Counter()
    for entry in ledger.entries:
        body = entry.body
        if isinstance(body, Approve) and body.study == study:
            delta, approved = study_delta(body), True
        elif isinstance(body, Charge) and body.study == study:
            pair, charged = as_steps(_event(body))
            steps[pair] += charged
        elif isinstance(body, Settle) and (charge := ledger.books.charges[body.charge_seq].body).study == study:
            pair, charged = as_steps(_event(charge))
            steps[pair] -= charged - min(body.steps, charged)
        if entry.seq in wanted and approved:
            yield entry.seq, _cost_of_steps(+steps, delta)


def _cost_of_steps(steps: Counter[Pair], delta: float | None) -> float:
    if delta is None:
        return math.inf if steps else 0.0
    with computing():
        return epsilon_of_steps(steps, delta)


def check_limits(ledger: VerifiedLedger) -> None:
    """Check that every charge, when it was made, fitted its asset's budget and its study's approval.

    Raises:
        LedgerError: the first charge that did not, with its line.
    """
    settled = {entry.body.charge_seq: entry.seq for entry in ledger.entries if isinstance(entry.body, Settle)}
    opened: dict[str, Open] = {}
    approved: dict[str, Approve] = {}
    assets: dict[str, list[Use]] = {}
    studies: dict[str, list[Use]] = {}
    for entry in ledger.entries:
        body = entry.body
        if isinstance(body, Open):
            opened[body.asset] = body
        elif isinstance(body, Approve):
            approved[body.study] = body
        elif isinstance(body, Charge):
            charge, until, budget = ledger.books.charges[entry.seq], settled.get(entry.seq), opened[body.asset]
            assets.setdefault(body.asset, []).append(Use.of(charge, until, limit_of(budget), budget.delta))
            allowed, delta = limit_of(approved[body.study]), study_delta(approved[body.study])
            use = Use.of(charge, until, allowed, budget.delta if delta is None else delta)
            studies.setdefault(body.study, []).append(use)
    found = [Fitting(uses).first_beyond(TOLERANCE) for uses in (*assets.values(), *studies.values())]
    beyond = [use.line for use in found if use is not None]
    if beyond:
        _refuse(ledger, min(beyond))


def _refuse(ledger: VerifiedLedger, line: int) -> None:
    """Raises LedgerError: the charge in that line went beyond a limit."""
    books = Books()
    for entry in ledger.entries[:line]:
        books.admit(entry)
    body = ledger.entries[line - 1].body
    assert isinstance(body, Charge)  # noqa: S101 - a use is of a charge
    opened, approval = books.assets[body.asset], books.decisions[body.study]
    assert isinstance(approval, Approve)  # noqa: S101 - the books admit no charge without one
    spending = asset_spending(books, body.asset)
    what, limit = f"the budget of asset {body.asset!r}", limit_of(opened)
    spent = cost(spending.events, opened.delta)
    if spent <= limit + TOLERANCE:
        what, limit = f"what was approved for study {body.name!r}", limit_of(approval)
        spent = cost_at(spending.study(body.study), study_delta(approval))
    why = f"round {body.round} was charged beyond {what}: ε {in_words(spent)} of {in_words(limit)}"
    raise LedgerError(why, line=line)


def cost_at(events: Sequence[Event], delta: float | None) -> float:
    """ε of a study's events at its δ; without privacy (None) infinity, once there are any."""
    if delta is None:
        return math.inf if events else 0.0
    return cost(events, delta)


def limit_of(written: Open | Approve) -> float:
    """ε that a budget or an approval allows."""
    return math.inf if written.epsilon is None else written.epsilon
