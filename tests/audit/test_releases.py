"""What a site approved, charged and let leave is held against the contract, whatever its own plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.audit.conftest import PRIVATE, a_federation, a_study

from consilium_audit.evidence import VerificationFailed
from consilium_shared.study import Study

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
        return evidence.moved(kept)

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


@pytest.mark.parametrize("roster", [None, "0" * 64])
def test_an_approval_of_another_roster_or_of_none_is_found(evidence: Evidence, roster: str | None) -> None:
    def other(lines: list[Line]) -> list[Line]:
        lines[evidence.seq_of("west", "approve") - 1][3]["roster"] = roster
        return lines

    evidence.rewrite("west", other)
    assert "another roster" in evidence.fails(8, evidence.ledger("west"), evidence.seq_of("west", "approve"))


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


def left_too(evidence: Evidence, message: str, number: int, /, *, charged: tuple[str, ...] = (), **said: Any) -> int:
    """Behind West's ``message`` of round ``number`` leaves another such, of which the ledger says ``said``; its line.

    ``charged``: what is charged anew before it, as for the first one.
    """
    lines = evidence.lines("west")
    found = next(line for line in lines if (line[3].get("message"), line[3].get("round")) == (message, number))
    at = lines.index(found) + 1
    of = {"training": number, "evaluation": number - (message == "update")}
    new = []
    for purpose in charged:
        charge = lines[evidence.charge_of("west", of[purpose], purpose) - 1][3]
        new.append([*found[:2], "charge", {**charge, "attempt": 2}])
    new.append([*found[:2], "release", {**found[3], "sha256": "4" * 64, **said}])
    evidence.rewrite("west", lambda _: evidence.moved([*lines[:at], *new, *lines[at:]]))
    return at + len(new)


@pytest.mark.parametrize(
    ("message", "number", "charged", "why"),
    [
        ("update", 1, (), "the update of round 1 left without a charge"),
        ("update", 3, ("evaluation",), "the update of round 3 left without a charge"),
        ("counts", 3, (), "the counts of round 3 left without a charge"),
    ],
)
def test_what_leaves_twice_is_charged_twice(
    evidence: Evidence, message: str, number: int, charged: tuple[str, ...], why: str
) -> None:
    line = left_too(evidence, message, number, charged=charged)
    assert why in evidence.fails(8, evidence.ledger("west"), line)


def test_counts_that_ride_on_an_update_have_a_charge_of_their_own(of_four: Callable[[int], Evidence]) -> None:
    line = left_too(evidence := of_four(2), "update", 2, charged=("training",))
    assert "the counts of round 1 left without" in evidence.fails(8, evidence.ledger("west"), line)


def test_a_round_that_is_trained_anew_on_a_charge_of_its_own_is_paid(of_four: Callable[[int], Evidence]) -> None:
    left_too(evidence := of_four(2), "update", 2, charged=("training", "evaluation"))
    evidence.fails(9)  # what was charged is more than the records state: nothing else is wrong


@pytest.mark.parametrize(("message", "number"), [("update", 3), ("counts", 3)])
def test_the_same_once_more_under_other_masks_needs_no_charge(evidence: Evidence, message: str, number: int) -> None:
    left_too(evidence, message, number, again=True)
    evidence.verified()


def test_what_is_the_same_once_more_was_there_before(repeated: Evidence) -> None:
    def forgotten(lines: list[Line]) -> list[Line]:
        first = next(line for line in lines if line[3].get("message") == "update")
        assert "again" not in first[3]
        return repeated.moved([line for line in lines if line is not first])

    repeated.verified()
    repeated.rewrite("west", forgotten)
    assert "the update of round 1 left again, but not before" in repeated.fails(8, repeated.ledger("west"))


def test_what_is_the_same_once_more_may_leave_without_its_counts(evidence: Evidence) -> None:
    """Where too few of the others add theirs."""
    left_too(evidence, "update", 3, again=True, counts=False)
    evidence.verified()


@pytest.mark.parametrize("charged", [True, False])
def test_counts_that_leave_only_with_the_second_attempt_are_charged(repeated: Evidence, charged: bool) -> None:
    gone = None if charged else repeated.charge_of("west", 1, "evaluation")

    def later(lines: list[Line]) -> list[Line]:
        del next(line for line in lines if line[3].get("counts"))[3]["counts"]
        kept = [line for line in lines if gone is None or gone not in (line[0], line[3].get("charge_seq"))]
        return repeated.moved(kept)

    repeated.rewrite("west", later)
    if charged:
        repeated.verified()
    else:
        assert "the counts of round 1 left without" in repeated.fails(8, repeated.ledger("west"))


def test_counts_of_a_round_that_is_not_evaluated_are_found(every_other: Evidence) -> None:
    def carries(lines: list[Line]) -> list[Line]:
        updates = [fields for _, _, kind, fields in lines if kind == "release" and fields["message"] == "update"]
        next(fields for fields in updates if fields["round"] == 2)["counts"] = True
        return lines

    every_other.verified()
    every_other.rewrite("north", carries)
    assert "does not evaluate" in every_other.fails(8, every_other.ledger("north"))


def test_counts_leave_by_themselves_after_the_last_round_alone(evidence: Evidence) -> None:
    line = left_too(evidence, "update", 1, message="counts")
    assert "in a sum of their own" in evidence.fails(8, evidence.ledger("west"), line)


def test_counts_of_a_study_without_privacy_are_charged_too(without_privacy: Evidence) -> None:
    without_privacy.verified()
    line = left_too(without_privacy, "counts", 3)
    assert "without a charge" in without_privacy.fails(8, without_privacy.ledger("west"), line)


def test_another_number_of_patients_is_charged_again(evidence: Evidence) -> None:
    """Approved again at 1250 patients before round 3: their noised number is another release."""

    def again(lines: list[Line]) -> list[Line]:
        approved = lines[evidence.seq_of("west", "approve") - 1][3]
        more = {**approved, "plan": {**approved["plan"], "patients": 1250, "sampling_rate": 0.04}}
        at = evidence.charge_of("west", 3) - 1
        lines[at][3]["event"]["sampling_rate"] = 0.04
        return evidence.moved([*lines[:at], [lines[at - 1][0], lines[at][1], "approve", more], *lines[at:]])

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
        return evidence.moved(kept)

    evidence.rewrite("west", free_of_charge)
    assert why in evidence.fails(step, evidence.ledger("west"))


@pytest.mark.parametrize("purpose", ["count", "evaluation"])
def test_a_charge_for_a_noised_release_that_is_given_back_is_found(evidence: Evidence, purpose: str) -> None:
    def given_back(lines: list[Line]) -> list[Line]:
        charged = next(line[0] for line in lines if line[2] == "charge" and line[3].get("purpose") == purpose)
        kept = [line for line in lines if line[3].get("charge_seq") != charged]
        settled = [*kept[-1][:2], "settle", {"charge_seq": charged, "steps": 0}]
        return evidence.moved([*kept[:-1], settled, kept[-1]])

    evidence.rewrite("west", given_back)
    assert "0 of 1 steps" in evidence.fails(8, evidence.ledger("west"))


# -- sums that are one private step each


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    contract = a_study(PRIVATE).contract
    contract["training"] |= {"steps_per_round": 1, "expected_batch": 1200}
    contract["privacy"] |= {"sums": {"sampling_rate": 0.25}, "noise_multiplier": 6.0}
    return a_federation(tmp_path_factory.mktemp("summed") / "f", Study.model_validate(contract))


def test_a_study_of_private_sums_is_verified_without_any_number_of_patients(summed: Evidence, tmp_path: Path) -> None:
    found = summed.copy(tmp_path / "faithful")
    found.verified()
    plan = found.lines("west")[found.seq_of("west", "approve") - 1][3]["plan"]
    assert plan["patients"] is None and plan["noise_multiplier"] == 6.0


@pytest.mark.parametrize(
    ("changes", "step", "why"),
    [
        ({"noise_multiplier": 5.9}, 8, "noise_multiplier is 5.9"),
        ({"sampling_rate": 0.2}, 8, "sampling_rate is 0.2"),
        ({"patients": 1000, "count_noise": 10.0}, 5, "before the number of patients"),
    ],
)
def test_a_site_that_has_less_noise_in_its_sums_than_the_others_is_found(
    summed: Evidence, tmp_path: Path, changes: dict[str, Any], step: int, why: str
) -> None:
    found = summed.copy(tmp_path / "evidence")
    found.rewrite("west", planned(found, **changes))
    assert why in found.fails(step)


def test_a_charge_of_less_than_the_contracts_step_is_found(summed: Evidence, tmp_path: Path) -> None:
    found = summed.copy(tmp_path / "evidence")
    line = found.charge_of("west", 1)

    def cheaper(lines: list[Line]) -> list[Line]:
        lines[line - 1][3]["event"]["noise_multiplier"] = 60.0
        return lines

    found.rewrite("west", cheaper)
    with pytest.raises(VerificationFailed):
        found.verified()
