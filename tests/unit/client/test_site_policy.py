"""What a hospital's policy permits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.support import studies

from consilium_client.policy import (
    SitePolicy,
    check_contract,
    check_corrupt,
    check_decider,
    check_patients,
    check_sites,
)
from consilium_client.site import Home
from consilium_shared.errors import ConfigurationError, PolicyRefusal
from consilium_shared.schema import written_out
from consilium_shared.study import Study

POLICY: dict[str, Any] = {"budgets": {"heart": {"epsilon": 10.0, "delta": 1e-4}}}
STUDY: dict[str, Any] = studies.contract(
    "logistic",
    {
        "asset": "heart",
        "label": {"column": "disease", "classes": ["no", "yes"]},
        "features": [{"name": "age", "center": 50.0, "scale": 10.0}],
    },
    name="heart-disease",
    training={"rounds": 5, "steps_per_round": 5, "expected_batch": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
    privacy={"epsilon": 3.0, "delta": 1e-4, "clipping_norm": 1.0},
    aggregation={"min_sites": 3},
    evaluation={"epsilon": 0.5},
)
OPEN = {**STUDY, "privacy": {"mode": "none"}, "evaluation": {}}


def _check(policy: dict[str, Any], study: dict[str, Any] = STUDY, patients: int = 300, held: int = 60) -> None:
    mine, asked = SitePolicy.model_validate({**POLICY, **policy}), Study.model_validate(study)
    check_contract(mine, asked)
    check_sites(mine, asked, 5)
    check_corrupt(mine, asked, 5)
    check_patients(mine, asked, patients, held)


def test_a_study_in_an_older_schema_than_the_site_asks_for_is_refused() -> None:
    """What later schemas protect is not in it; by default an older coordinator's studies may be approved."""
    old = Study.from_contract(written_out(Study.model_validate(STUDY), 1))
    check_contract(SitePolicy.model_validate(POLICY), old)
    strict = SitePolicy.model_validate({**POLICY, "minimum_schema": 2})
    check_contract(strict, Study.model_validate(STUDY))
    with pytest.raises(PolicyRefusal, match="schema 1, this site asks for 2") as refusal:
        check_contract(strict, old)
    assert refusal.value.reason_code == "policy"


def test_a_study_within_the_policy_may_be_approved() -> None:
    _check({})
    _check({"studies": ["heart-disease"], "minimum_sites": 3, "maximum_epsilon": 3.0, "minimum_patients": 300})


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"budgets": {}}, "no budget for an asset 'heart'"),
        ({"tasks": ["image-classification"]}, "no studies of the kind tabular-classification"),
        ({"studies": ["sepsis"]}, "lacks 'heart-disease'"),
        ({"minimum_patients": 301}, "fewer patients than the 301"),
        ({"minimum_held_back": 61}, "fewer held-back patients than the 61"),
        ({"minimum_sites": 4}, "this site asks for 4"),
        ({"corrupt_sites": 2}, "2 of its 5 sites helping"),
        ({"maximum_epsilon": 2.9}, "permits 2.9"),
        ({"maximum_count_noise": 9.9}, "permits 9.9 .maximum_count_noise"),
        ({"threat_models": ["honest-but-curious"]}, "no coordinator for malicious-server"),
        ({"budgets": {"heart": {"epsilon": 10.0, "delta": 0.01}}}, "delta of the asset's budget"),
    ],
)
def test_every_rule_can_refuse(policy: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyRefusal, match=words) as refusal:
        _check(policy)
    assert refusal.value.reason_code == "policy"


def test_unless_the_policy_says_otherwise_the_coordinator_may_lie() -> None:
    curious = {**STUDY, "aggregation": {"min_sites": 3, "threat_model": "honest-but-curious"}}
    with pytest.raises(PolicyRefusal, match="no coordinator for honest-but-curious"):
        _check({}, curious)
    _check({"threat_models": ["malicious-server", "honest-but-curious"]}, curious)


def test_no_refusal_tells_how_many_patients_there_are() -> None:
    for policy, study, patients in (
        ({}, STUDY, 37),
        ({"minimum_patients": 1}, {**STUDY, "privacy": {**STUDY["privacy"], "delta": 0.03}}, 37),
    ):
        with pytest.raises(PolicyRefusal) as refusal:
            _check(policy, study, patients)
        assert "37" not in str(refusal.value)


def test_few_held_back_patients_are_no_obstacle_where_no_counts_leave() -> None:
    with pytest.raises(PolicyRefusal) as refusal:
        _check({}, held=7)
    assert "7" not in str(refusal.value)
    _check({"allow_evaluation_counts": False}, held=0)
    _check({}, {**STUDY, "evaluation": {}}, held=0)  # with privacy and without a price, no counts leave


def test_what_the_coordinator_may_learn_does_not_look_at_patients() -> None:
    check_contract(SitePolicy.model_validate({**POLICY, "minimum_patients": 10**6}), Study.model_validate(STUDY))


def test_only_the_approvers_that_the_policy_names_may_decide() -> None:
    check_decider(SitePolicy.model_validate(POLICY), "anybody")
    named = SitePolicy.model_validate({**POLICY, "approvers": ["Dr Ono", "Dr Sato"]})
    check_decider(named, "Dr Sato")
    with pytest.raises(PolicyRefusal, match="not among the approvers"):
        check_decider(named, "root")


def test_no_privacy_needs_both_a_permission_and_a_budget_without_limit() -> None:
    unlimited = {"budgets": {"heart": {"epsilon": "unlimited", "delta": 1e-4}}}
    for policy in ({}, unlimited, {"allow_without_privacy": True}):
        with pytest.raises(PolicyRefusal):
            _check(policy, OPEN)
    _check({"allow_without_privacy": True, **unlimited}, OPEN)
    assert math.isinf(SitePolicy.model_validate(unlimited).budget("heart").epsilon)


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {**POLICY, "minimum_patient": 10},
        {**POLICY, "minimum_sites": 1},
        {**POLICY, "tasks": ["segmentation"]},
        {"budgets": {"heart": {"epsilon": 0, "delta": 1e-4}}},
        {"budgets": {"heart": {"epsilon": math.inf, "delta": 1e-4}}},
        {"budgets": {"heart": {"epsilon": 1.0, "delta": 0}}},
        {"budgets": {"heart": {"epsilon": 1.0}}},
    ],
)
def test_a_wrong_policy_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SitePolicy.model_validate(policy)


@pytest.mark.parametrize("value", [1e-13, 1e-300])
def test_a_delta_that_nothing_can_keep_is_refused_with_the_contract(value: float) -> None:
    with pytest.raises(ValidationError, match="delta is between"):
        Study.model_validate({**STUDY, "privacy": {**STUDY["privacy"], "delta": value}})


@pytest.mark.parametrize(
    ("name", "values", "fine"),
    [
        ("noise_multiplier", (0.0999, 10_001.0, 1e100, 5e-324), (0.1, 2, 10_000.0, "auto")),
        ("count_noise", (0.0999, 10_001.0, 1e60), (0.1, 10, 10_000.0)),
        ("clipping_norm", (9e-7, 2e6, 1e-300, 1e300), (1e-6, 1, 1e6)),
    ],
)
def test_absurd_noise_and_clipping_are_refused_with_the_contract(
    name: str, values: tuple[float, ...], fine: tuple[Any, ...]
) -> None:
    for value in values:
        with pytest.raises(ValidationError, match=rf"{name} is between .*, not .*: \w+"):
            Study.model_validate({**STUDY, "privacy": {**STUDY["privacy"], name: value}})
    for value in fine:
        Study.model_validate({**STUDY, "privacy": {**STUDY["privacy"], name: value}})


SHARED = {
    "the same table": ("{kind: table, path: a.csv}", "{kind: table, path: a.csv}"),
    "written in another way": ("{kind: table, path: a.csv}", "{kind: table, path: sub/../a.csv}"),
    "a link": ("{kind: table, path: a.csv}", "{kind: table, path: link.csv}"),
    "the same labels": ("{kind: table, path: a.csv}", "{kind: dicom, path: images, table: a.csv}"),
}


@pytest.mark.parametrize("name", SHARED)
def test_two_assets_over_the_same_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "link.csv").symlink_to("a.csv")
    policy = "policy: {{budgets: {{heart: {{epsilon: 1.0, delta: 1.0e-4}}}}}}"
    text = f"site: north\nassets:\n  heart: {{}}\n  lungs: {{}}\n{policy}\n"
    home = Home(tmp_path)
    home.config_file.write_text(text.format("{kind: table, path: a.csv}", "{kind: table, path: b.csv}"))
    assert set(home.config().assets) == {"heart", "lungs"}
    home.config_file.write_text(text.format(*SHARED[name]))
    with pytest.raises(ConfigurationError, match=r"assets 'heart' and 'lungs' both use .*a.csv.* two budgets"):
        home.config()


def test_the_digest_names_the_policy_with_its_defaults() -> None:
    plain = SitePolicy.model_validate(POLICY)
    written_out = SitePolicy.model_validate({**POLICY, "minimum_patients": 50})
    assert plain.digest == written_out.digest
    assert plain.digest != SitePolicy.model_validate({**POLICY, "minimum_patients": 51}).digest
