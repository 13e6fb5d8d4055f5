"""A program, or a whole hospital, dies in each exchange of a round: the right sum comes out, or nothing is opened."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

    from consilium_shared.study import Study

SITES = ["north", "south", "west"]
ENDED = ("finished", "stopped", "failed")
SHORT = 300
"""Steps of a round in which nothing happens while the sites train."""
LONG = 2500
"""Steps that take about a second: a site can die in the middle of them."""
CURIOUS = {"threat_model": "honest-but-curious", "min_sites": 2, "round_timeout": "15s"}
"""Two of three open a sum."""


STUDY, AGENT = ("server", "consilium_server.study"), ("south", "consilium_client.agent")
COURIER = ("south", "consilium_client.transport.courier")
KILLS = [
    (1, "survivors", [STUDY]),
    (1, "opening", [AGENT]),
    (2, "survivors", [AGENT]),
    (2, "opening", [STUDY]),
    (3, "opening", [COURIER]),
    (3, "evaluation", [STUDY, AGENT]),
]
"""Round, exchange, and which programs are killed just before its question goes out."""
ROUNDS = [1, 2, 3]


@pytest.fixture(scope="module")
def reference(shaken: Hospitals, contract: Callable[..., dict[str, Any]]) -> dict[str, bytes]:
    """The weights after three rounds of all three sites in which nothing happened."""
    study = shaken.run_study(contract("nothing-happens", private=False, rounds=3, steps_per_round=SHORT))
    assert shaken.ended(study.study) == "finished"
    return shaken.weights(study.study)


def test_programs_killed_in_each_exchange_are_back_in_the_same_attempt_and_the_model_is_the_same(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]], reference: dict[str, bytes]
) -> None:
    study = shaken.run_study(contract("killed-again-and-again", private=False, rounds=3, steps_per_round=SHORT))
    for number, phase, programs in KILLS:
        shaken.until_phase(study.study, number, phase)
        assert shaken.state(study.study) == "running"
        for service, program in programs:
            shaken.kill(service, program)

    assert shaken.ended(study.study) == "finished"
    assert shaken.weights(study.study) == reference
    records = shaken.records(study.study)
    assert [(r["participants"], r["away"], r["opened"]["attempt"]) for r in records] == [(SITES, {}, 1)] * 3
    for site in SITES:
        charges = [(each.body.round, each.body.attempt, each.settled) for each in shaken.charges(site, study)]
        assert charges == [(number, 1, SHORT) for number in ROUNDS]


@pytest.fixture(scope="module")
def by_two(shaken: Hospitals, contract: Callable[..., dict[str, Any]]) -> dict[str, bytes]:
    """The weights after a round of north and west, south having said no."""
    study = shaken.start(contract("by-two", private=False, rounds=1, steps_per_round=LONG, **CURIOUS))
    shaken.decide(study.study, "reject", "south", reason="a test")
    shaken.decide(study.study, "approve", "north", "west")
    assert shaken.ended(study.study) == "finished"
    return shaken.weights(study.study)


@pytest.fixture(scope="module")
def by_three(shaken: Hospitals, contract: Callable[..., dict[str, Any]]) -> dict[str, bytes]:
    """The weights after a round of all three."""
    study = shaken.run_study(contract("by-three", private=False, rounds=1, steps_per_round=LONG, **CURIOUS))
    assert shaken.ended(study.study) == "finished"
    return shaken.weights(study.study)


def close(one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Equal but for the encoding, which is finer the smaller the cohort is."""
    return all(
        np.allclose(np.frombuffer(one[name], "<f4"), np.frombuffer(other[name], "<f4"), rtol=0, atol=1e-4)
        for name in one
    )


@pytest.mark.parametrize("phase", ["training", "survivors", "opening"])
def test_a_site_that_dies_for_good_is_in_the_sum_only_if_its_update_had_come(
    shaken: Hospitals,
    contract: Callable[..., dict[str, Any]],
    by_two: dict[str, bytes],
    by_three: dict[str, bytes],
    phase: str,
) -> None:
    study = shaken.run_study(contract(f"dead-{phase}", private=False, rounds=1, steps_per_round=LONG, **CURIOUS))
    shaken.until_phase(study.study, 1, phase)
    shaken.kill("south", None)
    try:
        assert shaken.ended(study.study) == "finished"
    finally:
        shaken.up("south")
    (record,) = shaken.records(study.study)
    assert list(record["opened"]["adverts"]) == SITES
    if phase == "training":
        assert (record["participants"], list(record["away"])) == (["north", "west"], ["south"])
        assert close(shaken.weights(study.study), by_two)
        assert not close(by_two, by_three)
    else:
        assert record["participants"] == SITES
        assert shaken.weights(study.study) == by_three


def test_in_private_sums_too_few_for_the_threshold_mask_the_same_integers_again_and_every_step_is_charged_once(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    """Of two sums, each one private step of all sites, the first loses a site after its keys."""

    def sums(name: str) -> dict[str, Any]:
        asked = contract(name, private=True, rounds=2, steps_per_round=1, min_sites=2, round_timeout="8s")
        asked["training"]["expected_batch"] = 96
        asked["privacy"]["sums"] = {"sampling_rate": 0.5}
        return asked

    study = killed_in(shaken, "training", sums)
    try:
        assert shaken.ended(study.study) == "finished"
    finally:
        shaken.up("south")
    records = shaken.records(study.study)
    assert [record["participants"] for record in records] == [["north", "west"]] * 2
    assert [record["opened"]["attempt"] for record in records] == [2, 1]
    assert len({record["model_after"] for record in records} | {records[0]["model_before"]}) == 3
    step = {"kind": "dp-sgd", "sampling_rate": 0.5, "noise_multiplier": study.privacy.noise_multiplier, "steps": 1}
    for site in ("north", "west"):
        charges = shaken.charges(site, study)
        assert [(each.body.round, each.body.attempt, each.settled) for each in charges] == [(1, 1, 1), (2, 1, 1)]
        assert [each.body.event.model_dump() for each in charges] == [step] * 2
        assert not shaken.charges(site, study, "count"), "no number of patients is released"


def killed_in(shaken: Hospitals, phase: str, contract: Callable[[str], dict[str, Any]]) -> Study:
    """A study in whose first round south died before it had answered in this phase; on a busy machine south may be
    quicker than the kill, and then the next study is the one."""
    for again in range(5):
        study = shaken.run_study(contract(f"needed-{phase}-{again}"))
        shaken.until_phase(study.study, 1, phase)
        shaken.kill("south", None)

        def others_answered(name: str = study.study) -> bool:
            return shaken.state(name) in ENDED or shaken.answered(name, 1, phase) >= {"north", "west"}

        shaken.until(others_answered, "the others have answered")
        time.sleep(1.0)  # an answer that had left south would be in
        if shaken.state(study.study) not in ENDED and "south" not in shaken.answered(study.study, 1, phase):
            return study
        shaken.up("south")
        shaken.ended(study.study)
    pytest.fail("south answered each time before it was killed")


@pytest.mark.parametrize("phase", ["survivors", "opening"])
def test_a_round_that_needs_a_site_which_went_away_after_its_update_waits_for_it_and_opens_the_same_set(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]], phase: str
) -> None:
    study = killed_in(shaken, phase, partial(contract, private=True, rounds=1, min_sites=2, round_timeout="8s"))
    name, opened = study.study, time.monotonic()
    told = "2 of at least 3 sites; waiting for south ("  # asked, until the SuperLink believes that it is offline
    shaken.until(lambda: shaken.waiting(name).startswith(told), "the round waits")
    time.sleep(max(0.0, opened + 10 - time.monotonic()))  # longer than round_timeout
    assert shaken.state(name) == "running"
    shaken.up("south")
    assert shaken.ended(name) == "finished"
    (record,) = shaken.records(name)
    assert (record["participants"], record["opened"]["attempt"]) == (SITES, 1)
    assert [[each.body.attempt for each in shaken.charges(site, study)] for site in SITES] == [[1]] * 3
