"""The best round on the patients for validation is kept: by the records alone, so that everybody finds the same."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tests.support import studies

from consilium_shared import keeping
from consilium_shared.evaluation import Keep
from consilium_shared.keeping import Kept
from consilium_shared.split import counted_part
from consilium_shared.study import Study

RULE = Keep(metric="auroc", best="highest", patience=2)


def study(rounds: int = 8, keep: dict[str, Any] | None = None, **more: Any) -> Study:
    rule = {"metric": "auroc", "best": "highest", "patience": 2} if keep is None else keep
    evaluation = {"validation_fraction": 0.2, "keep": rule, **more.pop("evaluation", {})}
    return studies.study(training={"rounds": rounds}, evaluation=evaluation, **more)


def run(values: Sequence[float | None], rule: Keep = RULE) -> list[Kept | None]:
    """Best model after the evaluation of each round; None where an evaluation gave no metric."""
    found: list[Kept | None] = []
    for number, value in enumerate(values, start=1):
        metrics = None if value is None else {"auroc": value}
        found.append(keeping.kept(rule, found[-1] if found else None, number, f"{number:064x}", metrics))
    return found


def test_the_highest_or_the_lowest_is_kept_and_of_equals_the_first() -> None:
    values = [0.6, 0.7, 0.7, 0.65, 0.71]
    assert [best.round if best else 0 for best in run(values)] == [1, 2, 2, 2, 5]
    lowest = Keep(metric="auroc", best="lowest")
    assert [best.round if best else 0 for best in run(values, lowest)] == [1, 1, 1, 1, 1]
    last = run(values)[-1]
    assert last is not None and (last.value, last.model, last.worse) == (0.71, f"{5:064x}", 0)


def test_an_evaluation_that_tells_nothing_keeps_nothing_and_is_none_that_was_better() -> None:
    assert run([None, None]) == [None, None]
    assert [best and (best.round, best.worse) for best in run([None, 0.6, None, None])] == [
        None, (2, 0), (2, 1), (2, 2)]  # fmt: skip


def test_training_ends_when_patience_is_over_or_all_rounds_are_run() -> None:
    asked, best = study(), run([0.7, 0.6, 0.6])
    assert [keeping.ends(asked, number + 1, each) for number, each in enumerate(best, start=1)] == [False, False, True]
    assert keeping.ends(asked, 8, None)
    patient = study(keep={"metric": "auroc", "best": "highest"})
    assert not any(keeping.ends(patient, number, best[-1]) for number in range(1, 8))
    assert asked.may_end(3) and not asked.may_end(1) and not asked.may_end(9)
    assert [number for number in range(1, 10) if patient.may_end(number)] == [8]


@pytest.mark.parametrize(("every", "evaluated"), [(1, (1, 2, 3, 4, 5, 6, 7, 8)), (3, (1, 4, 7, 8)), (8, (7, 8))])
def test_each_round_that_may_be_kept_is_evaluated_before_the_last_counts(every: int, evaluated: tuple[int]) -> None:
    """So many evaluations the plan pays for: one more than there are candidates, of the model that was chosen."""
    assert study(evaluation={"every": every}).evaluated_rounds == evaluated


def test_counts_are_of_those_for_validation_until_the_choice_and_then_of_those_for_test() -> None:
    assert [counted_part(study(), last=last) for last in (False, True)] == ["validation", "test"]
    assert [counted_part(studies.study(), last=last) for last in (False, True)] == ["test", "test"]


def test_an_auditor_finds_from_the_records_what_the_coordinator_chose() -> None:
    def record(number: int, before: float | None) -> Any:
        told = None if before is None else {"auroc": before}
        return SimpleNamespace(round=number, model_before=f"{number - 1:064x}", metrics_before=told)

    records = [record(1, None), record(2, 0.6), record(3, 0.7), record(4, 0.65)]
    assert keeping.of_records(study(), records) == [None, *run([0.6, 0.7, 0.65])]
    assert keeping.of_records(studies.study(training={"rounds": 8}), records) == [None] * 4


def test_people_are_told_which_round_it_is_and_why() -> None:
    best = run([0.7, 0.6, 0.6])[-1]
    early = keeping.words(study(), best, 4)
    assert early.startswith("The model after round 1: its auroc on the patients for validation, 0.7, was the highest")
    assert "ended early, after round 4 of 8: 2 evaluations in a row were no better" in early
    assert "early" not in keeping.words(study(), best, 8)
    assert keeping.words(study(), None, 8).startswith("The model after round 8, the last: no evaluation")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluation": {"validation_fraction": None}}, "give validation_fraction"),
        ({"keep": {"metric": "loss", "best": "lowest"}}, "loss is none of evaluation.metrics"),
        ({"rounds": 1}, "two rounds or more"),
        ({"aggregation": {"weight_average": 0.5}}, "no aggregation.weight_average"),
        ({"privacy": {"epsilon": 1.0, "delta": 1e-4, "clipping_norm": 1.0}}, "with privacy an evaluation.epsilon"),
    ],
)
def test_a_choice_that_nothing_pays_for_or_that_cannot_be_made_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        study(**change)
