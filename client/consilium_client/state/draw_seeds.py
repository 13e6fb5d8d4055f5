"""The seed of a round under way, so that a round which a crash interrupted is the same round again, on the same charge.

One charge pays for one result. The seed fixes which patients are drawn and the noise; it is on the disk before the
charge, and it is deleted once the result is kept, at the latest at the next start. As long as it is there, nothing
that depends on it has left this site, so running it again reveals nothing more: the coordinator gets one result, from
one draw.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.results import Results
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.ledger.chain import Charged
from consilium_shared.ledger.entry import Approve, DpSgd, NonPrivate, Purpose


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round. ``number`` is the ledger's (1 for the first charge of the round)."""

    study: str
    purpose: Purpose
    round: int
    basis: str
    """SHA-256 of the model: another one never runs on this seed."""
    number: int
    seed: bytes

    def __repr__(self) -> str:
        return f"Attempt({self.purpose} of round {self.round}, number {self.number}, seed hidden)"


class DrawSeeds:
    """At most one attempt a study and purpose of the charge, in a file of mode 0600 in the site's store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)

    def begin(self, study: str, purpose: Purpose, round_number: int, basis: str, number: int) -> Attempt:
        """Make and keep a fresh seed; whatever attempt the study had before for this purpose is forgotten."""
        attempt = Attempt(study, purpose, round_number, basis, number, secrets.token_bytes(32))
        content = {"round": round_number, "basis": basis, "number": number, "seed": attempt.seed.hex()}
        write_atomically(self._file(study, purpose), canonical_bytes(content))
        return attempt

    def under_way(self, study: str, purpose: Purpose, round_number: int, basis: str) -> Attempt | None:
        """The attempt at exactly this that a crash left, or None. A damaged file is no attempt."""
        try:
            content = parse_canonical(self._file(study, purpose).read_bytes())
            seed = bytes.fromhex(content["seed"])
            found = Attempt(study, purpose, content["round"], content["basis"], content["number"], seed)
        except (FileNotFoundError, PeerError, KeyError, TypeError, ValueError):
            return None
        return found if (found.round, found.basis) == (round_number, basis) else None

    def end(self, study: str, purpose: Purpose) -> None:
        """Delete the seed."""
        self._file(study, purpose).unlink(missing_ok=True)

    def end_kept(self, results: Results, ledger: LedgerFile) -> None:
        """At a start: what a crash left of rounds whose result is kept ends here, whether anybody asks again or not.

        All of it ran, so its charge is settled in full where that was not done; then the seed goes. So does a file
        that cannot be read.
        """
        for file in self.folder.glob("*.json"):
            study, purpose, _ = file.name.split(".")
            try:
                content = parse_canonical(file.read_bytes())
                number, attempt = int(content["round"]), int(content["number"])
            except (PeerError, KeyError, TypeError, ValueError):
                file.unlink()
                continue
            kept = _kept(results, study, purpose)
            if kept < number:
                continue
            if kept == number:
                _settle_in_full(ledger, study, purpose, number, attempt)
            file.unlink()

    def _file(self, study: str, purpose: Purpose) -> Path:
        return self.folder / f"{study}.{purpose}.json"


def _kept(results: Results, study: str, purpose: str) -> int:
    """The last round whose training, or whose evaluation, is among the results; 0 where none is."""
    training, evaluation = results.about(study, "training"), results.about(study, "evaluation")
    if purpose == "training":
        return training.round if training is not None else 0
    rode = training.round - 1 if training is not None and training.counts and training.counted else 0
    return max(rode, evaluation.round if evaluation is not None else 0)


def _settle_in_full(ledger: LedgerFile, study: str, purpose: str, number: int, attempt: int) -> None:
    with ledger.exclusive():
        for charged in ledger.books.charges.values():
            body = charged.body
            if (body.study, body.purpose, body.round, body.attempt) == (study, purpose, number, attempt):
                steps = _steps(charged, ledger)
                if charged.settled is None and steps is not None:
                    ledger.append("settle", {"charge_seq": charged.seq, "steps": steps})
                return


def _steps(charged: Charged, ledger: LedgerFile) -> int | None:
    """All that the charge paid for; None where a charge without privacy belongs to a study that is withdrawn."""
    body = charged.body
    if isinstance(body.event, DpSgd):
        return body.event.steps
    if isinstance(body.event, NonPrivate) and body.purpose == "training":
        decision = ledger.books.decisions.get(body.study)
        return decision.plan.steps_per_round if isinstance(decision, Approve) else None
    return 1
