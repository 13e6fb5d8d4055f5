"""Every way of cheating is found, at its step, at the file and the line that show it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilium_audit.evidence import VerificationFailed
from consilium_shared.canonical import canonical_bytes, canonical_digest
from consilium_shared.errors import ConfigurationError
from consilium_shared.identity import Identity
from consilium_shared.privacy.accountant import calibrate_noise, epsilon
from consilium_shared.privacy.event import DpSgdEvent, GaussianEvent
from consilium_shared.protocol import roster as rosters
from consilium_shared.protocol.records import CARD_DOMAIN, RECORD_DOMAIN

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
SITES = ("north", "south", "west")
ROUNDS = 3


# -- who signs


def test_another_coordinator_is_found(evidence: Evidence) -> None:
    other = Identity.generate()
    (evidence.root / "coordinator.json").write_text(json.dumps({"coordinator": other.public.hex()}))
    evidence.fails(1, evidence.root / "roster.json")


def test_a_coordinator_who_signs_everything_anew_is_found_by_the_fingerprint_alone(evidence: Evidence) -> None:
    expected, other = evidence.coordinator.public.fingerprint, Identity.generate()
    (evidence.root / "coordinator.json").write_text(json.dumps({"coordinator": other.public.hex()}))
    forged = replace(evidence, coordinator=other)
    forged.reseal(evidence.root / "roster.json", rosters.DOMAIN)
    forged.reseal(evidence.root / "card.json", CARD_DOMAIN)
    forged.resign()  # and every hospital is in it: nobody else could sign the records
    assert "compared with nothing" in forged.verified().open[0]
    with pytest.raises(VerificationFailed) as caught:
        forged.verified(expected)
    assert (caught.value.step, caught.value.file.name) == (1, "coordinator.json")
    with pytest.raises(ConfigurationError, match="32 hex digits"):
        forged.verified("b84d")


def test_an_edited_or_missing_record_is_found(evidence: Evidence) -> None:
    original = evidence.record(2).read_bytes()
    evidence.record(2).write_bytes(original.replace(b'"seconds": 1.5', b'"seconds": 2.5'))
    evidence.fails(2, evidence.record(2))
    evidence.record(2).unlink()
    assert "round 2" in evidence.fails(2, evidence.record(3))
    evidence.record(3).rename(evidence.record(2))
    evidence.fails(2, evidence.record(2))
    evidence.record(2).unlink()
    evidence.fails(4)


def test_a_last_record_that_is_missing_is_found_by_what_the_sites_hold(evidence: Evidence) -> None:
    evidence.record(3).unlink()
    assert "the records end with round 2" in evidence.fails(4, evidence.closing("north"))
    shutil.rmtree(evidence.root / "closing")
    assert "the records end with round 2" in evidence.fails(7, evidence.ledger("north"))


def test_a_last_record_that_is_missing_is_found_by_the_card_when_no_ledger_is_there(evidence: Evidence) -> None:
    evidence.record(3).unlink()
    shutil.rmtree(evidence.root / "closing")
    for site in SITES:
        evidence.ledger(site).unlink()
    evidence.fails(10, evidence.root / "card.json")


def test_records_of_something_else_are_found_although_signed(evidence: Evidence) -> None:
    faithful = evidence.record(2).read_bytes()
    for changes in ({"study": "0" * 64}, {"roster": "0" * 64}, {"federation": "0" * 64}, {"round": 3}):
        evidence.reseal(evidence.record(2), RECORD_DOMAIN, **changes)
        evidence.fails(2, evidence.record(2))
        evidence.record(2).write_bytes(faithful)
    body = evidence.body(evidence.record(2))
    stranger = {part: {**body[part], "east": body[part]["north"]} for part in ("epsilon", "heads", "answers")}
    evidence.reseal(evidence.record(2), RECORD_DOMAIN, participants=["east", "north", "south"], **stranger)
    assert "east took part" in evidence.fails(2, evidence.record(2))
    alone = {part: {"north": body[part]["north"]} for part in ("epsilon", "heads", "answers")}
    evidence.reseal(evidence.record(2), RECORD_DOMAIN, participants=["north"], **alone)
    assert "fewer than" in evidence.fails(2, evidence.record(2))


@pytest.mark.parametrize(
    ("changes", "whom"),
    [
        ({"away": {}}, "west"),
        ({"refused": {"west": ["data", "no file"]}}, "west"),
        ({"away": {"west": "offline", "north": "offline"}}, "north"),
        ({"away": {"west": "offline", "east": "offline"}}, "east"),
        ({"away": {"east": "offline"}}, "east, west"),
    ],
)
def test_a_record_that_does_not_name_every_site_once_is_found(
    evidence: Evidence, changes: dict[str, Any], whom: str
) -> None:
    """West was away in round 2, and the coordinator would rather not say so, or say it twice."""
    evidence.reseal(evidence.record(2), RECORD_DOMAIN, **changes)
    assert f"{whom}: every site of the roster" in evidence.fails(2, evidence.record(2))


def test_a_round_that_began_with_another_model_is_found(evidence: Evidence) -> None:
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, model_before="0" * 64)
    evidence.fails(3, evidence.record(3))


def test_a_contract_that_nobody_approved_is_found(evidence: Evidence) -> None:
    contract = json.loads((evidence.root / "contract.json").read_bytes())
    contract["version"] = 2
    (evidence.root / "contract.json").write_text(json.dumps(contract))
    evidence.fails(1, evidence.root / "contract.json")
    (evidence.root / "contract.json").write_bytes(canonical_bytes(contract))
    evidence.fails(2, evidence.record(1))


# -- the ledgers


@pytest.mark.parametrize("site", SITES)
def test_every_line_that_is_removed_is_found(evidence: Evidence, site: str) -> None:
    file = evidence.ledger(site)
    lines = file.read_bytes().splitlines(keepends=True)
    for index in range(len(lines)):
        file.write_bytes(b"".join(lines[:index] + lines[index + 1 :]))
        if index + 1 < len(lines):
            evidence.fails(5, file, index + 1)
        else:
            evidence.fails(8, file)  # the last: a closing that never left


@pytest.mark.parametrize("site", SITES)
def test_every_tail_that_is_cut_off_is_found(evidence: Evidence, site: str) -> None:
    file = evidence.ledger(site)
    lines = file.read_bytes().splitlines(keepends=True)
    last_head = len(lines) - 1  # its own, in its closing
    for kept in range(len(lines)):
        file.write_bytes(b"".join(lines[:kept]))
        evidence.fails(6 if kept < last_head else 8, file)


def test_swapped_ledgers_are_found(evidence: Evidence) -> None:
    north, south = evidence.ledger("north").read_bytes(), evidence.ledger("south").read_bytes()
    evidence.ledger("north").write_bytes(south)
    evidence.ledger("south").write_bytes(north)
    evidence.fails(5, evidence.ledger("north"), 1)


def test_a_history_that_is_rewritten_afterwards_is_found_by_the_heads(evidence: Evidence) -> None:
    def milder(lines: list[Line]) -> list[Line]:
        for line in lines:
            if line[2] == "refuse":
                line[3]["detail"] = "nothing of note"
        return lines

    faithful = evidence.ledger("north").read_bytes()
    evidence.rewrite("north", milder, heads=False)
    evidence.fails(5, evidence.ledger("north"), evidence.seq_of("north", "witness"))  # what it was shown of itself

    def forgetful(lines: list[Line]) -> list[Line]:
        for line in milder(lines):
            if line[2] == "witness":
                line[3]["heads"].pop("north", None)
        return lines

    evidence.ledger("north").write_bytes(faithful)
    evidence.rewrite("north", forgetful, heads=False)
    evidence.fails(6, evidence.ledger("north"))


def test_a_participant_without_a_charge_is_found(evidence: Evidence) -> None:
    first = evidence.charge_of("west", 1)

    def uncharged(lines: list[Line]) -> list[Line]:
        kept = [line for line in lines if line[0] not in (first, first + 1)]
        return _settles_moved(kept, first, -2)

    evidence.rewrite("west", uncharged)
    assert "without a charge of its own" in evidence.fails(8, evidence.ledger("west"), first)


def test_a_participant_whose_ledger_has_neither_charge_nor_release_is_found(evidence: Evidence) -> None:
    first = evidence.charge_of("west", 1)

    def absent(lines: list[Line]) -> list[Line]:
        return _settles_moved([line for line in lines if not first <= line[0] < first + 6], first, -6)

    evidence.rewrite("west", absent)
    assert "no charge for round 1" in evidence.fails(8, evidence.ledger("west"))


def test_a_charge_after_the_release_is_found(evidence: Evidence) -> None:
    first = evidence.charge_of("west", 1)

    def late(lines: list[Line]) -> list[Line]:
        at = first - 1
        charge, settle, update = lines[at : at + 3]
        settle[3]["charge_seq"] = first + 1
        for line in (charge, settle, update):
            line[1] = charge[1]
        return [*lines[:at], update, charge, settle, *lines[at + 3 :]]

    evidence.rewrite("west", late)
    evidence.fails(8, evidence.ledger("west"), first)


def test_a_charge_given_back_although_its_update_left_is_found(evidence: Evidence) -> None:
    settled = evidence.charge_of("west", 1) + 1

    def given_back(lines: list[Line]) -> list[Line]:
        lines[settled - 1][3]["steps"] = 0
        return lines

    evidence.rewrite("west", given_back)
    assert "0 of 5 steps" in evidence.fails(8, evidence.ledger("west"), settled)


@pytest.mark.parametrize(("field", "value"), [("noise_multiplier", 9.0), ("sampling_rate", 0.001), ("steps", 1)])
def test_a_charge_that_is_not_the_approved_plans_is_found(evidence: Evidence, field: str, value: float) -> None:
    charged = evidence.charge_of("west", 1)

    def cheaper(lines: list[Line]) -> list[Line]:
        lines[charged - 1][3]["event"][field] = value
        if field == "steps":
            lines[charged][3]["steps"] = value
        return lines

    evidence.rewrite("west", cheaper)
    evidence.fails(8 if field == "steps" else 5, evidence.ledger("west"), charged)


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon", 99.0), ("delta", 1e-3), ("clipping_norm", 50.0), ("steps_per_round", 4), ("rounds", 9)],
)
def test_an_approval_of_something_else_than_the_contract_is_found(evidence: Evidence, field: str, value: float) -> None:
    approved = evidence.seq_of("west", "approve")

    def other(lines: list[Line]) -> list[Line]:
        lines[approved - 1][3]["plan"][field] = value
        for line in lines:
            if field == "steps_per_round" and line[2] == "charge" and line[3]["purpose"] == "training":
                line[3]["event"]["steps"] = value
            elif field == "steps_per_round" and line[2] == "settle":
                line[3]["steps"] = min(value, line[3]["steps"])
        return lines

    evidence.rewrite("west", other)
    evidence.fails(8, evidence.ledger("west"), approved)


# -- what it cost


def test_an_epsilon_understated_by_the_coordinator_is_found(evidence: Evidence) -> None:
    said = evidence.body(evidence.record(3))["epsilon"]
    said["south"] = round(said["south"] - 0.001, 3)
    evidence.resign(r3={"epsilon": said})
    evidence.fails(9, evidence.record(3))


def test_a_charge_beyond_the_budget_is_found_where_it_happened(evidence: Evidence) -> None:
    beside = [GaussianEvent(10.0)]
    one, two = (epsilon([*beside, DpSgdEvent(0.05, 1.5, steps)], 1e-4) for steps in (5, 10))

    def poorer(lines: list[Line]) -> list[Line]:
        lines[0][3]["epsilon"] = (one + two) / 2
        return lines

    evidence.rewrite("south", poorer)
    why = evidence.fails(9, evidence.ledger("south"), evidence.charge_of("south", 2))
    assert "beyond the budget" in why


def test_what_was_spent_before_on_the_same_patients_counts_against_the_budget(evidence: Evidence) -> None:
    evaluations = [GaussianEvent(calibrate_noise(1.0, ROUNDS, 1.0, 1e-4))] * ROUNDS
    alone = epsilon([GaussianEvent(10.0), *evaluations, DpSgdEvent(0.05, 1.5, 5 * ROUNDS)], 1e-4)

    def poorer(lines: list[Line]) -> list[Line]:
        lines[0][3]["epsilon"] = alone + 0.001  # enough for the study, not for it and the other one
        return lines

    evidence.rewrite("north", poorer)
    evidence.fails(9, evidence.ledger("north"))


# -- the card


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"study_digest": "0" * 64},
        {"contract": {}},
        {"roster": {"digest": "0" * 64, "version": 1, "sites": []}},
        {"model": {"sha256": "0" * 64, "bytes": 9, "architecture": "logistic"}},
        {"rounds": []},
        {"epsilon": {"north": 0.1, "south": 0.1, "west": 0.1}},
        {"delta": 1e-9},
        {"metrics": {"auroc": 0.99, "sites": 3}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_card_that_says_something_else_than_the_records_is_found(evidence: Evidence, changes: dict[str, Any]) -> None:
    evidence.reseal(evidence.root / "card.json", CARD_DOMAIN, **changes)
    evidence.fails(10, evidence.root / "card.json")


def test_the_file_of_another_model_is_found(evidence: Evidence) -> None:
    model = evidence.root / "model.safetensors"
    model.write_bytes(b"the last model")
    assert "is that model" in evidence.verified().steps[-1].says
    model.write_bytes(b"another model")
    evidence.fails(10, model)


# -- any edit at all


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_passes_unless_the_file_still_says_the_same(faithful: Evidence, data: st.DataObject) -> None:
    files = sorted(file for file in faithful.root.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    original = file.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    edited = bytearray(original)
    edited[position] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(edited)
    try:
        faithful.verified()
    except (VerificationFailed, ConfigurationError):
        return
    finally:
        file.write_bytes(original)
    assert file.suffix == ".json" and canonical_digest(json.loads(edited)) == canonical_digest(json.loads(original))


def _settles_moved(lines: list[Line], behind: int, by: int) -> list[Line]:
    for line in lines:
        if line[2] == "settle" and line[3]["charge_seq"] > behind:
            line[3]["charge_seq"] += by
    return lines
