"""A whole private study by the commands that people type, and what can be checked of it afterwards."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from consilium_shared.canonical import digest
from consilium_shared.ledger.entry import Approve, Open, Release, Settle
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import event_from_dict
from consilium_shared.study import Study

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ["north", "south", "west"]


@dataclass(frozen=True)
class Finished:
    """A finished study, and what ``consilium-server run`` printed about it."""

    study: Study
    printed: str
    card: dict[str, Any]
    model: Path


@pytest.fixture(scope="module")
def finished(hospitals: Hospitals, contract: Callable[..., dict[str, Any]]) -> Finished:
    file = hospitals.root / "whole.yaml"
    file.write_text(json.dumps(contract("whole", private=True)))
    with ThreadPoolExecutor(1) as background:
        run = background.submit(hospitals.at_server, "run", file)
        try:
            hospitals.approve("whole", SITES, by="Dr Synthetic")
        except Exception:
            hospitals.at_server("stop", "whole")  # else ``run`` is waited for without end, and nobody sees why
            raise
        done = run.result()
    (entry,) = (each for each in hospitals.models() if each["card"]["study"] == "whole")
    return Finished(hospitals.folder("whole").study(), done.stdout + done.stderr, entry["card"], Path(entry["folder"]))


def test_run_shows_every_round_and_status_says_finished(hospitals: Hospitals, finished: Finished) -> None:
    for number in (1, 2, 3):
        assert f"round {number} done in" in finished.printed
    status = hospitals.status()["studies"]["whole"]
    assert (status["state"], status["rounds_done"], status["why"]) == ("finished", 3, "")
    auroc, ends = status["metrics"]["auroc"], status["metrics"]["interval"].get("auroc")
    # So few patients, so much noise: it may leave every value open, and then there is none.
    assert (auroc is None and ends is None) or ends[0] <= auroc <= ends[1]
    assert "as reported by the sites" in finished.printed


def test_every_sum_was_opened_with_the_signatures_of_its_survivors(hospitals: Hospitals, finished: Finished) -> None:
    records = hospitals.records("whole")
    for opened in (*(record["opened"] for record in records), records[-1]["opened_counts"]):
        assert (opened["attempt"], list(opened["adverts"]), sorted(opened["signatures"])) == (1, SITES, SITES)
    assert [record.get("opened_counts") for record in records[:-1]] == [None, None]


def test_the_card_says_who_took_part_in_which_round_and_at_what_cost(finished: Finished) -> None:
    card = finished.card
    assert [(each["round"], each["participants"], each["away"]) for each in card["rounds"]] == [
        (number, SITES, {}) for number in (1, 2, 3)
    ]
    assert card["study_digest"] == finished.study.digest
    assert card["model"]["sha256"] == hashlib.sha256((finished.model / "model.safetensors").read_bytes()).hexdigest()
    assert sorted(card["epsilon"]) == SITES
    assert all(0 < spent <= 2.0 for spent in card["epsilon"].values())


def test_an_edited_card_is_not_listed_as_a_model(hospitals: Hospitals, finished: Finished) -> None:
    file = finished.model / "card.json"
    signed = file.read_text()
    file.write_text(signed.replace('"round": 3', '"round": 4'))
    try:
        refused = hospitals.at_server("models", "--json", check=False)
    finally:
        file.write_text(signed)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert str(finished.model) in "".join(refused.stderr.split())


def test_export_copies_the_model_and_its_signed_card(hospitals: Hospitals, finished: Finished, tmp_path: Path) -> None:
    hospitals.at_server("export", "whole", tmp_path / "exported")
    for name in ("model.safetensors", "card.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (finished.model / name).read_bytes()
    tested = hospitals.at_site("north", "test", hospitals.root / "whole.yaml", tmp_path / "exported/model.safetensors")
    assert "auroc" in tested.stdout


def test_the_signed_records_follow_the_model_from_round_to_round(hospitals: Hospitals, finished: Finished) -> None:
    records = hospitals.records("whole")
    assert [record["round"] for record in records] == [1, 2, 3]
    for before, after in itertools.pairwise(records):
        assert after["model_before"] == before["model_after"]
    assert records[-1]["model_after"] == finished.card["model"]["sha256"]
    assert [record["metrics"] for record in records[:-1]] == [None, None]
    evaluated = [*(record["metrics_before"] for record in records[1:]), records[-1]["metrics"]]
    assert all(metrics["sites"] == 3 for metrics in evaluated)


def test_the_last_model_is_the_average_over_rounds_where_the_contract_says_so(
    hospitals: Hospitals, contract: Callable[..., dict[str, Any]]
) -> None:
    """Without privacy all of a study follows from its seed, whatever its name: the rounds are the same three times."""
    found = []
    for name, changes in (
        ("one", {"rounds": 1}),
        ("two", {"rounds": 2}),
        ("both", {"rounds": 2, "weight_average": 0.5}),
    ):
        study = hospitals.run_study(contract(f"average-{name}", private=False, **changes))
        assert hospitals.ended(study.study) == "finished"
        found.append(hospitals.weights(study.study))
    first, second, average = ({key: np.frombuffer(v, np.float32) for key, v in each.items()} for each in found)
    for key, weights in average.items():
        assert weights == pytest.approx((first[key] + 2 * second[key]) / 3, abs=1e-6)
        assert not np.array_equal(weights, second[key])


@pytest.mark.parametrize("site", SITES)
def test_each_round_is_charged_before_it_is_settled_and_settled_before_it_is_released(
    hospitals: Hospitals, finished: Finished, site: str
) -> None:
    story = []
    for kind, body in hospitals.entries(site, finished.study):
        if kind == "approve":
            story.append((kind, body.by))
        elif kind == "charge":
            story.append((body.purpose, body.round))
        elif kind == "release" and body.message in ("update", "counts"):
            story.append((body.message, body.round))
    first = [("training", 1), ("update", 1)]
    middle = [each for n in (2, 3) for each in (("training", n), ("evaluation", n - 1), ("update", n))]
    last = [("evaluation", 3), ("counts", 3)]
    assert story == [("approve", "Dr Synthetic"), ("count", 0), *first, *middle, *last]

    kinds = [(entry.seq, entry.body) for entry in hospitals.ledger(site).entries]
    opened = next(seq for seq, body in kinds if isinstance(body, Open) and body.asset == "guarded")
    approved = next(seq for seq, body in kinds if isinstance(body, Approve) and body.study == finished.study.digest)
    assert opened < approved
    for charge in hospitals.charges(site, finished.study):
        settled = next(seq for seq, body in kinds if isinstance(body, Settle) and body.charge_seq == charge.seq)
        update = next(
            seq
            for seq, body in kinds
            if isinstance(body, Release)
            and (body.study, body.round, body.message) == (finished.study.digest, charge.body.round, "update")
        )
        assert charge.seq < settled < update
        assert (charge.body.attempt, charge.settled) == (1, 20)


@pytest.mark.parametrize("site", SITES)
def test_the_epsilon_of_the_card_is_what_the_ledger_says_and_no_more_than_the_study_asked(
    hospitals: Hospitals, finished: Finished, site: str
) -> None:
    charges = hospitals.charges(site, finished.study, "training", "count", "evaluation")
    events = [event_from_dict(each.body.event.model_dump()) for each in charges]
    assert len(events) == 1 + 3 + 3
    recomputed = epsilon(events, 1e-5)
    assert recomputed <= 2.0
    assert recomputed <= finished.card["epsilon"][site] <= recomputed + 0.001
    (told,) = (each for each in hospitals.json_at_site(site, "budget") if each["asset"] == "guarded")
    assert told["spent"] >= recomputed - 1e-6
    assert told["left"] <= told["epsilon"] - told["spent"] + 1e-6


@pytest.mark.parametrize("site", SITES)
def test_the_head_in_a_record_is_the_entry_that_the_ledger_has_there(
    hospitals: Hospitals, finished: Finished, site: str
) -> None:
    entries = hospitals.ledger(site).entries
    for record in hospitals.records("whole"):
        head = record["heads"][site]
        assert digest(entries[head["seq"] - 1].line()) == head["sha256"]
