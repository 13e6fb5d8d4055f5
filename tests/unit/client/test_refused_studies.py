"""A study that the hospital's rules forbid: seen by its people with the rule and the remedy, bounded, and not lost."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from consilium_client.commands import cli
from consilium_client.policy import SitePolicy, check_contract, objections
from consilium_shared import limits
from consilium_shared.errors import PolicyRefusal
from consilium_shared.protocol.messages import ApprovalStatus, Refusal, Update
from consilium_shared.study import Study

STRICT = "maximum_epsilon: 1.5\n  minimum_sites: 3"


@pytest.fixture
def strict(new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any], connect: Callable[[Any], Any]) -> Any:
    """A site that has refused the study, by two rules."""
    coordinator = new_coordinator(policy=STRICT)
    site = connect(new_site(coordinator))
    assert refused(site, coordinator.study) == "policy"
    return site


def refused(site: Any, study: Study) -> str:
    answer = site.ask(site.coordinator.propose(study))
    assert isinstance(answer, Refusal)
    return answer.reason


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_it_is_listed_with_its_digest_and_shown_with_every_rule_and_what_would_permit_it(
    strict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    study = strict.coordinator.study
    cli.studies(as_json=True)
    (listed,) = json.loads(capsys.readouterr().out)
    about = ("synthetic-study", study.version, study.digest, "refused")
    assert tuple(listed[key] for key in ("study", "version", "digest", "state")) == about
    assert [each["remedy"] for each in listed["refused"]] == ["policy.minimum_sites: 2", "policy.maximum_epsilon: 2"]
    cli.show("synthetic-study")
    shown = printed(capsys)
    assert study.digest in shown
    assert "the study adds up 2 sites, this site asks for 3" in shown
    assert (
        "the study asks for ε 2, this site permits 1.5 to permit it, in site.yaml: policy.maximum_epsilon: 2" in shown
    )


def test_it_cannot_be_approved_as_long_as_a_rule_forbids_it(strict: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = strict.kinds()
    monkeypatch.setattr("typer.confirm", lambda _: pytest.fail("asked for what cannot be"))
    for yes in (True, False):
        with pytest.raises(PolicyRefusal, match=r"asks for 3 \(to permit it, in site.yaml: policy.minimum_sites: 2\)"):
            cli.approve("synthetic-study", by="Dr Synthetic", yes=yes)
    proposal = strict.service.proposals.find("synthetic-study")
    with pytest.raises(PolicyRefusal):
        strict.service.approvals.approve(proposal, "somebody without the program")
    assert strict.kinds() == before
    assert strict.service.proposals.get(proposal.study.digest) is None


@pytest.mark.parametrize("asks_again", [True, False])
def test_after_the_rules_were_changed_it_is_approved_without_a_new_study(
    strict: Any, connect: Callable[[Any], Any], asks_again: bool
) -> None:
    c = strict.coordinator
    file = c.site.config_file
    file.write_text(file.read_text().replace(STRICT, "maximum_epsilon: 2"))
    strict.restart()
    connect(strict)
    if asks_again:
        assert isinstance(strict.ask(c.propose()), ApprovalStatus)
    assert strict.service.proposals.find("synthetic-study").study == c.study
    cli.approve("synthetic-study", by="Dr Synthetic", yes=True)
    assert strict.ask(c.propose()).state == "approved"
    assert isinstance(strict.ask(c.train(), c.model), Update)
    assert not list(strict.service.proposals.refused.glob("*.json"))


def test_the_log_names_study_rule_and_round_and_the_ledger_has_the_rule(
    strict: Any, caplog: pytest.LogCaptureFixture
) -> None:
    c = strict.coordinator
    named = f"study synthetic-study ({c.study.digest[:12]})"
    with caplog.at_level(logging.INFO, "consilium.agent"):
        strict.ask(c.propose())
        strict.ask(c.train(2), c.model)
    assert f"propose {named}: refused, policy: the study adds up 2 sites, this site asks for 3" in caplog.text
    assert f"train study {c.study.digest[:12]} round 2: refused, unknown-study: " in caplog.text
    assert "round None" not in caplog.text
    (entry,) = (e.body for e in strict.service.ledger.entries if e.kind == "refuse" and e.body.reason == "policy")
    assert (entry.study, entry.detail) == (c.study.digest, "the study adds up 2 sites, this site asks for 3")


def test_an_asset_that_the_site_lacks_is_said_with_what_is_missing(
    site: Any, connect: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    contract = site.coordinator.study.contract
    other = Study.model_validate({**contract, "study": "other", "data": {**contract["data"], "asset": "lungs"}})
    assert refused(connect(site), other) == "policy"
    cli.show("other")
    shown = printed(capsys)
    assert "this site has no budget for an asset 'lungs'" in shown
    assert "this site has no asset 'lungs' to permit it, in site.yaml: assets.lungs: where its files lie" in shown


def test_what_came_first_goes_when_a_coordinator_sends_refused_studies_without_end(
    strict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REFUSED_PROPOSALS", 3)
    proposals = strict.service.proposals
    for number in range(7):
        study = Study.model_validate({**strict.coordinator.study.contract, "study": f"flood-{number}"})
        assert refused(strict, study) == "policy"
        for file in proposals.refused.glob("*.json"):  # file systems count time in steps
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
    assert [each.study.study for each in proposals.all()] == ["flood-4", "flood-5", "flood-6"]
    assert proposals.digests() == [], "they take no place of those that can be decided on"


def test_a_study_that_a_later_policy_forbids_stays_approved_and_says_what_stops_it(
    site: Any, connect: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    site.approve()
    file = site.coordinator.site.config_file
    file.write_text(file.read_text().replace("policy:\n", "policy:\n  maximum_epsilon: 1.0\n"))
    site.restart()
    connect(site)
    cli.show("synthetic-study")
    assert "this site permits 1 to permit it, in site.yaml: policy.maximum_epsilon: 2" in printed(capsys)
    cli.studies(as_json=True)
    assert json.loads(capsys.readouterr().out)[0]["state"] == "approved"


BUDGET = {"synthetic-table": {"epsilon": 5.0, "delta": 1e-3}}
OPEN = {"privacy": {"mode": "none"}, "evaluation": {}}


@pytest.mark.parametrize(
    ("policy", "study"),
    [
        ({"tasks": ["image-classification"]}, {}),
        ({"studies": ["sepsis"]}, {}),
        ({"minimum_sites": 4}, {}),
        ({"corrupt_sites": 3}, {}),
        ({"threat_models": ["honest-but-curious"]}, {}),
        ({"maximum_epsilon": 0.3}, {}),
        ({"maximum_count_noise": 2.5}, {}),
        ({}, OPEN),
        ({"same_sites_without_privacy": True}, OPEN),
        ({"tasks": ["image-classification"], "studies": [], "minimum_sites": 9, "maximum_epsilon": 0.01}, {}),
    ],
)
def test_the_remedies_together_permit_the_study(
    contract: dict[str, Any], policy: dict[str, Any], study: dict[str, Any]
) -> None:
    asked, written = Study.model_validate({**contract, **study}), {"budgets": json.loads(json.dumps(BUDGET)), **policy}
    against = objections(SitePolicy.model_validate(written), asked, 5)
    assert against
    for each in against:
        where, value = each.remedy.split(": ", 1)
        *above, key = where.removeprefix("policy.").split(".")
        place = written
        for step in above:
            place = place[step]
        if value.startswith("add "):
            place[key] = [*place[key], value.removeprefix("add ")]
        else:
            place[key] = yaml.safe_load(value.split(",")[0])
    check_contract(SitePolicy.model_validate(written), asked)
    assert not objections(SitePolicy.model_validate(written), asked, 5)
