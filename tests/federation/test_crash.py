"""``kill -9`` at any moment, and sites that go away: what it costs, and that it costs no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Hospitals

SITES = ["north", "south", "west"]
LONG = 2500
"""Steps that take about a second: a moment in the middle of them can be hit."""

KILLS = {
    "study": ("server", "consilium_server.app"),
    "superlink": ("server", "consilium_server.superlink"),
    "agent": ("south", "consilium_client.agent"),
    "courier": ("south", "consilium_client.courier"),
    "supernode": ("south", "consilium_client.supernode"),
    "server": ("server", None),
    "site": ("south", None),
}


@pytest.fixture(scope="module")
def undisturbed(shaken: Hospitals, contract: Callable[..., dict[str, Any]]) -> dict[str, bytes]:
    """The weights after two rounds in which nothing happened."""
    study = shaken.run_study(contract("undisturbed", private=False, rounds=2, steps_per_round=LONG))
    assert shaken.ended(study.study) == "finished"
    return shaken.weights(study.study)


@pytest.mark.parametrize("what", KILLS)
def test_a_kill_in_the_middle_of_a_round_does_not_change_the_model(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]], undisturbed: dict[str, bytes], what: str
) -> None:
    service, program = KILLS[what]
    study = shaken.run_study(contract(f"killed-{what}", private=False, rounds=2, steps_per_round=LONG))
    shaken.until(lambda: shaken.trains("south", study, 2), "round 2 is under way")
    shaken.kill(service, program)
    assert [event["round"] for event in shaken.closed(study.study)] == [1], "the kill came too late to mean anything"
    if program is None:
        shaken.up(service)
    if service == "server":
        shaken.at_server("resume", study.study, "--detach")

    assert shaken.ended(study.study) == "finished"
    assert shaken.weights(study.study) == undisturbed
    assert [(record["participants"], record["away"]) for record in shaken.records(study.study)] == [(SITES, {})] * 2
    # The agent that died had trained: its charge stands in full, and the round is charged once more.
    lost = what in ("agent", "site")
    for site in SITES:
        charges = [(c.body.round, c.body.attempt, c.settled is not None) for c in shaken.charges(site, study)]
        again = [(2, 1, False), (2, 2, True)] if lost and site == "south" else [(2, 1, True)]
        assert charges == [(1, 1, True), *again]


def test_another_seed_gives_another_model(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]], undisturbed: dict[str, bytes]
) -> None:
    study = shaken.run_study(contract("other-seed", private=False, rounds=2, steps_per_round=LONG, seed=12))
    assert shaken.ended(study.study) == "finished"
    assert shaken.weights(study.study) != undisturbed


def test_a_site_that_is_away_delays_a_round_and_rejoins_and_below_the_minimum_the_round_waits(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    study = shaken.run_study(
        contract("absences", private=False, rounds=8, steps_per_round=LONG, min_sites=2, round_timeout="5s")
    )

    def closed_with(sites: list[str]) -> bool:
        return any(record["participants"] == sites for record in shaken.records(study.study))

    shaken.until(lambda: closed_with(SITES), "a round with all")
    shaken.down("west")
    shaken.until(lambda: closed_with(["north", "south"]), "a round without west")
    record = shaken.records(study.study)[-1]
    assert list(record["away"]) == ["west"]

    shaken.down("south")
    waits = shaken.until(lambda: waiting_for(shaken, "absences", {"south", "west"}), "the round waits")
    assert "1 of at least 2 sites" in waits
    done = len(shaken.records(study.study))
    assert shaken.state(study.study) == "running"

    shaken.up("west")
    shaken.until(lambda: closed_with(["north", "west"]), "a round with west again")
    assert len(shaken.records(study.study)) > done
    shaken.up("south")
    assert shaken.ended(study.study) == "finished"
    (card,) = (model["card"] for model in shaken.models() if model["card"]["study_digest"] == study.digest)
    told = [(each["round"], each["participants"]) for each in card["rounds"]]
    assert told == [(record["round"], record["participants"]) for record in shaken.records(study.study)]
    assert all(set(each["participants"]) | set(each["away"]) == set(SITES) for each in card["rounds"])


def waiting_for(hospitals: Hospitals, study: str, sites: set[str]) -> str:
    """What ``status`` says while it waits for all of these; empty otherwise."""
    said: str = hospitals.status()["studies"][study]["waiting"]
    return said if all(site in said for site in sites) else ""
