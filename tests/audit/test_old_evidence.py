"""What release 0.1 wrote verifies for ever, and no changed byte of it does: formats only grow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from consilium_audit import page
from consilium_audit.evidence import VerificationFailed
from consilium_audit.report import make_report
from consilium_audit.verify import Verification

FOLDER = Path(__file__).parents[1] / "vectors" / "evidence-0.1"
FINGERPRINT = "4883 af5f 8c17 82eb 501f ba08 faee 2cb3"
SITES = {"hospital-a", "hospital-b", "hospital-c", "hospital-d"}
EDITED = {
    "coordinator.json": (1,),
    "roster.json": (1,),
    "contract.json": (1, 2),
    "rounds/0001.json": (2,),
    "rounds/0006.json": (2,),
    "closing/hospital-c.json": (4,),
    "hospital-b.jsonl": (5,),
    "card.json": (10,),
    "model.safetensors": (10,),
}
"""A file of each kind, and the step that finds a change in it. (What still reads as a contract is another study's,
which the records are not of: step 2.)"""
PLACES = 7


def test_evidence_of_release_0_1_verifies_whole() -> None:
    verdict = Verification(FOLDER, FINGERPRINT).run()
    assert [step.number for step in verdict.steps] == list(range(1, 11))
    assert (verdict.study, verdict.rounds, verdict.unchecked, verdict.notes) == ("demo-xray", 6, (), [])
    assert set(verdict.witnessed) == SITES and all(behind > 90 for behind, _ in verdict.witnessed.values())


def test_a_report_is_made_of_evidence_of_release_0_1() -> None:
    report = make_report(FOLDER, FINGERPRINT)
    assert (report.state, report.left_out) == ("verified", {})
    assert report.metrics is not None and report.metrics["sites"] == len(SITES)
    assert {site.site for site in report.sites} == SITES and b"VERIFIED" in page.render(report)


@pytest.mark.parametrize("name", EDITED)
def test_no_changed_byte_of_it_verifies(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "evidence"
    shutil.copytree(FOLDER, copy)
    file = copy / name
    faithful = file.read_bytes()
    for place in {round(part * (len(faithful) - 1) / (PLACES - 1)) for part in range(PLACES)}:
        changed = bytearray(faithful)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(VerificationFailed) as caught:
            Verification(copy, FINGERPRINT).run()
        assert caught.value.step in EDITED[name], (place, caught.value)
        file.write_bytes(faithful)
    assert len(Verification(copy, FINGERPRINT).run().steps) == 10
