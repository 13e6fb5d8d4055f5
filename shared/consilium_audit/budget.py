"""What was spent, recomputed from the events of a verified ledger, and held against what was allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.ledger.chain import Books, Charged
from consilium_shared.ledger.entry import Approve, Charge, Open, Purpose, Refuse
from consilium_shared.ledger.spending import asset_spending
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.budget import in_words
from consilium_shared.privacy.event import Event, event_from_dict, really_run
from consilium_shared.privacy.plan import PrivacyPlan, plan_from_dict

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
TOLERANCE = 1e-6
"""In ε. The same sum on another machine may differ in its last digits."""


@dataclass(frozen=True)
class PurposeAccount:
    """What one study did to the asset for one purpose.

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
        unsettled: charges of rounds that count in full because nobody wrote down what ran. (The one for the number of
            patients always does.)
        purposes: training, evaluation and count, as far as anything was charged for them.
        refused: reason code to how often.
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


@dataclass(frozen=True)
class AssetAccount:
    """One asset's budget over its lifetime: everything composed at the budget's own δ."""

    asset: str
    epsilon: float
    delta: float
    limit: float
    studies: tuple[StudyAccount, ...]
    """Every study that was charged or approved, in the order of its first entry of that kind."""

    @property
    def left(self) -> float:
        """ε between what is spent and the limit, at least 0."""
        return math.inf if math.isinf(self.limit) else max(0.0, self.limit - self.epsilon)


@dataclass(frozen=True)
class SiteAccount:
    """One site's ledger, summed up.

    Attributes:
        refusals: (study's digest or None, reason code) to how often.
    """

    site: str
    entries: int
    assets: tuple[AssetAccount, ...]
    refusals: dict[tuple[str | None, str], int]

    def of_study(self, study: str) -> tuple[AssetAccount, StudyAccount] | None:
        """The account of a study's digest with that of its asset; None when it was never approved here."""
        found = ((asset, each) for asset in self.assets for each in asset.studies if each.study == study)
        return next(found, None)


def cost(events: Sequence[Event], delta: float) -> float:
    """ε of the events at ``delta``; raises LedgerError where the file's numbers allow none to be computed."""
    try:
        return epsilon(events, delta)
    except (ConfigurationError, ArithmeticError, ValueError) as error:
        raise LedgerError(f"no cost can be computed from its events: {error}") from error


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
    assets = []
    for name, opened in ledger.books.assets.items():
        charges = [each for each in ledger.books.charges.values() if each.body.asset == name]
        here = dict.fromkeys([each.body.study for each in charges])
        here |= dict.fromkeys(approval.study for approval in approvals.values() if approval.asset == name)
        assets.append(
            AssetAccount(
                asset=name,
                epsilon=cost(ran(charges), opened.delta),
                delta=opened.delta,
                limit=limit_of(opened),
                studies=tuple(
                    _study_account(approvals[study], [each for each in charges if each.body.study == study], refusals)
                    for study in here
                ),
            )
        )
    return SiteAccount(ledger.site, len(ledger.entries), tuple(assets), refusals)


def _study_account(
    approval: Approve, charges: Sequence[Charged], refusals: dict[tuple[str | None, str], int]
) -> StudyAccount:
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
        refused={reason: count for (study, reason), count in refusals.items() if study == approval.study},
    )


def ran(charges: Iterable[Charged]) -> list[Event]:
    """What was done for these charges: what ran, and in full what was never settled."""
    events = []
    for each in charges:
        event: Event | None = event_from_dict(each.body.event.model_dump())
        if each.settled is not None and event is not None:
            event = really_run(event, each.settled)
        if event is not None:
            events.append(event)
    return events


def study_delta(approval: Approve) -> float | None:
    """δ of the approved plan; None without privacy."""
    plan = plan_from_dict(approval.plan.model_dump())
    return plan.delta if isinstance(plan, PrivacyPlan) else None


def study_epsilons(ledger: VerifiedLedger, study: str, at: Iterable[int]) -> Iterator[tuple[int, float]]:
    """ε that a study had spent there when each of these entries was the last, in their order, at the study's δ."""
    wanted, books = set(at), Books()
    approval: Approve | None = None
    for entry in ledger.entries:
        books.admit(entry)
        if isinstance(entry.body, Approve) and entry.body.study == study:
            approval = entry.body
        if entry.seq in wanted and approval is not None:
            events = asset_spending(books, approval.asset).study(study)
            yield entry.seq, cost_at(events, study_delta(approval))


def check_limits(ledger: VerifiedLedger) -> None:
    """Every charge fitted the budget of its asset, and what was approved for its study, when it was made.

    Raises:
        LedgerError: the first charge that did not, with its line.
    """
    if _fits_in_full(ledger):
        return
    books = Books()
    for entry in ledger.entries:
        books.admit(entry)
        body = entry.body
        if not isinstance(body, Charge):
            continue
        opened, approval = books.assets[body.asset], books.decisions[body.study]
        assert isinstance(approval, Approve)  # noqa: S101 - the books admit no charge without one
        spending = asset_spending(books, body.asset)
        of_asset = cost(spending.events, opened.delta)
        of_study = cost_at(spending.study(body.study), study_delta(approval))
        for spent, limit, what in (
            (of_asset, limit_of(opened), f"the budget of asset {body.asset!r}"),
            (of_study, limit_of(approval), f"what was approved for study {body.name!r}"),
        ):
            if spent > limit + TOLERANCE:
                raise LedgerError(
                    f"round {body.round} was charged beyond {what}: ε {in_words(spent)} of {in_words(limit)}",
                    line=entry.seq,
                )


def _fits_in_full(ledger: VerifiedLedger) -> bool:
    """Whether even all charges together, as if everything had run, fit every limit that ever held.

    So it is in almost every ledger, and then nothing has to be composed charge by charge.
    """
    charged: dict[str, list[tuple[str, Event]]] = {}
    for each in ledger.books.charges.values():
        event = event_from_dict(each.body.event.model_dump())
        charged.setdefault(each.body.asset, []).append((each.body.study, event))
    for entry in ledger.entries:
        body = entry.body
        if isinstance(body, Open):
            events = [event for _, event in charged.get(body.asset, ())]
            if cost(events, body.delta) > limit_of(body):
                return False
        elif isinstance(body, Approve):
            events = [event for study, event in charged.get(body.asset, ()) if study == body.study]
            if cost_at(events, study_delta(body)) > limit_of(body):
                return False
    return True


def cost_at(events: Sequence[Event], delta: float | None) -> float:
    """ε of a study's events at its δ; without privacy (None) infinity, once there are any."""
    if delta is None:
        return math.inf if events else 0.0
    return cost(events, delta)


def limit_of(written: Open | Approve) -> float:
    """ε that a budget or an approval allows."""
    return math.inf if written.epsilon is None else written.epsilon
