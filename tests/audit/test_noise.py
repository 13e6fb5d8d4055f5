"""A record says how much noise its sum has, and no study goes on where some is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.audit.conftest import FOUR, PRIVATE, a_federation

from consilium_audit.page import render
from consilium_audit.report import make_report
from consilium_shared.protocol.records import RECORD_DOMAIN
from consilium_shared.study import Study

Evidence = Any


def a_study_of_sums(rounds: int = 3, **sums: Any) -> Study:
    honest = sums.get("honest_sites", 1)
    return Study.model_validate(
        {
            "study": "sepsis",
            "task": "tabular-classification",
            "model": {"name": "logistic"},
            "data": {
                "asset": "icu",
                "label": {"column": "died", "classes": ["no", "yes"]},
                "features": [{"name": "age"}],
            },
            "training": {
                "rounds": rounds,
                "steps_per_round": 1,
                "expected_batch": 5000,
                "optimizer": {"name": "sgd", "lr": 0.1},
            },
            "privacy": {**PRIVATE, "noise_multiplier": 3.0, "sums": {"empty_coordinates": 1024, **sums}},
            "aggregation": {} if honest == 1 else {"min_sites": honest + 1, "corrupt_sites": 1},
        }
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Evidence]:
    whole = a_federation(tmp_path_factory.mktemp("noise") / "f", a_study_of_sums(), FOUR, eventful=False)
    whole.verified()
    return lambda target: whole.copy(target / "evidence")


def test_sums_that_measure_the_contracts_noise_verify_and_the_report_says_so(
    measured: Callable[[Path], Evidence], tmp_path: Path
) -> None:
    found = measured(tmp_path).verified()
    assert "noise is as the contract has it (+0.0 deviations)" in found.steps[3].says


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (None, "does not say how much noise"),
        ({"coordinates": 12}, "of 12 coordinates, and 1024 are empty"),
        ({"expected": 0.75}, "expects a mean square"),
    ],
)
def test_a_record_that_tells_of_other_noise_than_contract_and_survivors_give_is_found(
    measured: Callable[[Path], Evidence], tmp_path: Path, changed: dict[str, Any] | None, why: str
) -> None:
    evidence = measured(tmp_path)
    noise = evidence.body(evidence.record(3))["noise"]
    scaled = {key: noise[key] * value if key == "expected" else value for key, value in (changed or {}).items()}
    evidence.reseal(evidence.record(3), RECORD_DOMAIN, noise=None if changed is None else {**noise, **scaled})
    assert why in evidence.fails(4, evidence.record(3))


def test_a_study_that_went_on_after_a_sum_without_a_sites_noise_is_found(
    measured: Callable[[Path], Evidence], tmp_path: Path
) -> None:
    evidence = measured(tmp_path)
    noise = evidence.body(evidence.record(2))["noise"]
    evidence.resign(r2={"noise": {**noise, "found": 0.75 * noise["expected"]}})
    assert "the study went on although" in evidence.fails(4, evidence.record(3))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Evidence]:
    """Four hospitals; the noise of three is the whole, and one may work against them."""
    study = a_study_of_sums(honest_sites=3)
    whole = a_federation(tmp_path_factory.mktemp("shared") / "f", study, FOUR, eventful=False)
    return lambda target: whole.copy(target / "evidence")


def test_a_study_with_shared_noise_verifies_and_what_it_rests_on_is_said(
    shared: Callable[[Path], Evidence], tmp_path: Path
) -> None:
    evidence = shared(tmp_path)
    said = " ".join(evidence.verified().notes)
    assert "at most 1 of the 4 sites" in said and "By its own share a site is protected to" in said
    evidence.ledger("east").unlink()
    assert "that east approved and charged the same plan is their word" in " ".join(evidence.verified().notes)


def test_both_epsilons_are_in_the_report(shared: Callable[[Path], Evidence], tmp_path: Path) -> None:
    report = make_report(shared(tmp_path).root)
    for site in report.sites:
        (asset,) = site.account.assets
        assert asset.alone is not None and asset.alone > 1.5 * asset.epsilon
        assert asset.studies[0].alone == pytest.approx(asset.alone, rel=1e-6)
    (alone,) = (each for each in report.stated if "own share" in each.what)
    assert alone.odds.epsilon == max(each.account.assets[0].studies[0].alone or 0.0 for each in report.sites)
    assert b"own share of the noise" in render(report)


def test_a_site_that_approved_and_charged_its_whole_noise_for_shared_noise_is_found(
    shared: Callable[[Path], Evidence], tmp_path: Path
) -> None:
    """It would be harmless to itself; but one that charges another share than the contract's may as well add none."""
    evidence = shared(tmp_path)

    def edit(lines: list[Any]) -> list[Any]:
        for _, _, kind, body in lines:
            if kind == "approve":
                body["plan"] = {k: v for k, v in body["plan"].items() if k not in ("honest_sites", "colluding_sites")}
            elif kind == "charge" and body["event"]["kind"] == "dp-sgd-shared":
                kept = ("sampling_rate", "noise_multiplier", "steps")
                body["event"] = {"kind": "dp-sgd", **{key: body["event"][key] for key in kept}}
        return lines

    evidence.rewrite("north", edit)
    assert "the approved plan's honest_sites is None" in evidence.fails(8)


def test_a_sum_of_fewer_sites_than_hold_the_noise_is_found(shared: Callable[[Path], Evidence], tmp_path: Path) -> None:
    evidence = shared(tmp_path)
    body = evidence.body(evidence.record(3))
    fewer = {key: {s: v for s, v in body[key].items() if s != "west"} for key in ("epsilon", "heads", "answers")}
    opened = {**body["opened"], "signatures": {s: v for s, v in body["opened"]["signatures"].items() if s != "west"}}
    signed = {site: v for site, v in body["countersigned"].items() if site != "west"}
    evidence.reseal(
        evidence.record(3),
        RECORD_DOMAIN,
        participants=[site for site in body["participants"] if site != "west"],
        away={"west": "offline"},
        opened=opened,
        countersigned=signed,
        **fewer,
    )
    assert "3 sites took part, fewer than the contract's 4" in evidence.fails(2, evidence.record(3))
