"""Who changes what was summed, or says that enough signed what they did not sign, is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.audit.conftest import FOUR, PRIVATE, a_federation, a_study

from consilium_shared.canonical import digest
from consilium_shared.protocol.messages import countersign
from consilium_shared.protocol.records import RECORD_DOMAIN
from consilium_shared.protocol.summand import segments
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, Advert, Slot, Terms, tolerated
from consilium_shared.study import Study

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""


def opened(evidence: Evidence, number: int = 3, part: str = "opened", **changes: Any) -> dict[str, Any]:
    """How the record says that a sum was opened, but for ``changes``."""
    found: dict[str, Any] = evidence.body(evidence.record(number))[part]
    return {**found, **changes}


def told(evidence: Evidence, **words: Any) -> str:
    """The coordinator signs other words about round 3; what step 4 says of it."""
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, **words)
    return str(evidence.fails(4, evidence.record(3)))


PARTS = pytest.mark.parametrize("part", ["opened", "opened_counts"])


@PARTS
def test_a_signature_that_is_dropped_leaves_too_few(evidence: Evidence, part: str) -> None:
    signatures = opened(evidence, part=part)["signatures"]
    del signatures["west"]
    assert "2 of 3 sites signed" in told(evidence, **{part: opened(evidence, part=part, signatures=signatures)})


@PARTS
def test_a_signature_over_another_sum_is_found(evidence: Evidence, part: str) -> None:
    others = opened(evidence, part="opened" if part == "opened_counts" else "opened_counts")["signatures"]
    assert "what north signed is not" in told(evidence, **{part: opened(evidence, part=part, signatures=others)})


@PARTS
def test_a_sum_without_a_word_on_how_it_was_opened_is_found(evidence: Evidence, part: str) -> None:
    """Also every record of a version that had no secure sums."""
    assert "does not say how the sum of its" in told(evidence, **{part: None})


def test_a_signature_of_a_site_that_is_not_in_the_sum_is_found(latecomer: Evidence) -> None:
    signatures = opened(latecomer)["signatures"]
    for site in ("east", "nobody"):
        foreign = {**signatures, site: signatures["north"]}
        assert f"{site}: signed the sum" in told(latecomer, opened=opened(latecomer, signatures=foreign))


def test_a_participant_that_is_added_after_signing_is_found(latecomer: Evidence) -> None:
    """East gave a key and came too late; the record says that its update is in the sum all the same."""
    latecomer.verified()
    body = latecomer.body(latecomer.record(3))
    east = {
        "epsilon": 2.0,
        "heads": latecomer.body(latecomer.record(2))["heads"]["east"],
        "answers": digest(b"an update"),
        "countersigned": countersign(body["previous"], latecomer.sites["east"]),
    }
    more = {part: {**body[part], "east": value} for part, value in east.items()}
    why = told(latecomer, participants=["east", *body["participants"]], away={}, **more)
    assert "what north signed is not that exactly these sites are in the sum" in why


def test_a_participant_without_a_key_in_the_sum_is_found(evidence: Evidence) -> None:
    adverts = opened(evidence)["adverts"]
    del adverts["west"]
    words = told(evidence, opened=opened(evidence, adverts=adverts))
    assert "west: in the sum of its updates, but with no key" in words


def without_west(evidence: Evidence) -> str:
    """West's update was summed in round 3, and its neighbours signed that; the record says nothing of it."""
    body = evidence.body(evidence.record(3))
    words: dict[str, Any] = {
        part: {site: value for site, value in body[part].items() if site != "west"}
        for part in ("epsilon", "heads", "answers", "countersigned")
    }
    signatures = {site: each for site, each in opened(evidence)["signatures"].items() if site != "west"}
    words |= {"participants": [site for site in body["participants"] if site != "west"], "metrics_before": None}
    words |= {"away": {"west": "offline"}}
    return told(evidence, **words, opened=opened(evidence, signatures=signatures))


def test_a_participant_that_is_left_out_after_signing_is_found(of_four: Callable[[int], Evidence]) -> None:
    """Also where the rest is enough to open a sum."""
    assert "what east signed is not that exactly these sites are in the sum" in without_west(of_four(3))


def test_a_sum_of_fewer_than_it_takes_to_open_one_is_found(evidence: Evidence) -> None:
    """Also where they are as many as the contract wants."""
    assert "2 of 3 sites, and 3 are needed" in without_west(evidence)


def with_counts_of(evidence: Evidence, *counting: str) -> str:
    """Of round 3's cohort these sites had offered counts, by all keys and signatures but the closings'."""
    body = evidence.body(evidence.record(3))
    study = Study.from_contract(json.loads((evidence.root / "contract.json").read_bytes()))
    about = {"federation": body["federation"], "study": body["study"], "roster": body["roster"]}
    slot, adverts = Slot(**about, purpose="training", round=3, attempt=1), {}
    for site, advert in body["opened"]["adverts"].items():
        key, identity = bytes.fromhex(advert["key"]), evidence.sites[site]
        adverts[site] = Advert.sign(slot, site, key, identity, counts=site in counting)
    terms = Terms(
        slot=slot,
        model=body["model_before"],
        segments=segments(study, "training", 3, body["opened"]["parameters"]),
        threat_model=study.aggregation.threat_model,
        adverts=adverts,
        corrupt=tolerated(study.aggregation, len(evidence.sites)),
    )
    words = terms.survivors_signed(tuple(body["participants"]))
    signers = {site: evidence.sites[site] for site in body["participants"]}
    signatures = {site: identity.sign(SURVIVORS_DOMAIN, words).hex() for site, identity in signers.items()}
    keys = {site: advert.model_dump(mode="json") for site, advert in adverts.items()}
    changed = opened(evidence, adverts=keys, signatures=signatures)
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, metrics_before=None, opened=changed)
    return evidence.fails(4)


def test_a_sum_with_the_counts_of_a_few_is_found_although_enough_signed_it_and_no_metrics_are_told(
    latecomer: Evidence,
) -> None:
    """East is late: with it three had offered counts, which is the least, and without it two have added some."""
    why = with_counts_of(latecomer, "east", "north", "south")
    assert "2 of the survivors have added counts, and the least is 3, or none" in why
    for fine in (("north", "south"), ("north", "south", "west"), ("east",), ()):
        assert "what east countersigned is not the record" in with_counts_of(latecomer, *fine), fine


def test_a_smaller_cohort_that_would_need_fewer_signatures_is_not_what_was_signed(latecomer: Evidence) -> None:
    adverts = opened(latecomer)["adverts"]
    del adverts["east"]
    assert "what north signed is not" in told(latecomer, opened=opened(latecomer, adverts=adverts))


def test_keys_are_the_sites_own_and_for_this_sum(evidence: Evidence) -> None:
    earlier, mine = opened(evidence, 1)["adverts"], opened(evidence)["adverts"]
    for adverts, why in (
        ({**mine, "north": earlier["north"]}, "a key in the sum of its updates is not its site's"),
        ({**mine, "north": mine["south"]}, "two sites advertise the same key"),
        ({**mine, "nobody": mine["north"]} | {"north": earlier["north"]}, "not in the roster"),
    ):
        assert why in told(evidence, opened=opened(evidence, adverts=dict(sorted(adverts.items()))))


@pytest.mark.parametrize("changes", [{"attempt": 2}, {"parameters": 3}])
def test_other_terms_than_the_sites_signed_are_found(evidence: Evidence, changes: dict[str, Any]) -> None:
    told(evidence, opened=opened(evidence, **changes))


def test_a_sum_of_updates_on_another_model_is_found(evidence: Evidence) -> None:
    evidence.resign(r1={"model_before": digest(b"another model")})
    assert "what north signed is not" in evidence.fails(4, evidence.record(1))


def test_a_step_on_an_implausible_sum_is_found(evidence: Evidence) -> None:
    evidence.resign(r2={"implausible": "the mean update has norm 312"})
    assert "stepped on a sum" in evidence.fails(3, evidence.record(2))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, {"metrics_before": {"auroc": 0.8, "sites": 3}}),
        (2, {"metrics_before": {"auroc": 0.8, "sites": 3}}),
        (3, {"metrics_before": {"auroc": 0.8, "sites": 0}}),
        (2, {"metrics": {"auroc": 0.8, "sites": 2}}),
        (3, {"metrics": {"auroc": 0.8, "sites": 4}}),
        (3, {"metrics": {"auroc": 0.8}}),
    ],
    ids=str,
)
def test_metrics_of_no_evaluation_or_of_more_sites_than_counted_are_found(
    evidence: Evidence, number: int, words: dict[str, Any]
) -> None:
    evidence.resign(**{f"r{number}": words})
    assert "gave evaluation counts" in evidence.fails(2, evidence.record(number))


# -- whose counts are in a sum


MIXED = ("east", "north", "west")
"""They offer evaluation counts; South, whose policy lets none out, adds zeros."""


def test_metrics_are_of_the_sites_that_offered_counts_and_of_no_more(tmp_path: Path) -> None:
    evidence = a_federation(tmp_path / "mixed", a_study(PRIVATE), FOUR, eventful=False, counting=MIXED)
    assert evidence.verified().notes == []
    assert evidence.body(evidence.record(3))["metrics"]["sites"] == len(MIXED)
    for key in ("metrics", "metrics_before"):
        lying = evidence.copy(tmp_path / key)
        lying.resign(r3={key: {"auroc": 0.8, "sites": 4}})
        assert "are of 4 sites, and 3 of the summed ones offered" in lying.fails(4, lying.record(3))


def test_counts_of_too_few_that_a_coordinator_opened_are_found_though_it_tells_none(tmp_path: Path) -> None:
    """East offered counts, so that the others added theirs, and was gone when the sum was opened."""
    study = a_study(PRIVATE)
    evidence = a_federation(tmp_path / "mixed", study, FOUR, eventful=False, late=("east",), counting=MIXED)
    assert evidence.body(evidence.record(3))["metrics_before"] is None
    assert "2 of the survivors have added counts, and the least is 3" in evidence.fails(4, evidence.record(3))
    evidence.resign(r3={"metrics_before": {"auroc": 0.8, "sites": 2}})
    assert "and the contract wants 3" in evidence.fails(2, evidence.record(3))


def test_sites_of_the_first_release_did_not_refuse_that_so_their_evidence_verifies_with_a_note(tmp_path: Path) -> None:
    study = a_study(PRIVATE, schema_version=1)
    two = ("east", "north")
    evidence = a_federation(tmp_path / "old", study, FOUR, eventful=False, late=("east",), counting=two)
    (note,) = evidence.verified().notes
    assert "round 3 has the evaluation counts of 1 of its 3 sites alone" in note
