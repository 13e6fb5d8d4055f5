"""Seeds of rounds under way, so that a round which a crash interrupted is the same round again, on the same charge.

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
class Use:
    """One use of a study's data that is charged: the training of a round, or the evaluation of its model.

    Attributes:
        purpose: ``training`` or ``evaluation``.
        round: 1 … the study's rounds; an evaluation has the number of the round that made its model.
        model: SHA-256 of the global model that is trained or evaluated.
    """

    purpose: Purpose
    round: int
    model: str


class DrawSeeds:
    """Seeds of draws under way: at most one for each study and purpose, in a file of mode 0600 in the site's store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        remove_leftovers(folder)

    def begin(self, study: str, use: Use, number: int) -> bytes:
        """Make and keep a fresh seed of 32 bytes; whatever seed the study had for this purpose is forgotten.

        Args:
            study: its digest.
            use: what is drawn for; another model never runs on this seed.
            number: number of the charge that pays for it, among those of the round and purpose; 1 for the first.
        """
        seed = secrets.token_bytes(32)
        content = {"round": use.round, "basis": use.model, "number": number, "seed": seed.hex()}
        write_atomically(self._file(study, use.purpose), canonical_bytes(content))
        return seed

    def under_way(self, study: str, use: Use) -> tuple[int, bytes] | None:
        """Number of the charge and seed of exactly this use, as a crash left them, or None. A damaged file is none."""
        try:
            content = parse_canonical(self._file(study, use.purpose).read_bytes())
            number, seed = content["number"], bytes.fromhex(content["seed"])
            kept = Use(use.purpose, content["round"], content["basis"])
        except (FileNotFoundError, PeerError, KeyError, TypeError, ValueError):
            return None
        return (number, seed) if kept == use else None

    def end(self, study: str, purpose: Purpose) -> None:
        """Delete the seed."""
        self._file(study, purpose).unlink(missing_ok=True)

    def end_kept(self, results: Results, ledger: LedgerFile) -> None:
        """End, at a start, the draws whose result is kept, whether anybody asks again or not.

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
    """Steps that the charge paid for; None where a charge without privacy belongs to a study that is withdrawn."""
    body = charged.body
    if isinstance(body.event, DpSgd):
        return body.event.steps
    if isinstance(body.event, NonPrivate) and body.purpose == "training":
        decision = ledger.books.decisions.get(body.study)
        return decision.plan.steps_per_round if isinstance(decision, Approve) else None
    return 1
