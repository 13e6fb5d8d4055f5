"""Splits of patients are stable: a part follows from the contract and the patient alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.support import studies

from consilium_shared.errors import PeerError
from consilium_shared.evaluation import Evaluation
from consilium_shared.split import part_of, share_for_test
from consilium_shared.study import Study

NAMES = [f"p{number}" for number in range(4000)]
VALIDATED = Evaluation(split=0.2, validation_fraction=0.25)


def parts(**evaluation: Any) -> dict[str, str]:
    study = studies.study(evaluation=evaluation)
    return {name: part_of(study, name) for name in NAMES}


def test_a_validation_part_is_taken_from_those_who_would_be_trained_on() -> None:
    two, three = parts(split=0.2), parts(split=0.2, validation_fraction=0.25)
    assert {name for name in NAMES if two[name] == "test"} == {name for name in NAMES if three[name] == "test"}
    counts = Counter(three.values())
    # Standard deviations: 25 of 800 for test, 26 of 800 for validation.
    assert abs(counts["test"] - 800) < 100
    assert abs(counts["validation"] - 800) < 100
    assert counts["train"] == 4000 - counts["test"] - counts["validation"]


def test_a_larger_fraction_only_adds_patients() -> None:
    less, more = parts(split=0.1, validation_fraction=0.1), parts(split=0.3, validation_fraction=0.1)
    assert all(more[name] == "test" for name in NAMES if less[name] == "test")
    more = parts(split=0.1, validation_fraction=0.3)
    assert all(more[name] == less[name] for name in NAMES if less[name] != "train")


def test_another_label_draws_both_parts_anew() -> None:
    one, other = parts(split=0.2, validation_fraction=0.25), parts(split=0.2, validation_fraction=0.25, split_label="b")
    for part in ("test", "validation"):
        both = sum(one[name] == other[name] == part for name in NAMES)
        assert 90 < both < 240  # .04 of 4000 is 160, of a standard deviation of 12


def test_a_column_says_who_is_for_test_and_the_hash_who_of_the_others_is_for_validation() -> None:
    study = studies.study(evaluation={"split": None, "split_column": "part", "validation_fraction": 0.25})
    assert all(part_of(study, name, in_test=True) == "test" for name in NAMES[:50])
    counts = Counter(part_of(study, name, in_test=False) for name in NAMES)
    assert counts["test"] == 0
    assert 850 < counts["validation"] < 1150


def test_the_expected_share_of_test_is_what_the_draws_give() -> None:
    counts = Counter(parts(split=0.2, validation_fraction=0.25).values())
    assert share_for_test(VALIDATED) == pytest.approx(counts["test"] / (counts["test"] + counts["train"]), abs=0.03)
    assert share_for_test(Evaluation(split=0.3)) == pytest.approx(0.3)
    assert share_for_test(Evaluation(split=None, split_column="part")) is None


def test_a_contract_of_schema_1_has_no_validation_part() -> None:
    contract = studies.study().contract
    assert contract["evaluation"]["validation_fraction"] is None  # written out: no meaning rests on the reader
    old = {**contract, "schema_version": 1, "evaluation": {**contract["evaluation"], "validation_fraction": 0.2}}
    with pytest.raises(PeerError):
        Study.from_contract(old)
