"""The command that audits a study: which plan it runs, what it says, what it enters, when it raises the alarm."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import typer

from consilium_client.agent.administration import Administration
from consilium_client.commands import canary_audit, cli
from consilium_client.training import canaries, fit
from consilium_client.training.trainer import train as train_of_the_rounds
from consilium_shared.canonical import canonical_digest
from consilium_shared.console import INTERNAL
from consilium_shared.errors import ConfigurationError, MachineError
from consilium_shared.ledger.entry import Audit
from consilium_shared.privacy.canaries import Outcome, compare
from consilium_shared.study import Study
from dpsgd.noise import Noise

NAME = "synthetic-study"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, connect: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``asked(site)``: the site's commands reach its agent without a socket; number and canaries never change."""

    whole = canaries.audit
    monkeypatch.setattr(canaries, "audit", lambda *args, **kept: whole(*args, **kept, seed=bytes(32)))
    monkeypatch.setattr(secrets.SystemRandom, "gauss", lambda *_: 0.0)  # what an audit shows depends on the plan
    return connect


@pytest.fixture
def running(site: Any, asked: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A site with a proposal."""
    site.ask(site.coordinator.propose())
    monkeypatch.setenv("CONSILIUM_SITE_HOME", str(site.coordinator.site.root))
    return asked(site)


def audit(running: Any, canaries: int = 30, **options: Any) -> None:
    cli.audit_canaries(NAME, home=running.coordinator.site.root, by="Dr Synthetic", canaries=canaries, **options)


def test_an_audit_of_the_approved_plan_stands_in_the_ledger_and_charges_nothing(
    running: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    running.approve()
    audit(running, as_json=True)
    entry = running.service.ledger.entries[-1]
    told = json.loads(capsys.readouterr().out)
    plan = running.service.spending.approval(running.coordinator.study.digest).plan
    assert isinstance(entry.body, Audit)
    assert (entry.seq, entry.body.by) == (told["entry"], "Dr Synthetic")
    assert entry.body.plan == canonical_digest(plan.to_dict())
    assert (entry.body.canaries, entry.body.guesses, entry.body.correct) == (30, told["guesses"], told["correct"])
    assert told["contradiction"] is None
    assert running.charges() == 0


def test_the_plan_of_a_study_that_nobody_decided_on_can_be_audited_before(running: Any) -> None:
    audit(running)
    assert running.service.ledger.entries[-1].kind == "audit"
    assert running.service.spending.approval(running.coordinator.study.digest) is None


def test_what_is_said_names_both_bounds_the_power_and_that_nobody_was_needed(
    running: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    audit(running, canaries=300)
    said = " ".join(capsys.readouterr().out.split())
    for part in ("proven", "measured", "95% confidence", "no patient's data, no budget", "coins alone would give"):
        assert part in said
    assert said.index("power had everything leaked, 300 canaries would prove") < said.index("guesses who of 300")


def test_an_audit_that_cannot_fail_says_so_before_it_runs_and_gives_no_verdict(
    running: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium_shared.privacy.canaries.epsilon", lambda events, delta: 4.0)
    planned = canary_audit.Planned.of(canary_audit.Audited.of(Administration(running.service).plan(NAME)), 30)
    before = " ".join(" ".join(planned.lines()).split())
    assert "whatever leaks, this audit cannot fail" in before and "the sharpest number here is --canaries" in before
    audit(running)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("power") and "verdict none: an audit with so many canaries cannot contradict" in said


def test_a_plan_that_allows_more_than_any_audit_shows_is_said_to(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consilium_shared.privacy.canaries.epsilon", lambda events, delta: 40.0)
    planned = canary_audit.Planned.of(canary_audit.Audited.of(Administration(running.service).plan(NAME)), 2000)
    assert "no number of canaries could" in " ".join(planned.lines())


def test_how_many_right_guesses_prove_anything_is_told(running: Any) -> None:
    """Of 348 right ones of 400 at a δ of a thousandth nothing is proven, and it is said why."""
    audited = canary_audit.Audited.of(Administration(running.service).plan(NAME))
    planned = canary_audit.Planned.of(audited, 2000)
    outcome = Outcome(2000, 400, 348)
    events = [audited.plan.event(audited.plan.rounds)]
    for delta, why in ((1e-3, "not even 400 right ones would prove anything"), (1e-6, "")):
        said = canary_audit.Result(audited, outcome, compare(outcome, events, delta), planned.power).lines()
        assert "coins alone would give 200" in said[2] and why in said[3]
        assert ("ε 0.000" in said[3]) == (delta == 1e-3)


@pytest.mark.parametrize("engine", ["book-keeping", "opacus"])
def test_the_audit_computes_as_the_sites_rounds_do(running: Any, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ways = running.coordinator.site.config_file, set[str]()
    whole = train_of_the_rounds

    def train(*args: Any, **kept: Any) -> Any:
        ways.add(kept["engine"])
        return whole(*args, **kept)

    config.write_text(config.read_text() + f"gradients: {engine}\n")
    monkeypatch.setattr(canaries, "train", train)
    audit(running)
    assert ways == {engine}


def test_the_audit_computes_where_and_in_the_pieces_that_this_machine_passed(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which several patients in one piece depend on one another computes each alone, here too."""
    whole = train_of_the_rounds
    computed: set[tuple[str, Any]] = set()

    def train(*args: Any, **kept: Any) -> Any:
        computed.add((str(kept["device"]), kept["rows"]))
        return whole(*args, **kept)

    def dependent(study: Study, where: Any, engine: str, rows: int) -> str:
        return "" if rows == 1 else "a record's result depends on another's"

    monkeypatch.setattr(fit, "dependence", dependent)
    monkeypatch.setattr(canaries, "train", train)
    audit(running)
    assert computed == {("cpu", 1)}


def test_a_machine_that_computes_no_private_round_audits_none(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "dependence", lambda *_: "a record's result depends on another's")
    with pytest.raises(MachineError, match="depends on another's"):
        audit(running)
    assert all(entry.kind != "audit" for entry in running.service.ledger.entries)


def test_the_audit_reads_no_patients_file(running: Any) -> None:
    running.approve()
    (running.coordinator.site.root / "synthetic.csv").unlink()
    audit(running)
    assert running.service.ledger.entries[-1].kind == "audit"


def test_more_than_the_plan_allows_raises_the_alarm_and_is_entered_all_the_same(
    running: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noise, "add_to", lambda self, total, deviation: None)
    monkeypatch.setattr("consilium_shared.privacy.canaries.epsilon", lambda events, delta: 0.5)
    with pytest.raises(typer.Exit) as stopped:
        audit(running, canaries=300)
    assert stopped.value.exit_code == INTERNAL
    assert "DEFECT" in capsys.readouterr().err
    assert running.service.ledger.entries[-1].kind == "audit"


def test_a_plan_that_is_not_the_one_audited_is_not_entered(running: Any) -> None:
    told = Administration(running.service).plan(NAME)
    other = {**told["plan"], "noise_multiplier": told["plan"]["noise_multiplier"] + 1}
    with pytest.raises(ConfigurationError, match="another plan"):
        Administration(running.service).audit(NAME, other, 10, 2, 1, "Dr Synthetic")


def test_a_study_without_privacy_has_nothing_to_audit(
    new_coordinator: Callable[..., Any], new_site: Callable[[Any], Any], asked: Callable[[Any], Any]
) -> None:
    coordinator = new_coordinator(epsilon="unlimited", policy="allow_without_privacy: true")
    contract = {**coordinator.study.contract, "privacy": {"mode": "none"}}
    coordinator.study = Study.model_validate({**contract, "evaluation": {"epsilon": None}})
    site = asked(new_site(coordinator))
    site.ask(coordinator.propose())
    with pytest.raises(ConfigurationError, match="promises no bound"):
        audit(site)
