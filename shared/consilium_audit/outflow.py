"""Data that left a site besides the model, and which charge paid for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from consilium_audit.budget import StudyAccount
from consilium_shared.ledger.entry import Approve, DpSgdPlan, Release
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.study import Study

Paid = Literal["charged", "not charged", "nothing to charge", "no guarantee"]

CONTENTLESS = {
    "short answers": (
        {"standing", "refusal", "closing"},
        "approved or pending, a refusal's code with a fixed sentence, a countersignature: nothing from a patient",
    ),
    "keys for secure sums": (
        {"advertised", "handshaken"},
        "public keys with the site's signature, secrets sealed to other sites: random numbers, nothing from a patient",
    ),
    "signatures on who is in a sum": ({"signed"}, "names of sites, signed: nothing from a patient"),
    "shares of masks": (
        {"shares"},
        "parts of the random numbers that hide what was summed; together they uncover the sum, and no site's own",
    ),
}
"""Messages with nothing that is computed from a patient's record, in plain words, and what is in them instead."""


@dataclass(frozen=True)
class Outflow:
    """One kind of thing that left a site in one study.

    Attributes:
        what: in words.
        messages: how many left with it.
        bytes: of these together.
        paid: whether a charge in the ledger covers it.
        by: which, or why there is none, in words.
        epsilon: of these charges alone, at the study's δ; None where there are none.
    """

    what: str
    messages: int
    bytes: int
    paid: Paid
    by: str
    epsilon: float | None = None


def outflow(ledger: VerifiedLedger, study: Study, spent: StudyAccount | None) -> tuple[Outflow, ...]:
    """Everything that left in this study, by kind; updates, counts and the number of patients in any case."""
    left: dict[str, list[Release]] = {}
    for entry in ledger.entries:
        if isinstance(entry.body, Release) and entry.body.study == study.digest:
            left.setdefault(entry.body.message, []).append(entry.body)
    updates, counts = left.pop("update", []), left.pop("counts", [])
    plan = _plan(ledger, study.digest)
    found = [
        _updates(updates, spent),
        _counts(updates, counts, spent, plan),
        _patients(updates, spent, plan),
    ]
    for what, (kinds, why) in CONTENTLESS.items():
        short = [each for kind in sorted(kinds & set(left)) for each in left.pop(kind)]
        found.append(Outflow(what, len(short), _size(short), "nothing to charge", why))
    for kind, messages in sorted(left.items()):
        why = "this program does not know the message and can say nothing about what it tells"
        found.append(Outflow(f"“{kind}”", len(messages), _size(messages), "not charged", why))
    return tuple(found)


def _updates(updates: Sequence[Release], spent: StudyAccount | None) -> Outflow:
    def row(paid: Paid, by: str, epsilon: float | None = None) -> Outflow:
        return Outflow("model updates, masked", len(updates), _size(updates), paid, by, epsilon)

    training = spent.purposes.get("training") if spent is not None else None
    if spent is not None and spent.delta is None:
        return row("no guarantee", "the study is without privacy: masks hide it, nothing bounds what the sum tells")
    if training is None:
        return row("not charged" if updates else "nothing to charge", "no charge for training is in the ledger")
    by = f"{training.charges} charges for training"
    again = sum(each.again for each in updates)
    if len(updates) - again > training.charges:
        return row("not charged", f"{len(updates) - again} updates left, but there are only {by}", training.epsilon)
    return row("charged", by + _again(again), training.epsilon)


def _counts(
    updates: Sequence[Release], alone: Sequence[Release], spent: StudyAccount | None, plan: DpSgdPlan | None
) -> Outflow:
    """Counts that updates carried, and counts that left in a message of their own, whose size alone is known."""
    counts = [*(each for each in updates if each.counts), *alone]

    def row(paid: Paid, by: str, epsilon: float | None = None) -> Outflow:
        return Outflow("evaluation counts, masked", len(counts), _size(alone), paid, by, epsilon)

    if not counts:
        return row("nothing to charge", "none left")
    if spent is not None and spent.delta is None:
        return row("no guarantee", "the study is without privacy: masked, without noise")
    evaluation = spent.purposes.get("evaluation") if spent is not None else None
    if evaluation is None or plan is None or plan.evaluation_noise is None:
        return row("not charged", "no charge for evaluation is in the ledger, or the approved plan has no noise for it")
    by = f"{evaluation.charges} charges for evaluation, noise multiplier {plan.evaluation_noise:g}"
    again = sum(each.again for each in counts)
    if evaluation.charges < len(counts) - again:
        why = f"counts left {len(counts) - again} times, but there are only {by}"
        return row("not charged", why, evaluation.epsilon)
    return row("charged", by + _again(again), evaluation.epsilon)


def _again(times: int) -> str:
    return f"; {times} times the same left again under other masks" if times else ""


def _patients(updates: Sequence[Release], spent: StudyAccount | None, plan: DpSgdPlan | None) -> Outflow:
    def row(paid: Paid, by: str, epsilon: float | None = None) -> Outflow:
        return Outflow("number of patients", len(updates), 0, paid, by, epsilon)

    if not updates:
        return row("nothing to charge", "no update left that could tell it")
    if spent is not None and spent.delta is None:
        return row("no guarantee", "the study is without privacy")
    count = spent.purposes.get("count") if spent is not None else None
    if count is not None and plan is not None and plan.count_noise is not None:
        return row(
            "charged", f"one number with noise of standard deviation {plan.count_noise:g} patients", count.epsilon
        )
    return row("not charged", "no charge for it is in the ledger, or the approved plan has no noise for it")


def _plan(ledger: VerifiedLedger, study: str) -> DpSgdPlan | None:
    """The approved plan, the last one; None without privacy or approval."""
    for entry in reversed(ledger.entries):
        if isinstance(entry.body, Approve) and entry.body.study == study:
            return entry.body.plan if isinstance(entry.body.plan, DpSgdPlan) else None
    return None


def _size(messages: Sequence[Release]) -> int:
    return sum(each.bytes for each in messages)
