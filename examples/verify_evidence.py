"""Verification of a study's evidence, as an auditor's own program would do it.

    python examples/verify_evidence.py [FOLDER FINGERPRINT]

Without arguments it takes the evidence of a whole study that release 0.1 wrote. First the ten steps of
`consilium-audit verify`, each with what it found; then what each hospital spent, recomputed from its ledger; and last
the same evidence with one byte changed, in a copy, which must not verify. It needs no torch.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from consilium_audit.budget import account
from consilium_audit.evidence import VerificationFailed, ledger_file, read_coordinator, read_ledger, read_roster
from consilium_audit.verify import Verification
from consilium_shared.identity import PublicIdentity

FOLDER = Path(__file__).parents[1] / "tests" / "vectors" / "evidence-0.1"
FINGERPRINT = "4883 af5f 8c17 82eb 501f ba08 faee 2cb3"


def verify(folder: Path, fingerprint: str) -> None:
    """Print each step that holds; raises VerificationFailed at the first that does not."""
    verdict = Verification(folder, fingerprint).run()
    for step in verdict.steps:
        print(f"{step.number:>2}  {step.name:<24}{step.says}")
    print(f"study {verdict.study}, {verdict.rounds} rounds; open: {'; '.join(verdict.open) or 'nothing'}\n")


def spent(folder: Path) -> None:
    """Print ε of each hospital's assets and studies, recomputed from the events in its ledger."""
    for member in read_roster(folder, read_coordinator(folder)).members:
        file = ledger_file(folder, member.site)
        if file is None:
            print(f"{member.site}: no ledger was handed over")
            continue
        ledger = read_ledger(file, member.site, PublicIdentity.from_hex(member.identity))
        for asset in account(ledger).assets:
            studies = ", ".join(f"{study.name} {study.epsilon:.2f}" for study in asset.studies)
            print(f"{member.site}, {asset.asset}: ε {asset.epsilon:.2f} of {asset.limit:.1f} ({studies})")


def forge(folder: Path, fingerprint: str) -> bool:
    """Whether a copy of the evidence still verifies in which one digit of a hospital's ledger is another one."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "evidence"
        shutil.copytree(folder, copy)
        file = sorted(copy.glob("*.jsonl"))[0]
        text = file.read_bytes()
        place = text.index(b'"epsilon":') + len(b'"epsilon":')
        file.write_bytes(text[:place] + (b"9" if text[place : place + 1] != b"9" else b"8") + text[place + 1 :])
        try:
            Verification(copy, fingerprint).run()
        except VerificationFailed as failure:
            print(f"\none digit changed in {file.name}: refused at step {failure.step}, line {failure.line}")
            return False
        return True


def main(arguments: list[str]) -> int:
    """Verify the folder that the arguments name; the exit status is 0 where it verifies."""
    folder, fingerprint = (Path(arguments[0]), arguments[1]) if len(arguments) == 2 else (FOLDER, FINGERPRINT)
    try:
        verify(folder, fingerprint)
    except VerificationFailed as failure:
        print(f"refused at step {failure.step}: {failure}")
        return 1
    spent(folder)
    return 1 if forge(folder, fingerprint) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
