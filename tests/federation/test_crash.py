"""``kill -9`` at any moment, and sites that go away: what it costs, and that it costs no more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from consilium_audit.verify import Verification
from consilium_server import registry
from consilium_server.commands.evidence import collect
from consilium_server.federation import Home

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ["north", "south", "west"]
LONG = 1250
"""Steps that take half a second and more: a moment in the middle of them can be hit."""

KILLS = {
    "study": ("server", "consilium_server.study"),
    "superlink": ("server", "consilium_server.superlink"),
    "agent": ("south", "consilium_client.agent"),
    "courier": ("south", "consilium_client.transport.courier"),
    "supernode": ("south", "consilium_client.transport.supernode"),
    "server": ("server", None),
    "site": ("south", None),
}
"""One in each round after the first."""

ROUNDS = list(range(1, len(KILLS) + 2))
TRAINING = {"rounds": len(ROUNDS), "steps_per_round": LONG, "weight_average": 0.5}
"""The model is the average over all rounds: what is known of the earlier ones must outlive a kill in a later one."""


@pytest.fixture(scope="module")
def undisturbed(shaken: Hospitals, contract: Callable[..., dict[str, Any]]) -> dict[str, bytes]:
    """The weights after as many rounds in which nothing happened."""
    study = shaken.run_study(contract("undisturbed", private=False, **TRAINING))
    assert shaken.ended(study.study) == "finished"
    models = [(record["model_before"], record["model_after"]) for record in shaken.records(study.study)]
    assert len(set(sum(models, ()))) == len(ROUNDS) + 1, "each round moves the model"
    return shaken.weights(study.study)


def test_kills_in_the_middle_of_rounds_do_not_change_the_model(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]], undisturbed: dict[str, bytes]
) -> None:
    """One study, in each of whose rounds after the first another program, or all of one house, is killed."""
    study = shaken.run_study(contract("killed", private=False, **TRAINING))
    for number, (what, (service, program)) in enumerate(KILLS.items(), start=2):
        shaken.until(lambda number=number: shaken.trains("south", study, number), f"round {number} is under way")  # type: ignore[misc]
        shaken.kill(service, program)
        done = [event["round"] for event in shaken.closed(study.study)]
        assert done == ROUNDS[: number - 1], f"the kill of {what} came too late to mean anything"
        if program == "consilium_client.agent" or what == "site":
            assert shaken.trains("south", study, number), f"the kill of {what} came too late to mean anything"
        if program is None:
            shaken.up(service)
        if service == "server":
            shaken.at_server("resume", study.study, "--detach")

    assert shaken.ended(study.study) == "finished"
    assert shaken.weights(study.study) == undisturbed
    records = shaken.records(study.study)
    assert [(record["participants"], record["away"]) for record in records] == [(SITES, {})] * len(ROUNDS)
    # Who is asked again does not train again, and an agent that died goes on with what was charged.
    for site in SITES:
        charges = [(each.body.round, each.body.attempt, each.settled) for each in shaken.charges(site, study)]
        assert charges == [(number, 1, LONG) for number in ROUNDS]


def test_a_site_that_is_away_delays_a_round_and_rejoins_and_below_the_minimum_the_round_waits(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    study = shaken.run_study(
        contract("absences", private=False, rounds=10, steps_per_round=300, min_sites=2, round_timeout="8s")
    )

    def closed(sites: list[str], since: int) -> dict[str, Any]:
        """Wait for a round after the first ``since`` that ended with exactly these sites; its record."""
        found = shaken.until(
            lambda: [r for r in shaken.records(study.study)[since:] if r["participants"] == sites],
            f"a round of {sites}",
        )
        return dict(found[0])

    closed(SITES, since=0)
    shaken.down("west")
    assert list(closed(["north", "south"], since=len(shaken.records(study.study)))["away"]) == ["west"]

    shaken.down("south")
    told = "1 of at least 2 sites; waiting for south (offline), west (offline)"
    shaken.until(lambda: shaken.waiting("absences") == told, "the round waits")
    assert shaken.status()["studies"]["absences"]["waiting"] == told
    assert shaken.state(study.study) == "running"

    waited = len(shaken.records(study.study))
    shaken.up("west")
    closed(["north", "west"], since=waited)
    shaken.up("south")
    assert shaken.ended(study.study) == "finished"
    (card,) = (model["card"] for model in shaken.models() if model["card"]["study_digest"] == study.digest)
    published = [(each["round"], each["participants"]) for each in card["rounds"]]
    assert published == [(record["round"], record["participants"]) for record in shaken.records(study.study)]
    assert all(set(each["participants"]) | set(each["away"]) == set(SITES) for each in card["rounds"])


def test_the_best_round_is_published_and_training_ends_early_also_when_the_study_is_killed_meanwhile(
    shaken: Hospitals, contract: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The loss falls from round to round, so that the study which wants it high keeps round 1 and soon gives up."""
    asked = contract("kept", private=False, rounds=9, steps_per_round=LONG // 2)
    kept = {"metric": "loss", "best": "highest", "patience": 1}
    asked["evaluation"] |= {"metrics": ["loss", "auroc"], "validation_fraction": 0.4, "keep": kept}
    study = shaken.run_study(asked)
    shaken.until(lambda: shaken.trains("south", study, 2), "round 2 is under way")
    shaken.kill("server", "consilium_server.study")
    assert [event["round"] for event in shaken.closed(study.study)] == [1], "the kill came too late"
    assert shaken.ended(study.study) == "finished"

    records, home = shaken.records(study.study), Home(shaken.server)
    values = [record["metrics_before"] and record["metrics_before"]["loss"] for record in records]
    assert values[0] is None and values[1] > values[2]
    assert [record["kept"] and record["kept"]["worse"] for record in records] == [None, 0, 1]
    assert records[-1]["metrics"]["loss"] != values[1], "the last counts are of other patients"
    card = registry.newest(home, study.study).card
    assert card["model"]["sha256"] == records[0]["model_after"] == records[-1]["kept"]["model"]
    assert "after round 1" in card["chosen"] and "ended early, after round 3 of 9" in card["chosen"]
    for site in SITES:
        ledger = shaken.ledger(site)
        assert study.digest in ledger.books.closed
        assert [
            each.body.round
            for each in ledger.books.charges.values()
            if (each.body.study, each.body.purpose) == (study.digest, "evaluation")
        ] == [1, 2, 3]

    collect(home, study.study, tmp_path)
    for site in SITES:
        shutil.copy(shaken.site(site) / "ledger.jsonl", tmp_path / f"{site}.jsonl")
    Verification(tmp_path).run()
