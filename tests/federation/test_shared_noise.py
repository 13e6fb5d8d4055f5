"""Hospitals that share a sum's noise, with every program real: who takes part, what is told, and when a study stops."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.federation.conftest import Hospitals, site_yaml
from tests.support import noiseless

from consilium_audit.verify import Verification
from consilium_client.site import Home as SiteHome
from consilium_server import registry
from consilium_server.commands.evidence import collect
from consilium_server.federation import Home
from consilium_shared.ledger.entry import Refuse
from consilium_shared.privacy.event import SharedDpSgdEvent, event_from_dict
from consilium_shared.study import Study

SHARING = ["north", "south", "west"]
RULES = {
    "north": {"permit": True},
    "south": {"permit": True, "max_epsilon_alone": 4.0},
    "west": {"permit": True, "min_colluding": 1},
    "east": {},
}
"""What each hospital says of shared noise; the last says nothing."""


def configured(site: str, folder: Path) -> str:
    """A hospital of these tests, with its word on shared noise."""
    settings = json.loads(site_yaml(site, folder))
    settings["policy"]["budgets"]["guarded"]["shared_noise"] = RULES[site]
    return json.dumps(settings)


@pytest.fixture(scope="module")
def four() -> Iterator[Hospitals]:
    """Four hospitals of which three permit shared noise; that of "south" obeys ``noise`` in the federation's folder."""
    root = Path(tempfile.mkdtemp(prefix="fed"))
    for folder in ("data", "tmp"):
        (root / folder).mkdir()
    sites = {site: configured(site, root / "data") for site in RULES}
    prefixes = {"south": noiseless.prefix(root / "noise")}
    made = Hospitals(root, sites, environment={"TMPDIR": str(root / "tmp")}, prefixes=prefixes)
    try:
        made.provision()
        made.up()
        yield made
    finally:
        made.down()
        shutil.rmtree(root)


def sharing(contract: Callable[..., dict[str, Any]], name: str) -> dict[str, Any]:
    """A study of two sums, each with the noise of two honest hospitals beside one that may be none."""
    asked = contract(name, private=True, rounds=2, steps_per_round=1, expected_batch=190, min_sites=3, corrupt_sites=1)
    sums = {"sampling_rate": 1.0, "honest_sites": 2, "empty_coordinates": 1024}
    asked["privacy"] |= {"noise_multiplier": 6.0, "sums": sums}
    return asked


@pytest.fixture(scope="module")
def shared(four: Hospitals, contract: Callable[..., dict[str, Any]]) -> Study:
    """A study that ended, in which a hospital was killed in the middle of a sum, and then the study's own process."""
    study = four.start(sharing(contract, "shared"))
    four.decide("shared", "approve", *SHARING)
    four.until_phase("shared", 1, "survivors")  # what is held up now is the second sum's noise
    held = four.root / "noise" / "held"
    held.touch()
    four.until(lambda: four.trains("south", study, 2), "south is in the middle of the second sum", "south")
    four.kill("south")
    held.unlink()
    four.kill("server", "consilium_server.study")
    four.up("south")
    assert four.ended("shared") == "finished"
    return study


def test_a_hospital_that_does_not_permit_it_refuses_before_any_charge_and_the_others_go_on(
    four: Hospitals, shared: Study
) -> None:
    refused = [body.reason for _, body in four.entries("east", shared) if isinstance(body, Refuse)]
    assert refused[0] == "policy" and set(refused) <= {"policy", "unknown-study"}, refused
    assert four.charges("east", shared, "training", "evaluation", "patients") == []
    assert four.proposed("east")["shared"] == "refused"
    assert "shared_noise" in four.at_site("east", "show", "shared").stdout
    for record in four.records("shared"):
        assert record["participants"] == SHARING
        assert record["refused"]["east"][0] == "policy"
    assert four.status()["studies"]["shared"]["sites"]["east"] == "refused (policy)"


def test_a_hospital_killed_in_mid_sum_is_waited_for_and_its_share_is_in_the_sum_once(
    four: Hospitals, shared: Study
) -> None:
    assert [each["noise"]["coordinates"] for each in four.records("shared")] == [1024] * 2
    for site in SHARING:
        charges = four.charges(site, shared)
        assert [(each.body.round, each.body.attempt, each.settled) for each in charges] == [(n, 1, 1) for n in (1, 2)]
        events = {event_from_dict(each.body.event.model_dump()) for each in charges}
        assert events == {SharedDpSgdEvent(1.0, 6.0, 1, honest_sites=2, colluding_sites=1)}


def test_whoever_decides_and_whoever_reads_the_model_is_told_both_epsilons(
    four: Hospitals, shared: Study, tmp_path: Path
) -> None:
    shown = four.at_site("north", "show", "shared").stdout
    estimate = four.json_at_site("north", "show", "shared")
    assert "THEIR NOISE IS SHARED" in shown and "by own noise alone" in shown
    assert estimate["cost"] < estimate["cost_alone"] < 4.0

    home = Home(four.server)
    card = registry.newest(home, "shared").card
    assert card["epsilon_alone"] == pytest.approx(estimate["cost_alone"], abs=0.01)
    assert max(card["epsilon"].values()) < card["epsilon_alone"]
    assert "The noise is shared." in card["privacy"]

    collect(home, "shared", tmp_path)
    for site in RULES:
        shutil.copy(SiteHome(four.site(site)).ledger, tmp_path / f"{site}.jsonl")
    verdict = Verification(tmp_path).run()
    assert "noise is as the contract has it" in " ".join(step.says for step in verdict.steps)
    assert any("at most 1 of the 4 sites" in note and "By its own share" in note for note in verdict.notes)


def test_a_study_in_whose_sums_a_share_is_missing_stops_and_the_coordinator_reads_why(
    four: Hospitals, shared: Study, contract: Callable[..., dict[str, Any]]
) -> None:
    (four.root / "noise" / "absent").touch()
    try:
        study = four.start(sharing(contract, "faulty"))
        four.decide("faulty", "approve", *SHARING)
        assert four.ended("faulty") == "stopped"
    finally:
        (four.root / "noise" / "absent").unlink()
    (record,) = four.records("faulty")
    assert 0.5 < record["noise"]["found"] / record["noise"]["expected"] < 0.8, "two shares of three"
    why = four.status()["studies"]["faulty"]["why"]
    assert "round 1: " in why and "less noise than the contract's at every site" in why
    assert "ε is larger than the ledgers say" in why
    resumed = four.at_server("resume", "faulty", check=False)
    assert resumed.returncode != 0 and "less noise" in " ".join((resumed.stdout + resumed.stderr).split())
    assert four.state("faulty") == "stopped" and len(four.records("faulty")) == 1
    assert [each.body.round for each in four.charges("north", study)] == [1]
    assert all(each["card"]["study"] != "faulty" for each in four.models())
