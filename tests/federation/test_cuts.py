"""A site's network is cut: what the round waits for, what it does without, and that the model stays the same."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.support.cables import Cables, ip

from consilium_server.federation import Home

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ["north", "south", "west"]
LONG = 1250
"""Steps that take half a second and more: a moment in the middle of them can be hit."""
CUT_SECONDS = 4.0
BLINK_SECONDS = 0.1
"""Shorter than the pause between a SuperNode's looks for a message."""

PATIENCE = "25s"
"""Of a round. After a long cut TCP sends again, or the SuperNode gives up its request, 25 to 30 s after it was lost."""


@pytest.fixture(scope="module")
def undisturbed(wired: Hospitals, contract: Callable[..., dict[str, Any]]) -> dict[str, bytes]:
    """The weights after two rounds in which nothing happened."""
    study = wired.run_study(contract("undisturbed", private=False, rounds=2, steps_per_round=LONG))
    assert wired.ended(study.study) == "finished"
    return wired.weights(study.study)


def whole(hospitals: Hospitals, study: Any) -> None:
    """Every site took part in both rounds, in their metrics and in the closing, and trained once for each."""
    records = hospitals.records(study.study)
    assert [(record["participants"], record["away"], record["refused"]) for record in records] == [(SITES, {}, {})] * 2
    assert [record["opened"]["attempt"] for record in records] == [1, 1]
    assert [records[1]["metrics_before"]["sites"], records[1]["metrics"]["sites"]] == [3, 3]
    assert set(hospitals.folder(study.study).closings(Home(hospitals.server).roster())) == set(SITES)
    for site in SITES:
        charges = [(each.body.round, each.body.attempt, each.settled) for each in hospitals.charges(site, study)]
        assert charges == [(1, 1, LONG), (2, 1, LONG)]


def connects(hospitals: Hospitals, cables: Cables, site: str) -> bool:
    """Whether a program in the site's namespace reaches the coordinator's public port, within two seconds."""
    port = yaml.safe_load((hospitals.root / "federation.yaml").read_text())["port"]
    program = f"import socket; socket.create_connection(({cables.address!r}, {port}), timeout=2)"
    done = subprocess.run([*cables.prefix(site), sys.executable, "-c", program], capture_output=True, check=False)
    return done.returncode == 0


def test_a_cut_parts_one_site_from_the_coordinator_and_mending_joins_it_again(wired: Hospitals, cables: Cables) -> None:
    def reached(*sites: str) -> None:
        """On a busy machine the first packets may take longer than one attempt waits."""
        for site in sites:
            wired.until(partial(connects, wired, cables, site), f"{site} reaches the coordinator", "server")

    reached(*SITES)
    cables.cut("south")
    assert not connects(wired, cables, "south")
    reached("north", "west")
    cables.mend("south")
    reached("south")


def test_a_site_has_no_way_to_the_coordinator_but_its_cable(wired: Hospitals) -> None:
    for site in SITES:
        for program in ("supernode", "courier"):
            devices = Path(f"/proc/{wired.pid(site, f'consilium_client.transport.{program}')}/net/dev").read_text()
            assert {line.split(":")[0].strip() for line in devices.splitlines()[2:]} == {"lo", "wan"}


def test_cables_are_removed_when_what_runs_over_them_fails(laid: Cables) -> None:
    def there() -> set[str]:
        return {word.strip(":@") for word in f"{ip('link', 'show')} {ip('netns', 'list')}".split() if "cut" in word}

    before = there()
    with pytest.raises(RuntimeError), Cables(["one", "two"]):
        assert len(there() - before) >= 5, "a bridge, two ports, two namespaces"
        raise RuntimeError
    assert there() == before


def test_cuts_that_are_mended_within_the_exchange_do_not_change_the_model(
    wired: Hospitals, cables: Cables, contract: Callable[..., dict[str, Any]], undisturbed: dict[str, bytes]
) -> None:
    """One study; in each of its exchanges that differ south is cut off until the others have answered, and longer."""
    study = wired.run_study(contract("cut", private=False, rounds=2, steps_per_round=LONG))
    for number, phase in ((1, "survivors"), (1, "opening"), (2, "training"), (2, "evaluation"), (2, "closing")):
        wired.until_phase(study.study, number, phase)
        if phase == "training":
            wired.until(lambda: wired.trains("south", study, 2), "south trains")
        cables.cut("south")

        def others_answered(number: int = number, phase: str = phase) -> bool:
            return wired.answered(study.study, number, phase) >= {"north", "west"}

        wired.until(others_answered, f"the others answer in {phase}")
        wired.until(lambda: not wired.trains("south", study, 2), "south has trained what it was asked for, if it was")
        time.sleep(CUT_SECONDS)
        answered = wired.answered(study.study, number, phase)
        assert answered == {"north", "west"}, f"the cut in {phase} came too late to mean anything"
        assert wired.state(study.study) == "running"
        cables.mend("south")

    assert wired.ended(study.study) == "finished"
    assert wired.weights(study.study) == undisturbed
    whole(wired, study)


def test_a_round_that_loses_a_site_is_made_again_unopened_without_it_and_has_it_back_later(
    wired: Hospitals, cables: Cables, contract: Callable[..., dict[str, Any]]
) -> None:
    study = wired.run_study(
        contract("left-out", private=False, rounds=12, steps_per_round=1000, min_sites=2, round_timeout=PATIENCE)
    )
    wired.until_phase(study.study, 2, "training")
    cables.cut("south")
    wired.until(lambda: len(wired.records(study.study)) >= 2, "round 2 ends without south")
    cables.mend("south")

    assert wired.ended(study.study) == "finished"
    records = wired.records(study.study)
    assert records[1]["participants"] == list(records[1]["opened"]["adverts"]) == ["north", "west"]
    assert (records[1]["opened"]["attempt"], set(records[1]["away"])) == (2, {"south"})
    assert records[-1]["participants"] == SITES
    for site in ("north", "west"):  # what they had trained left again, under other masks, on the same charge
        charges = [(each.body.round, each.body.attempt) for each in wired.charges(site, study)]
        assert charges == [(number, 1) for number in range(1, 13)]
        left = [body for kind, body in wired.entries(site, study) if kind == "release" and body.message == "update"]
        assert [(each.round, each.again) for each in left[1:3]] == [(2, False), (2, True)]


def test_cuts_shorter_than_a_pause_between_two_looks_change_nothing(
    wired: Hospitals,
    cables: Cables,
    contract: Callable[..., dict[str, Any]],
    undisturbed: dict[str, bytes],
) -> None:
    study = wired.run_study(contract("blinks", private=False, rounds=2, steps_per_round=LONG))
    for number, phase in ((1, "training"), (1, "survivors"), (2, "training"), (2, "evaluation"), (2, "closing")):
        wired.until_phase(study.study, number, phase)
        for site in SITES:
            cables.cut(site)
        time.sleep(BLINK_SECONDS)
        cables.mend()
    assert wired.ended(study.study) == "finished"
    assert wired.weights(study.study) == undisturbed
    whole(wired, study)
