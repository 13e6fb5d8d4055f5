"""What a site approved, charged and let leave is held against the contract, whatever its own plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
EVENTS = {
    "sampling_rate": ("training", "sampling_rate"),
    "noise_multiplier": ("training", "noise_multiplier"),
    "count_noise": ("count", "noise_multiplier"),
    "evaluation_noise": ("evaluation", "noise_multiplier"),
}
"""Fields of a plan, and the charges that follow it: their purpose, and the field of their event."""


def planned(evidence: Evidence, **changes: Any) -> Callable[[list[Line]], list[Line]]:
    """West approved another plan, and charged as it says: nothing where the plan has no noise."""

    def other(lines: list[Line]) -> list[Line]:
        gone = set()
        lines[evidence.seq_of("west", "approve") - 1][3]["plan"].update(changes)
        for number, _, kind, fields in lines:
            for name in changes.keys() & EVENTS.keys():
                purpose, which = EVENTS[name]
                if kind == "charge" and fields["purpose"] == purpose:
                    fields["event"][which] = changes[name]
                    gone |= {number} if changes[name] is None else set()
        kept = [line for line in lines if line[0] not in gone and line[3].get("charge_seq") not in gone]
        return evidence.moved(kept)  # type: ignore[no-any-return]

    return other


def noise_of(evidence: Evidence, name: str) -> float:
    plan = evidence.lines("west")[evidence.seq_of("west", "approve") - 1][3]["plan"]
    return float(plan[name])


# -- the plan


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampling_rate": 1e-6}, "sampling_rate is 1e-06"),
        ({"patients": 2000}, "sampling_rate is 0.05"),
        ({"patients": 20_000, "sampling_rate": 0.0025}, "no plan for the approved number of patients"),
        ({"noise_multiplier": 1.499}, "noise_multiplier is 1.499"),
        ({"noise_multiplier": 1.6}, "noise_multiplier is 1.6"),
        ({"count_noise": 11.0}, "count_noise is 11.0"),
        ({"evaluations": 0, "evaluation_noise": None}, "evaluation"),
        ({"evaluations": 2}, "evaluations is 2"),
        ({"patients": None, "count_noise": None}, "not what the study's contract says"),
        ({"records_per_patient": 2}, "records_per_patient is 2"),
    ],
    ids=str,
)
def test_a_plan_is_refused_that_the_contract_does_not_give(
    evidence: Evidence, changes: dict[str, Any], why: str
) -> None:
    evidence.rewrite("west", planned(evidence, **changes))
    assert why in evidence.fails(8, evidence.ledger("west"), evidence.seq_of("west", "approve"))


def test_calibrated_noise_may_be_more_and_a_thousandth_less(evidence: Evidence) -> None:
    asked = noise_of(evidence, "evaluation_noise")
    for noise in (asked - 0.001, asked + 1.0):
        evidence.rewrite("west", planned(evidence, evaluation_noise=noise))
        evidence.verified()
    evidence.rewrite("west", planned(evidence, evaluation_noise=asked - 0.003))
    evidence.fails(8, evidence.ledger("west"), evidence.seq_of("west", "approve"))


def test_noise_that_the_contract_leaves_to_calibration_is_calibrated_again(calibrated: Evidence) -> None:
    calibrated.verified()
    asked = noise_of(calibrated, "noise_multiplier")
    calibrated.rewrite("west", planned(calibrated, noise_multiplier=asked + 0.5))
    calibrated.verified()
    calibrated.rewrite("west", planned(calibrated, noise_multiplier=asked - 0.003))
    why = calibrated.fails(8, calibrated.ledger("west"), calibrated.seq_of("west", "approve"))
    assert f"noise_multiplier is {asked - 0.003}" in why


# -- the releases


def left_too(evidence: Evidence, after: str, number: int, *, charged: bool, same: bool = False) -> int:
    """Counts of round ``number`` leave West behind its ``after`` of that round; their line."""
    lines = evidence.lines("west")
    found = next(line for line in lines if line[2] == "release" and line[3]["message"] == after)
    at = lines.index(found) + 1
    assert found[3]["round"] == number
    counts = {**found[3], "message": "counts", "sha256": found[3]["sha256"] if same else "4" * 64}
    event = {"kind": "gaussian", "noise_multiplier": noise_of(evidence, "evaluation_noise")}
    before = [line for line in lines[:at] if line[2] == "charge" and line[3]["purpose"] == "evaluation"]
    about = {"purpose": "evaluation", "attempt": len(before) + 1, "event": event}
    charge = {**lines[evidence.charge_of("west", number) - 1][3], **about}
    new = [[*found[:2], "charge", charge]] if charged else []
    new.append([*found[:2], "release", counts])
    evidence.rewrite("west", lambda _: evidence.moved([*lines[:at], *new, *lines[at:]]))
    return at + len(new)


def test_counts_of_a_round_that_is_not_evaluated_are_found_although_charged(every_other: Evidence) -> None:
    every_other.verified()
    line = left_too(every_other, "update", 1, charged=True)
    assert "does not evaluate" in every_other.fails(8, every_other.ledger("west"), line)


@pytest.mark.parametrize(("charged", "same"), [(False, True), (False, False), (True, False)])
def test_counts_that_leave_twice_are_found(evidence: Evidence, charged: bool, same: bool) -> None:
    line = left_too(evidence, "counts", 1, charged=charged, same=same)
    assert "a second time" in evidence.fails(8, evidence.ledger("west"), line)


def test_counts_of_a_study_without_privacy_keep_its_schedule_too(without_privacy: Evidence) -> None:
    evidence = without_privacy

    def twice(lines: list[Line]) -> list[Line]:
        at = next(i for i, line in enumerate(lines) if line[2] == "release" and line[3]["message"] == "counts")
        return evidence.moved([*lines[: at + 1], lines[at], *lines[at + 1 :]])  # type: ignore[no-any-return]

    evidence.verified()
    evidence.rewrite("west", twice)
    assert "a second time" in evidence.fails(8, evidence.ledger("west"))


def test_another_number_of_patients_is_charged_again(evidence: Evidence) -> None:
    """Approved again at 1250 patients before round 3: their noised number is another release."""

    def again(lines: list[Line]) -> list[Line]:
        approved = lines[evidence.seq_of("west", "approve") - 1][3]
        more = {**approved, "plan": {**approved["plan"], "patients": 1250, "sampling_rate": 0.04}}
        at = evidence.charge_of("west", 3) - 1
        lines[at][3]["event"]["sampling_rate"] = 0.04
        return evidence.moved([*lines[:at], [lines[at - 1][0], lines[at][1], "approve", more], *lines[at:]])  # type: ignore[no-any-return]

    evidence.rewrite("west", again)
    why = evidence.fails(5, evidence.ledger("west"), evidence.seq_of("west", "approve", 1) + 1)
    assert "before the number of patients of its plan" in why


# -- what pays


@pytest.mark.parametrize(
    ("purpose", "step", "why"),
    [("count", 5, "before the number of patients of its plan"), ("evaluation", 8, "without a charge of their own")],
)
def test_what_is_noised_by_the_plan_and_not_charged_is_found(
    evidence: Evidence, purpose: str, step: int, why: str
) -> None:
    def free_of_charge(lines: list[Line]) -> list[Line]:
        gone = next(line[0] for line in lines if line[2] == "charge" and line[3].get("purpose") == purpose)
        kept = [line for line in lines if line[0] != gone and line[3].get("charge_seq") != gone]
        return evidence.moved(kept)  # type: ignore[no-any-return]

    evidence.rewrite("west", free_of_charge)
    assert why in evidence.fails(step, evidence.ledger("west"))


@pytest.mark.parametrize("purpose", ["count", "evaluation"])
def test_a_charge_for_a_noised_release_that_is_given_back_is_found(evidence: Evidence, purpose: str) -> None:
    def given_back(lines: list[Line]) -> list[Line]:
        charged = next(line[0] for line in lines if line[2] == "charge" and line[3].get("purpose") == purpose)
        kept = [line for line in lines if line[3].get("charge_seq") != charged]
        settled = [*kept[-1][:2], "settle", {"charge_seq": charged, "steps": 0}]
        return evidence.moved([*kept[:-1], settled, kept[-1]])  # type: ignore[no-any-return]

    evidence.rewrite("west", given_back)
    assert "0 of 1 steps" in evidence.fails(8, evidence.ledger("west"))
