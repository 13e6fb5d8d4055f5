"""Who shows two histories, hides one, or takes one back is found, though every file is properly signed."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from consilium_shared.canonical import digest
from consilium_shared.protocol.messages import CanaryAudit, countersign, decode_answer, encode
from consilium_shared.protocol.records import CARD_DOMAIN, RECORD_DOMAIN, Measured

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
SITES = ("north", "south", "west")
STUDY_LATER = "c" * 64


def without_closings(evidence: Evidence) -> None:
    shutil.rmtree(evidence.root / "closing")


def never_closed(evidence: Evidence, site: str) -> None:
    """The card then has what the site said in its last update."""
    evidence.closing(site).unlink()
    said = evidence.body(evidence.root / "card.json")["epsilon"]
    last = evidence.body(evidence.record(3))["epsilon"][site]
    evidence.reseal(evidence.root / "card.json", CARD_DOMAIN, epsilon={**said, site: last})


def witnessed_otherwise(site: str, evidence: Evidence, **changes: Any) -> None:
    """What the site was shown of round 1 was another record than the one that is handed over."""

    def other(lines: list[Line]) -> list[Line]:
        first = next(line for line in lines if line[2] == "witness")
        first[3].update(changes)
        return lines

    evidence.rewrite(site, other)


# -- the coordinator


def test_two_sites_that_were_shown_different_records_are_found_by_the_ledger_of_either(evidence: Evidence) -> None:
    witnessed_otherwise("south", evidence, record=digest(b"the record that south was shown"))
    why = evidence.fails(7, evidence.ledger("south"), evidence.seq_of("south", "witness"))
    assert "two histories" in why
    evidence.ledger("south").unlink()
    never_closed(evidence, "south")
    assert evidence.verified().unchecked == ("south",), "without that ledger south could as well have signed the other"


def test_two_sites_that_were_shown_different_records_are_found_by_the_signature_even_without_that_ledger(
    evidence: Evidence,
) -> None:
    said = evidence.body(evidence.record(2))["countersigned"]
    said["south"] = countersign(digest(b"the record that south was shown"), evidence.sites["south"])
    evidence.reseal(evidence.record(2), RECORD_DOMAIN, countersigned=said)
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, previous=digest(evidence.record(2).read_bytes()))
    evidence.ledger("south").unlink()
    assert "what south countersigned" in evidence.fails(4, evidence.record(2))


def test_other_heads_under_the_same_digest_are_found(evidence: Evidence) -> None:
    false = {"seq": 3, "sha256": digest(b"an entry that north never wrote")}
    south = evidence.body(evidence.record(1))["heads"]["south"]
    witnessed_otherwise("south", evidence, heads={"north": false, "south": south}, record=digest(b"another"))
    why = evidence.fails(7, evidence.ledger("south"), evidence.seq_of("south", "witness"))
    assert "entry 3 was shown as the head of north" in why and "false head" in why


@pytest.mark.parametrize("number", [1, 2])
def test_a_record_that_is_signed_anew_is_found_by_the_one_after_it(evidence: Evidence, number: int) -> None:
    evidence.reseal(evidence.record(number), RECORD_DOMAIN, seconds=9.5)
    assert "does not name the record" in evidence.fails(2, evidence.record(number + 1))


def test_a_chain_of_records_that_is_made_anew_lacks_the_sites_signatures(evidence: Evidence) -> None:
    evidence.reseal(evidence.record(1), RECORD_DOMAIN, seconds=9.5)
    evidence.reseal(evidence.record(2), RECORD_DOMAIN, previous=digest(evidence.record(1).read_bytes()))
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, previous=digest(evidence.record(2).read_bytes()))
    assert "countersigned" in evidence.fails(4, evidence.record(2))
    evidence.reseal(evidence.record(2), RECORD_DOMAIN, countersigned={})
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, previous=digest(evidence.record(2).read_bytes()))
    assert "north, south" in evidence.fails(4, evidence.record(2))


def test_a_last_record_that_is_replaced_is_found_by_closings_and_by_ledgers(evidence: Evidence) -> None:
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, seconds=9.5)
    evidence.fails(4, evidence.closing("north"))
    without_closings(evidence)
    evidence.fails(7, evidence.ledger("north"), evidence.seq_of("north", "witness", -1))


def test_records_that_are_dropped_from_the_end_are_found_by_any_one_ledger(evidence: Evidence) -> None:
    without_closings(evidence)
    for file in (evidence.record(3), evidence.record(2), evidence.root / "card.json"):
        file.unlink()
    for site in ("north", "south"):
        evidence.ledger(site).unlink()
    assert "the records end with round 1" in evidence.fails(7, evidence.ledger("west"))


def test_an_answer_that_is_not_the_one_that_left_is_found(evidence: Evidence) -> None:
    for part, message in (("answers", "update"), ("counts", "counts")):
        said = evidence.body(evidence.record(3))[part]
        evidence.resign(r3={part: {**said, "south": digest(b"another answer")}})
        assert f"the {message} that 0003.json names" in evidence.fails(8, evidence.ledger("south"))
        evidence.resign(r3={part: said})
        evidence.verified()


def test_answers_of_others_or_too_few_are_found(evidence: Evidence) -> None:
    answers = evidence.body(evidence.record(2))["answers"]
    for false in ({"north": answers["north"]}, {**answers, "west": answers["north"]}):
        evidence.resign(r2={"answers": false})
        evidence.fails(2, evidence.record(2))
    evidence.resign(r2={"answers": answers, "counts": {"north": answers["north"]}})
    assert "after the last round alone" in evidence.fails(2, evidence.record(2))


# -- closings


def test_an_edited_closing_or_that_of_another_is_found(evidence: Evidence) -> None:
    north = evidence.closing("north").read_bytes()
    evidence.closing("north").write_bytes(north.replace(b'"round":3', b'"round":2'))
    evidence.fails(4, evidence.closing("north"))
    evidence.closing("north").write_bytes(evidence.closing("south").read_bytes())
    evidence.fails(4, evidence.closing("north"))
    evidence.closing("north").write_bytes(north)
    evidence.closing("south").rename(evidence.closing("east"))
    assert "took part" in evidence.fails(4, evidence.closing("east"))


def test_a_closing_that_its_site_signed_anew_is_found_by_its_own_ledger(evidence: Evidence) -> None:
    faithful = evidence.closing("north").read_bytes()
    closing = decode_answer(faithful, evidence.sites["north"].public)
    for step, changes in (
        (8, {"epsilon": 2.999}),
        (6, {"head": closing.head.model_copy(update={"sha256": digest(b"no entry")})}),
        (7, {"head": closing.head.model_validate(evidence.body(evidence.record(3))["heads"]["north"])}),
        (4, {"round": 2}),
        (4, {"study": STUDY_LATER}),
        (4, {"countersignature": "0" * 128}),
    ):
        evidence.closing("north").write_bytes(encode(closing.model_copy(update=changes), evidence.sites["north"]))
        evidence.fails(step)
    evidence.closing("north").write_bytes(faithful)
    evidence.verified()


def test_a_closing_that_is_left_out_is_said_and_the_ledger_still_witnesses(evidence: Evidence) -> None:
    closing = decode_answer(evidence.closing("west").read_bytes(), evidence.sites["west"].public)
    never_closed(evidence, "west")
    assert closing.site == "west"
    assert any("not countersigned by west" in note for note in evidence.verified().notes)


def test_an_outcome_of_an_audit_is_what_the_ledger_says_in_closing_and_card(evidence: Evidence) -> None:
    outcome = {"canaries": 200, "guesses": 50, "correct": 40}

    def audited(lines: list[Line]) -> list[Line]:
        at = max(index for index, line in enumerate(lines) if line[2] == "witness")
        number, time = lines[at][:2]
        study = lines[at][3]["study"]
        body = {"study": study, "name": "sepsis", "plan": "3" * 64, "by": "Dr Ono", **outcome}
        return [*lines[:at], [number, time, "audit", body], *lines[at:]]

    def told(audit: dict[str, int] | None) -> None:
        header, key = evidence.closing("north").read_bytes(), evidence.sites["north"]
        closing = decode_answer(header, key.public)
        said = CanaryAudit(**audit) if audit is not None else None
        evidence.closing("north").write_bytes(encode(closing.model_copy(update={"audit": said}), key))
        new, old = digest(evidence.closing("north").read_bytes()), digest(header)

        def left(lines: list[Line]) -> list[Line]:
            for line in lines:
                if line[2] == "release" and line[3]["sha256"] == old:
                    line[3]["sha256"] = new
            return lines

        evidence.rewrite("north", left)

    evidence.rewrite("north", audited)
    assert "audit" in evidence.fails(8, evidence.closing("north"))
    told({**outcome, "correct": 25})
    assert "audit" in evidence.fails(8, evidence.closing("north"))
    told(outcome)
    assert "list of what was measured" in evidence.fails(10)
    measured = Measured.of(CanaryAudit(**outcome), 1e-4).model_dump()
    assert 0 < measured["epsilon_at_least"] < 1
    for claim, why in (
        ({**measured, "correct": 25}, "list of what was measured"),
        ({**measured, "epsilon_at_least": 0.0}, "measured ε of north"),
        ({**measured, "confidence": 0.99}, "measured ε of north"),
    ):
        evidence.reseal(evidence.root / "card.json", CARD_DOMAIN, measured={"north": claim})
        assert why in evidence.fails(10)
    evidence.reseal(evidence.root / "card.json", CARD_DOMAIN, measured={"north": measured})
    evidence.verified()


# -- a site, with the coordinator's help


def test_a_ledger_that_is_taken_back_with_the_coordinators_help_is_found_by_a_neighbour(evidence: Evidence) -> None:
    """North forgets round 3; the coordinator signs records without it. South's ledger remembers."""
    without_closings(evidence)
    (evidence.root / "card.json").unlink()
    evidence.record(3).unlink()
    charged = evidence.charge_of("north", 3)
    lines = evidence.ledger("north").read_bytes().splitlines(keepends=True)
    evidence.ledger("north").write_bytes(b"".join(lines[: charged - 2]))
    evidence.ledger("west").unlink()
    why = evidence.fails(7, evidence.ledger("south"), evidence.seq_of("south", "witness", -1))
    assert "head of north" in why and "rolled back" in why


def test_what_a_neighbour_saw_in_another_study_counts_too(evidence: Evidence) -> None:
    def saw(lines: list[Line]) -> list[Line]:
        number, time = lines[-1][:2]
        later = {"seq": 1000, "sha256": digest(b"what north wrote in a later study")}
        body = {"study": STUDY_LATER, "round": 1, "record": "6" * 64, "heads": {"north": later}}
        return [*lines, [number, time, "witness", body]]

    evidence.rewrite("south", saw)
    why = evidence.fails(7, evidence.ledger("south"), evidence.seq_of("south", "witness", -1))
    assert "entry 1000 was shown as the head of north" in why
    evidence.ledger("north").unlink()
    assert evidence.verified().unchecked == ("north",)


def test_a_participant_that_did_not_witness_what_it_signed_is_found(evidence: Evidence) -> None:
    def careless(lines: list[Line]) -> list[Line]:
        return evidence.moved([line for line in lines if line[2] != "witness"])

    evidence.rewrite("south", careless)
    assert "was not witnessed" in evidence.fails(7, evidence.ledger("south"))


def test_each_head_in_a_record_is_counted_as_held_by_others(evidence: Evidence) -> None:
    without_closings(evidence)
    (evidence.root / "card.json").unlink()
    for site, (seen, _) in evidence.verified().witnessed.items():
        assert seen == evidence.body(evidence.record(3))["heads"][site]["seq"]
