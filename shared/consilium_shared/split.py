"""Split of patients into three parts: those to train on, for validation, and for test.

A part follows from the contract and the patient alone: whoever was there before stays where they were when others come
or go, as the privacy guarantee needs, and two sites (or a pooled copy) that know the same patient agree.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilium_shared.evaluation import Evaluation
    from consilium_shared.study import Study

Part = Literal["train", "validation", "test"]


def part_of(study: Study, patient: str, in_test: bool | None = None) -> Part:
    """Part of one patient, in which all of the patient's records are.

    The two draws do not depend on each other: a contract with a validation part has the same patients for test as the
    same contract without one, and takes the part from those it would train on.

    Args:
        study: the contract, whose ``evaluation`` says the fractions and the key of the hash.
        patient: identifier, in its one spelling.
        in_test: whether the study's ``split_column`` says test; None where the study has none.
    """
    rules = study.evaluation
    key = rules.split_label or study.study
    if drawn("split", key, patient, rules.split or 0.0) if in_test is None else in_test:
        return "test"
    return "validation" if drawn("validation", key, patient, rules.validation_fraction or 0.0) else "train"


def counted_part(study: Study, *, last: bool) -> Part:
    """Part of whom evaluation counts are: for test, but where a round is chosen those for validation, until then.

    Args:
        study: the contract.
        last: whether it is the count of the model that is published, after the last round.
    """
    return "test" if last or study.evaluation.keep is None else "validation"


def share_for(rules: Evaluation, part: Part) -> float | None:
    """Expected share of patients for test, or for validation, among those and the ones to train on."""
    return share_for_test(rules) if part == "test" else rules.validation_fraction


def share_for_test(rules: Evaluation) -> float | None:
    """Expected share of patients for test among those for training and test; None where a column of each site says it.

    With a split of a fifth and a validation part of a quarter, 60 of 100 patients are trained on and 20 for test:

    >>> from consilium_shared.evaluation import Evaluation
    >>> share_for_test(Evaluation(split=0.2, validation_fraction=0.25))
    0.25
    """
    if rules.split is None:
        return None
    train = (1 - rules.split) * (1 - (rules.validation_fraction or 0.0))
    return rules.split / (rules.split + train)


def drawn(purpose: str, key: str, patient: str, fraction: float) -> bool:
    """True where SHA-256 of purpose, key and patient, read as a number in [0, 1), is below ``fraction``.

    The key is the contract's ``split_label``, which is one word in all studies that say nothing else: whoever was
    held back once is held back from the next study too. The coordinator may choose another, and with it, blindly, who
    is held back: it knows no identifiers, but each new label draws a new part of the same patients. What their counts
    tell adds up over studies; the site's people see every study before any of them.
    """
    digest = hashlib.sha256(f"consilium {purpose}\0{key}\0".encode() + patient.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64
