"""Choice of the round whose model a study publishes, by a metric on the patients for validation.

After each opened sum the coordinator compares the model that the round began with against the best so far. The rule
reads nothing but the signed records' metrics, so a coordinator that starts anew chooses the same, and an auditor sees
that it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from consilium_shared.config import Strict
from consilium_shared.evaluation import Keep
from consilium_shared.fields import Hex32
from consilium_shared.study import Study


class Kept(Strict):
    """Best model so far.

    Attributes:
        round: after which it was.
        value: of the contract's metric on the patients for validation.
        model: SHA-256 of its bytes, the ``model_after`` of that round's record.
        worse: evaluations since, none of which was better.
    """

    round: int
    value: float
    model: Hex32
    worse: int = 0


def kept(rule: Keep, before: Kept | None, number: int, model: str, metrics: Mapping[str, Any] | None) -> Kept | None:
    """Best model once that of round ``number`` was evaluated; a tie stays with the earlier one.

    An evaluation without the metric (too few sites counted, or noise leaves every value open) changes nothing, but
    counts as one that was no better.

    >>> rule = Keep(metric="auroc", best="highest")
    >>> first = kept(rule, None, 1, "a" * 64, {"auroc": 0.7})
    >>> second = kept(rule, first, 2, "b" * 64, {"auroc": 0.7})
    >>> (second.round, second.worse) if second else None
    (1, 1)

    Args:
        rule: of the contract.
        before: the best one of the rounds before.
        number: of the round after which the model was.
        model: its SHA-256.
        metrics: of a record, or None.
    """
    value, sign = (metrics or {}).get(rule.metric), 1.0 if rule.best == "highest" else -1.0
    if isinstance(value, int | float) and (before is None or sign * value > sign * before.value):
        return Kept(round=number, value=float(value), model=model)
    return before and before.model_copy(update={"worse": before.worse + 1})


def of_records(study: Study, records: Iterable[Any]) -> list[Kept | None]:
    """Best model after each record of a study, recomputed from what the records say of the models before them.

    Args:
        study: with ``evaluation.keep``.
        records: ``RoundRecord`` of rounds 1, 2, …
    """
    rule, found, best = study.evaluation.keep, [], None
    for record in records:
        if rule is not None and record.round - 1 in study.evaluated_rounds:
            best = kept(rule, best, record.round - 1, record.model_before, record.metrics_before)
        found.append(best)
    return found


def ends(study: Study, number: int, best: Kept | None) -> bool:
    """True where no round comes after ``number``: it is the last, or patience is over."""
    rule = study.evaluation.keep
    patience = None if rule is None else rule.patience
    return number == study.training.rounds or (patience is not None and best is not None and best.worse >= patience)


def words(study: Study, best: Kept | None, rounds: int) -> str:
    """Sentence on which round's model was published, and why."""
    rule = study.evaluation.keep
    if rule is None or best is None:
        why = ": no evaluation on the patients for validation gave the metric that chooses" if rule else ""
        return f"The model after round {rounds}, the last{why}."
    early = (
        f" Training ended early, after round {rounds} of {study.training.rounds}: {best.worse} evaluations in a row "
        "were no better."
    )
    return (
        f"The model after round {best.round}: its {rule.metric} on the patients for validation, {best.value:.4g}, was "
        f"the {rule.best} of all evaluations." + (early if rounds < study.training.rounds else "")
    )
