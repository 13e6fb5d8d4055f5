"""No settlement is believed that the same ledger contradicts, in whatever study."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from consilium_audit import cli
from consilium_audit.budget import account
from consilium_audit.payments import payments
from consilium_shared.identity import Identity
from consilium_shared.ledger.chain import genesis
from consilium_shared.ledger.entry import line_digest, make_body, sign_entry
from consilium_shared.ledger.verify import VerifiedLedger, verify_ledger
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import DpSgdEvent, GaussianEvent
from consilium_shared.privacy.plan import PrivacyPlan

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
FALLS = "b" * 64
"""The other study in North's ledger: two steps charged and run, and nothing left."""
Entries = list[tuple[str, dict[str, Any]]]


def in_north(evidence: Evidence, steps: int, *, after: str) -> int:
    """An update of the other study leaves behind its ``after``, and its charge is settled with ``steps``; the line."""
    lines = evidence.lines("north")
    at = next(line for line in lines if line[2] == after and (after == "settle" or line[3].get("study") == FALLS))
    assert after == "charge" or at[3]["steps"] == 2
    release = {"study": FALLS, "round": 1, "message": "update", "sha256": "4" * 64, "bytes": 900}

    def edit(lines: list[Line]) -> list[Line]:
        place = next(i for i, line in enumerate(lines) if line[0] == at[0])
        next(line for line in lines[place:] if line[2] == "settle")[3]["steps"] = steps
        return evidence.moved([*lines[: place + 1], [at[0], at[1], "release", release], *lines[place + 1 :]])

    evidence.rewrite("north", edit)
    return int(next(line[0] for line in evidence.lines("north") if line[2] == "settle"))


@pytest.mark.parametrize("after", ["charge", "settle"])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_charge_of_another_study_that_is_given_back_although_its_update_left_is_found(
    evidence: Evidence,
    steps: int,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settled = in_north(evidence, steps, after=after)
    why = evidence.fails(8, evidence.ledger("north"), settled)
    assert "study falls" in why and f"settled with {steps} of 2 steps, but what it paid for left" in why
    monkeypatch.setattr(sys, "argv", ["consilium-audit", "budget", str(evidence.root), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 6
    assert [each["line"] for each in told["north"]["contradictions"]] == [settled] and not told["south"][
        "contradictions"
    ]


def test_the_same_update_after_a_full_settlement_is_as_it_should_be(evidence: Evidence) -> None:
    in_north(evidence, 2, after="settle")
    assert len(evidence.verified().steps) == 10


def test_a_charge_of_another_study_may_be_given_back_when_nothing_left(evidence: Evidence) -> None:
    def unrun(lines: list[Line]) -> list[Line]:
        next(line for line in lines if line[2] == "settle")[3]["steps"] = 0
        return lines

    evidence.rewrite("north", unrun)
    assert len(evidence.verified().steps) == 10


# -- by itself


def ledger(*said: tuple[str, dict[str, Any]]) -> VerifiedLedger:
    """A site's ledger with an asset, one approved study, and then these entries."""
    counted = {"patients": 1000, "count_noise": 10.0, "evaluations": 2, "evaluation_noise": 5.0}
    plan = PrivacyPlan(0.05, 1.0, 1.5, 3, 4, 1e-4, 3.0, **counted)  # type: ignore[arg-type]
    approve = {"study": FALLS, "name": "falls", "asset": "icu", "epsilon": 3.0, "by": "Dr Ono", "plan": plan.to_dict()}
    opened = {"asset": "icu", "unit": "patient", "epsilon": 8.0, "delta": 1e-4, "policy": "1" * 64, "reason": ""}
    key = Identity.generate()
    prev, data = genesis("north", key.public).sha256, b""
    entries: Entries = [("open", opened), ("approve", {**approve, "roster": None}), *said]
    for number, (kind, fields) in enumerate(entries, start=1):
        line = sign_entry(number, "2026-11-30T10:00:00.000Z", make_body(kind, fields), prev, key).line()
        prev, data = line_digest(line), data + line + b"\n"
    return verify_ledger(data, "north", key.public)


def charge(purpose: str, number: int, attempt: int = 1) -> tuple[str, dict[str, Any]]:
    event: dict[str, Any] = {"kind": "gaussian", "noise_multiplier": 10.0 if purpose == "count" else 5.0}
    if purpose == "training":
        event = {"kind": "dp-sgd", "sampling_rate": 0.05, "noise_multiplier": 1.5, "steps": 3}
    about = {"study": FALLS, "name": "falls", "asset": "icu", "round": number, "attempt": attempt, "purpose": purpose}
    return "charge", {**about, "event": event, "delta": 1e-4, "epsilon_after": 1.0}


def settle(line: int, steps: int) -> tuple[str, dict[str, Any]]:
    return "settle", {"charge_seq": line, "steps": steps}


def left(message: str, number: int, **said: bool) -> tuple[str, dict[str, Any]]:
    return "release", {"study": FALLS, "round": number, "message": message, "sha256": "4" * 64, "bytes": 9, **said}


COUNT, TRAINING, EVALUATION = charge("count", 0), charge("training", 1), charge("evaluation", 1)
ALL = (GaussianEvent(10.0), DpSgdEvent(0.05, 1.5, 3), GaussianEvent(5.0))


@pytest.mark.parametrize(
    ("said", "line", "why"),
    [
        ((COUNT, TRAINING, settle(4, 2), left("update", 1)), 5, "line 4 is settled with 2 of 3 steps"),
        ((COUNT, TRAINING, left("update", 1), settle(3, 0)), 6, "line 3 is settled with 0 of 1 steps"),
        ((COUNT, EVALUATION, settle(4, 0), left("counts", 1)), 5, "line 4 is settled with 0 of 1 steps"),
        ((COUNT, left("update", 1)), 4, "the update of round 1 left without a charge"),
        ((COUNT, TRAINING, left("update", 1), left("update", 1)), 6, "the update of round 1 left without a charge"),
        ((COUNT, TRAINING, left("update", 2)), 5, "the update of round 2 left without a charge"),
        ((COUNT, charge("training", 2), left("update", 2, counts=True)), 5, "the counts of round 1 left without"),
        ((COUNT, left("update", 1, again=True)), 4, "left again, but not before"),
    ],
)
def test_what_a_ledger_says_against_itself_is_named_with_study_and_line(
    said: tuple[Any, ...], line: int, why: str
) -> None:
    (found,) = payments(ledger(*said)).contradictions
    assert (found.line, found.study) == (line, FALLS)
    assert str(found).startswith("study falls: ") and why in found.why


def test_what_is_contradicted_counts_in_full() -> None:
    honest = (COUNT, TRAINING, EVALUATION, left("update", 1), left("counts", 1), settle(4, 3), settle(5, 1))
    lying = (COUNT, TRAINING, EVALUATION, left("update", 1), left("counts", 1), settle(4, 0), settle(5, 0))
    unused = (COUNT, TRAINING, EVALUATION, settle(4, 0), settle(5, 0))
    for entries, events, contradictions in ((honest, ALL, 0), (lying, ALL, 2), (unused, ALL[:1], 0)):
        told = account(ledger(*entries))
        assert told.assets[0].epsilon == epsilon(events, 1e-4)
        assert told.assets[0].studies[0].epsilon == epsilon(events, 1e-4)
        assert len(told.contradictions) == contradictions
