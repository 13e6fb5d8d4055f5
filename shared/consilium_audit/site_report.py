"""Report on one site's verified ledger: spent, approved, refused, released, measured. Every ε is recomputed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from consilium_audit.budget import AssetAccount, SiteAccount, account, ran
from consilium_audit.history import Moment, RoundPoint, asset_history, study_history
from consilium_audit.outflow import Outflow, outflow
from consilium_audit.participation import spans
from consilium_audit.payments import payments
from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.ledger.entry import Approve, Audit, DpSgdPlan, Open, Recover, Refuse, Reject, Release
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.accountants import side_by_side
from consilium_shared.privacy.canaries import CONFIDENCE, Bounds, Outcome, compare, contradiction
from consilium_shared.privacy.plan import Plan, PrivacyPlan, plan_from_dict
from consilium_shared.study import Study

MOST_STUDIES = 3
"""Studies whose curves are told beside the reported one's; all are in the asset's total and in the tables."""


@dataclass(frozen=True)
class Decision:
    """Somebody at the hospital said yes or no to a study."""

    time: str
    line: int
    study: str
    name: str
    what: Literal["approved", "rejected"]
    by: str
    epsilon: float | None
    """At most this ε; None without privacy, and where the answer was no."""
    says: str
    """The plan in words, or the reason."""


@dataclass(frozen=True)
class BudgetEntry:
    """A budget that held from this entry on. ``epsilon`` None: no limit."""

    time: str
    line: int
    asset: str
    epsilon: float | None
    delta: float
    reason: str
    change: Literal["opened", "raised", "lowered", "changed"]


@dataclass(frozen=True)
class Refusals:
    """Equal refusals, together."""

    study: str | None
    name: str | None
    reason: str
    detail: str
    count: int
    rounds: str
    first: str
    last: str


@dataclass(frozen=True)
class Released:
    """A message that left, as the ledger has it before it did."""

    time: str
    line: int
    study: str
    name: str | None
    round: int | None
    message: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Measured:
    """A canary audit of the study here: lower bounds of ε, beside what the plan's training is proven to keep.

    Of several audits it is the one that contradicts what is proven the most, or else the last.

    Attributes:
        audits: how many there are of this study in the ledger.
        last: whether this is the last of them, which closing and card name.
        of_plan: whether the audited plan is the one that was approved last.
        bounds: recomputed from the outcome, at the study's δ first and then at smaller ones, where as much is proven;
            empty when the outcome is none that there can be, or nothing private was approved.
        contradiction: where a measured bound exceeds the proven one, which only a defect explains; or None.
        confidence: of the bounds of all these audits together, so that running many proves no defect by chance.
    """

    audits: int
    last: bool
    time: str
    line: int
    by: str
    canaries: int
    guesses: int
    correct: int
    of_plan: bool
    bounds: tuple[Bounds, ...]
    contradiction: Bounds | None
    confidence: float


@dataclass(frozen=True)
class Compared:
    """Costs of the same events by independent accountants.

    Attributes:
        scope: this study, or the asset over its lifetime.
        accountants: name to ε.
    """

    scope: str
    delta: float
    charges: int
    accountants: dict[str, float]


@dataclass(frozen=True)
class SiteReport:
    """One site.

    Attributes:
        rounds: ε of the study by round.
        assets: ε of each asset by the calendar.
        torn: crashes that left an incomplete line, each kept in an entry.
    """

    site: str
    last: str
    torn: int
    account: SiteAccount
    rounds: tuple[RoundPoint, ...]
    assets: dict[str, tuple[Moment, ...]]
    decisions: tuple[Decision, ...]
    budgets: tuple[BudgetEntry, ...]
    refusals: tuple[Refusals, ...]
    releases: tuple[Released, ...]
    outflow: tuple[Outflow, ...]
    measured: Measured | None
    compared: tuple[Compared, ...]


def site_report(ledger: VerifiedLedger, study: Study) -> SiteReport:
    """Report of what the ledger tells; raises LedgerError when its numbers make no sense."""
    summed = account(ledger)
    found = summed.of_study(study.digest)
    return SiteReport(
        site=ledger.site,
        last=ledger.entries[-1].time if ledger.entries else "",
        torn=sum(isinstance(entry.body, Recover) for entry in ledger.entries),
        account=summed,
        rounds=study_history(ledger, study.digest),
        assets={each.asset: asset_history(ledger, each.asset, _shown(each, study)) for each in summed.assets},
        decisions=tuple(_decisions(ledger)),
        budgets=tuple(_budgets(ledger)),
        refusals=_refusals(ledger),
        releases=tuple(_releases(ledger)),
        outflow=outflow(ledger, study, None if found is None else found[1]),
        measured=_measured(ledger, study.digest),
        compared=tuple(_compared(ledger, summed, study)),
    )


def _shown(asset: AssetAccount, study: Study) -> set[str]:
    """The studies of an asset whose curves are told: the reported one, and those that cost most."""
    largest = sorted(asset.studies, key=lambda each: -each.epsilon)[:MOST_STUDIES]
    return {study.digest, *(each.study for each in largest)}


def _decisions(ledger: VerifiedLedger) -> Iterable[Decision]:
    for entry in ledger.entries:
        body = entry.body
        if isinstance(body, Approve):
            yield Decision(
                entry.time, entry.seq, body.study, body.name, "approved", body.by, body.epsilon, plan_in_words(body)
            )
        elif isinstance(body, Reject):
            yield Decision(entry.time, entry.seq, body.study, body.name, "rejected", body.by, None, body.reason)


def plan_in_words(approval: Approve) -> str:
    """Parts of the plan anybody may know: no number of patients, unless it is the noised one, nor the sampling rate."""
    plan = approval.plan
    length = f"{plan.rounds} rounds of {plan.steps_per_round} steps"
    if not isinstance(plan, DpSgdPlan):
        return f"{length}, without privacy"
    text = f"{length}, noise multiplier {plan.noise_multiplier:g}, clipping norm {plan.clipping_norm:g}"
    if plan.honest_sites > 1:
        text += (
            f"; that noise is shared by {plan.honest_sites} honest sites, beside {plan.colluding_sites} that may work "
            "against them"
        )
    if plan.evaluations and plan.evaluation_noise is not None:
        text += f"; {plan.evaluations} evaluations with noise multiplier {plan.evaluation_noise:g}"
    if plan.patients is not None:
        text += f"; number of patients with noise: {plan.patients}"
    return text


def _budgets(ledger: VerifiedLedger) -> Iterable[BudgetEntry]:
    before: dict[str, Open] = {}
    for entry in ledger.entries:
        body = entry.body
        if not isinstance(body, Open):
            continue
        old = before.get(body.asset)
        change: Literal["opened", "raised", "lowered", "changed"] = "opened"
        if old is not None:
            now, then = (float("inf") if each.epsilon is None else each.epsilon for each in (body, old))
            change = "raised" if now > then else "lowered" if now < then else "changed"
        yield BudgetEntry(entry.time, entry.seq, body.asset, body.epsilon, body.delta, body.reason, change)
        before[body.asset] = body


def _names(ledger: VerifiedLedger) -> dict[str, str]:
    """Study's digest to its name, as the ledger's decisions give it."""
    return {e.body.study: e.body.name for e in ledger.entries if isinstance(e.body, Approve | Reject)}


def _refusals(ledger: VerifiedLedger) -> tuple[Refusals, ...]:
    names = _names(ledger)
    grouped: dict[tuple[str | None, str, str], list[tuple[str, int | None]]] = {}
    for entry in ledger.entries:
        if isinstance(entry.body, Refuse):
            key = (entry.body.study, entry.body.reason, entry.body.detail)
            grouped.setdefault(key, []).append((entry.time, entry.body.round))
    return tuple(
        Refusals(
            study,
            None if study is None else names.get(study),
            reason,
            detail,
            len(seen),
            spans(sorted({number for _, number in seen if number is not None})),
            seen[0][0],
            seen[-1][0],
        )
        for (study, reason, detail), seen in grouped.items()
    )


def _releases(ledger: VerifiedLedger) -> Iterable[Released]:
    names = _names(ledger)
    for entry in ledger.entries:
        if isinstance(entry.body, Release):
            body = entry.body
            name = names.get(body.study)
            yield Released(entry.time, entry.seq, body.study, name, body.round, body.message, body.bytes, body.sha256)


def _measured(ledger: VerifiedLedger, study: str) -> Measured | None:
    found = [(e, e.body) for e in ledger.entries if isinstance(e.body, Audit) and e.body.study == study]
    approvals = [e.body for e in ledger.entries if isinstance(e.body, Approve) and e.body.study == study]
    if not found:
        return None
    plan = plan_from_dict(approvals[-1].plan.model_dump()) if approvals else None
    outcomes = {(body.canaries, body.guesses, body.correct) for _, body in found}
    bounds = {outcome: _bounds(outcome, plan, len(found)) for outcome in outcomes}

    def excess(place: int) -> tuple[float, int]:
        """Excess of the audit over what is proven; of equal ones the later."""
        _, body = found[place]
        over = [b.measured - b.proven for b in bounds[body.canaries, body.guesses, body.correct]]
        return max([0.0, *over]), place

    shown = max(range(len(found)), key=excess)
    entry, body = found[shown]
    own = bounds[body.canaries, body.guesses, body.correct]
    return Measured(
        audits=len(found),
        last=shown == len(found) - 1,
        time=entry.time,
        line=entry.seq,
        by=body.by,
        canaries=body.canaries,
        guesses=body.guesses,
        correct=body.correct,
        of_plan=plan is not None and canonical_digest(plan.to_dict()) == body.plan,
        bounds=own,
        contradiction=contradiction(own) if own else None,
        confidence=CONFIDENCE,
    )


def _bounds(outcome: tuple[int, int, int], plan: Plan | None, audits: int) -> tuple[Bounds, ...]:
    """Bounds of one of so many audits, each with its share of the error that all may have together (Bonferroni)."""
    if isinstance(plan, PrivacyPlan):
        with suppress(ConfigurationError):
            confidence = 1 - (1 - CONFIDENCE) / audits
            return compare(Outcome(*outcome), [plan.event(plan.rounds)], plan.delta, confidence)
    return ()


def _compared(ledger: VerifiedLedger, summed: SiteAccount, reported: Study) -> Iterable[Compared]:
    """Each asset over its lifetime, and the reported study, if it has privacy, by every accountant there is."""
    paid = payments(ledger).charges
    for asset in summed.assets:
        charges = [each for each in paid if each.body.asset == asset.asset]
        scopes = [(f"asset {asset.asset}, everything so far", asset.delta, charges)]
        for study in (each for each in asset.studies if each.study == reported.digest):
            own = [each for each in charges if each.body.study == study.study]
            if study.delta is not None and own:
                scopes.append((f"study {study.name}", study.delta, own))
        for scope, delta, those in scopes:
            try:
                yield Compared(scope, delta, len(those), side_by_side(ran(those), delta))
            except (ConfigurationError, ArithmeticError, ValueError) as error:
                raise LedgerError(f"no cost can be computed from the events of {scope}: {error}") from error
