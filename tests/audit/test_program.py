"""The auditor's program on faithful evidence, and what it says at the terminal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consilium_audit import cli
from consilium_server.commands.evidence import collect
from consilium_server.federation import Home as ServerHome
from consilium_shared.errors import ConfigurationError
from consilium_shared.privacy.accountant import calibrate_noise, epsilon
from consilium_shared.privacy.event import DpSgdEvent, GaussianEvent

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""
SITES = ("north", "south", "west")
ROUNDS = 3


# -- faithful


def test_a_faithful_federation_verifies_in_every_step(evidence: Evidence) -> None:
    verdict = evidence.verified(evidence.coordinator.public.fingerprint)
    assert [step.number for step in verdict.steps] == list(range(1, 11))
    assert (verdict.study, verdict.rounds, verdict.unchecked, verdict.notes) == ("sepsis", ROUNDS, (), [])
    for site, (witnessed, entries) in verdict.witnessed.items():
        assert (witnessed, entries) == (entries - 1, len(evidence.ledger(site).read_bytes().splitlines()))


def test_a_federation_without_privacy_verifies_too_but_may_not_claim_an_epsilon(without_privacy: Evidence) -> None:
    evidence = without_privacy
    assert len(evidence.verified().steps) == 10
    said = evidence.body(evidence.record(2))["epsilon"]
    evidence.resign(r2={"epsilon": {**said, "north": 50.0}})
    assert "unbounded" in evidence.fails(9, evidence.record(2))


def test_ledgers_may_lie_in_folders_as_the_sites_have_them(evidence: Evidence) -> None:
    for site in SITES:
        (evidence.root / site).mkdir()
        evidence.ledger(site).rename(evidence.root / site / "ledger.jsonl")
    assert evidence.verified().unchecked == ()
    evidence.ledger("north").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="which of the two"):
        evidence.verified()


def test_the_evidence_of_an_unfinished_study_verifies_as_far_as_it_goes(evidence: Evidence) -> None:
    (evidence.root / "card.json").unlink()
    shutil.rmtree(evidence.root / "closing")
    evidence.record(3).unlink()
    for site in SITES:  # as it was in the middle of round 3
        lines = evidence.ledger(site).read_bytes().splitlines(keepends=True)
        evidence.ledger(site).write_bytes(b"".join(lines[: evidence.seq_of(site, "witness", -1) - 1]))
    verdict = evidence.verified()
    assert verdict.rounds == 2 and "there is none" in verdict.steps[-1].says
    assert any("north was charged for round 3" in note for note in verdict.notes)
    assert not any("countersigned" in note for note in verdict.notes), "nobody was asked to yet"


# -- the program


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["consilium-audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_program_says_what_failed_where_and_ends_with_six(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = ("--coordinator", evidence.coordinator.public.fingerprint)
    assert run(monkeypatch, "verify", evidence.root, *coordinator, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["verified"], whole["compared"], whole["open"]) == (True, True, [])
    lines = evidence.ledger("south").read_bytes().splitlines(keepends=True)
    evidence.ledger("south").write_bytes(b"".join(lines[:4]))
    assert run(monkeypatch, "verify", evidence.root, *coordinator, "--json") == 6
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] is False and len(told["steps"]) == 5
    assert (told["failed"]["step"], Path(told["failed"]["file"]).name, told["failed"]["line"]) == (6, "south.jsonl", 4)
    assert run(monkeypatch, "verify", evidence.root) == 6
    shown = capsys.readouterr()
    assert "VERIFIED" not in shown.out and "cut off" in " ".join(shown.err.split()) and "Traceback" not in shown.err


def test_a_missing_ledger_is_named_and_passes_only_when_that_was_asked_for(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence.ledger("west").unlink()
    coordinator = ("--coordinator", evidence.coordinator.public.fingerprint)
    assert run(monkeypatch, "verify", evidence.root, *coordinator) == 2
    shown = capsys.readouterr()
    assert "VERIFIED IN PART" in shown.out and "west" in shown.err and "--coordinator" not in shown.err
    assert run(monkeypatch, "verify", evidence.root, *coordinator, "--partial", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["verified"], told["unchecked"]) == (False, ["west"]) and "west are missing" in told["open"][0]


@pytest.mark.parametrize("command", ["verify", "report"])
@pytest.mark.parametrize("options", [(), ("--partial",), ("--json",), ("--json", "--partial")], ids=str)
def test_under_a_key_that_was_compared_with_nothing_no_evidence_is_verified(
    evidence: Evidence,
    command: str,
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever made up a whole federation signed everything in it."""
    page = tmp_path / "page.html"
    more = ("--output", page) if command == "report" else ()
    assert run(monkeypatch, command, evidence.root, *options, *more) == 2
    shown = capsys.readouterr()
    assert "give it with --coordinator" in " ".join(shown.err.split())
    if "--json" in options:
        told = json.loads(shown.out)
        assert not told.get("verified") and told.get("state") in (None, "verified in part")
        assert "compared with nothing" in told["open"][0]
    else:
        assert "VERIFIED IN PART" in shown.out
    if command == "report":
        assert b"VERIFIED IN PART" in page.read_bytes() and b"\xe2\x9c\x93 VERIFIED" not in page.read_bytes()


def test_a_folder_without_evidence_is_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "verify", tmp_path) == 2
    assert run(monkeypatch, "verify", tmp_path / "nowhere") == 2
    for content, status in (("{}", 6), ("[" * 100_000, 6), ('{"coordinator": "zz"}', 6)):
        (tmp_path / "coordinator.json").write_text(content)
        assert run(monkeypatch, "verify", tmp_path) == status
        assert run(monkeypatch, "budget", tmp_path) == status
    assert "defect" not in capsys.readouterr().err


def test_the_budget_is_recomputed_from_events_whatever_the_file_says(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flattering(lines: list[Line]) -> list[Line]:
        for line in lines:
            if line[2] == "charge":
                line[3]["epsilon_after"] = 0.0
        return lines

    evidence.rewrite("south", flattering)
    evidence.rewrite("north", flattering)
    assert run(monkeypatch, "budget", evidence.root, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (south,) = told["south"]["assets"]["icu"]["studies"]
    beside = [GaussianEvent(10.0), *[GaussianEvent(calibrate_noise(1.0, ROUNDS, 1.0, 1e-4))] * ROUNDS]
    crashed = epsilon([*beside, DpSgdEvent(0.05, 1.5, 5 * (ROUNDS + 1))], 1e-4)
    assert south["epsilon"] == crashed, "the crashed attempt counts"
    assert (south["rounds"], south["unsettled"], south["delta"], south["approved"]) == (ROUNDS, 1, 1e-4, 3.0)
    north = told["north"]["assets"]["icu"]
    both = epsilon([*beside, DpSgdEvent(0.05, 2.0, 2), DpSgdEvent(0.05, 1.5, 5 * ROUNDS)], 1e-4)
    assert north["epsilon"] == pytest.approx(both, abs=1e-9) and north["left"] == pytest.approx(6.0 - both, abs=1e-9)
    assert told["north"]["refusals"] == [{"study": "b" * 64, "reason": "policy", "count": 1}]


def test_one_ledger_needs_its_sites_key(
    evidence: Evidence, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, key = evidence.ledger("south"), evidence.sites["south"].public.hex()
    assert run(monkeypatch, "budget", ledger) == 2
    assert run(monkeypatch, "budget", ledger, "--identity", "south") == 2
    assert run(monkeypatch, "budget", ledger, "--identity", evidence.sites["north"].public.hex()) == 6
    capsys.readouterr()
    assert run(monkeypatch, "budget", ledger, "--identity", key) == 0
    assert "sepsis" in capsys.readouterr().out
    moved = ledger.rename(evidence.root / "copy.jsonl")
    assert run(monkeypatch, "budget", moved, "--identity", key) == 6
    assert run(monkeypatch, "budget", moved, "--identity", key, "--site", "south") == 0


def test_the_auditors_program_loads_neither_torch_nor_flwr() -> None:
    code = "import sys, consilium_audit.cli; print({'torch', 'flwr', 'opacus', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- the coordinator's part


def test_evidence_holds_no_secret_and_never_overwrites(faithful: Evidence, tmp_path: Path) -> None:
    server = ServerHome(faithful.root.parent / "server")
    files = collect(server, "sepsis", tmp_path / "again")
    records = [f"rounds/000{number}.json" for number in (1, 2, 3)]
    closings = [f"closing/{site}.json" for site in SITES]
    assert files == ["card.json", *closings, "contract.json", "coordinator.json", "roster.json", *records]
    secrets = [file.read_bytes() for file in server.keys.iterdir() if file.suffix == ".key"]
    for file in files:
        data = (tmp_path / "again" / file).read_bytes()
        assert b"PRIVATE" not in data and all(secret not in data for secret in secrets)
    with pytest.raises(ConfigurationError, match="exists already"):
        collect(server, "sepsis", tmp_path / "again")
    with pytest.raises(ConfigurationError, match="no study"):
        collect(server, "other", tmp_path / "other")
