"""Files handed to an auditor, and the failure of one that does not verify. Reads; judges nothing.

A folder holds the coordinator's evidence of one study (``consilium-server evidence``) and each site's ledger, as
``<site>.jsonl`` or ``<site>/ledger.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from consilium_audit.handed import read_file, read_lines, there
from consilium_shared import documents
from consilium_shared.errors import ConfigurationError, IntegrityError, LedgerError, PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import LINE_BYTES, Entry
from consilium_shared.ledger.verify import LedgerVerifier, VerifiedLedger
from consilium_shared.printable import printable
from consilium_shared.protocol import roster
from consilium_shared.protocol.roster import Roster, parse_roster

COORDINATOR = "coordinator.json"
ROSTER = "roster.json"
CONTRACT = "contract.json"
ROUNDS = "rounds"
CLOSING = "closing"
CARD = "card.json"
MODEL = "model.safetensors"

STEPS = {
    1: "coordinator and roster",
    2: "round records",
    3: "chain of models",
    4: "signatures of sites",
    5: "ledgers",
    6: "ledger heads",
    7: "witnessed records",
    8: "charges and releases",
    9: "privacy spent",
    10: "model card",
}
"""The steps of a verification, in order; ``verify.py`` says what each checks."""


class VerificationFailed(IntegrityError):
    """Something does not verify.

    Attributes:
        step: a key of ``STEPS``.
        file: the file that shows it.
        line: 1-based line of that file, or None when the whole file is meant.
        why: what is wrong, without the place.
    """

    def __init__(self, step: int, file: Path, line: int | None, why: str) -> None:
        place = f"{file}, line {line}" if line is not None else str(file)
        super().__init__(printable(f"does not verify, step {step} ({STEPS[step]}): {place}: {why}"))
        self.step = step
        self.file = file
        self.line = line
        self.why = why


@contextmanager
def checking(step: int, file: Path) -> Iterator[None]:
    """Turn errors inside into a failure of this step at this file."""
    try:
        yield
    except LedgerError as error:
        why = str(error).removeprefix(f"line {error.line}: ")
        raise VerificationFailed(step, file, error.line, why) from error
    except (PeerError, ConfigurationError) as error:
        raise VerificationFailed(step, file, None, str(error)) from error
    except OSError as error:
        raise VerificationFailed(step, file, None, f"cannot be read: {error.strerror}") from error


LEDGER_BYTES = 256 * 1024**2
"""Largest ledger: two studies of 10,000 rounds with 100 sites have as much, an ordinary one some 100 KiB."""


def read_ledger(
    file: Path, site: str, key: PublicIdentity, on_line: Callable[[int], None] = lambda size: None
) -> VerifiedLedger:
    """The ledger in a file, verified line by line, so that the first wrong one ends it.

    Args:
        file: of at most ``LEDGER_BYTES``.
        site, key: whose ledger it is.
        on_line: told the bytes of each line that verified.

    Raises:
        LedgerError: the first step that fails, with the line.
        PeerError, OSError: as ``handed.read_file``.
    """
    verifier, entries = LedgerVerifier(site, key), list[Entry]()
    for line in read_lines(file, LINE_BYTES + 1, LEDGER_BYTES):
        if len(line) > LINE_BYTES + 1:
            number = verifier.head.seq + 1
            raise LedgerError(f"line {number}: step 1: it has more than {LINE_BYTES} bytes", line=number, step=1)
        entries += verifier.check(line, on_line)
    return VerifiedLedger(site, tuple(entries), verifier.head, verifier.books)


def read_coordinator(folder: Path) -> PublicIdentity:
    """The public key in the evidence; whose it is, only comparing its fingerprint tells.

    Raises:
        ConfigurationError: the folder holds no evidence.
        VerificationFailed: the file is not a key.
    """
    file = folder / COORDINATOR
    if not there(file):
        raise ConfigurationError(
            f"{file} is missing, so {folder} holds no evidence of a study; the coordinator makes it with "
            f"consilium-server evidence STUDY {folder}"
        )
    with checking(1, file):
        try:
            value = json.loads(read_file(file))
        except (ValueError, RecursionError) as error:
            raise PeerError("not JSON") from error
        if not isinstance(value, dict) or set(value) != {"coordinator"} or not isinstance(value["coordinator"], str):
            raise PeerError("it has the coordinator's public key, and nothing else")
        return PublicIdentity.from_hex(value["coordinator"])


def read_roster(folder: Path, coordinator: PublicIdentity) -> Roster:
    """The roster, verified; raises VerificationFailed."""
    file = folder / ROSTER
    with checking(1, file):
        body, signature = documents.parse(read_file(file))
        documents.verify(body, signature, roster.DOMAIN, coordinator)
        return parse_roster(body, str(body.get("federation")))


def ledger_file(folder: Path, site: str) -> Path | None:
    """Path of that site's ledger in the folder, or None.

    Raises:
        ConfigurationError: it stands there twice.
    """
    own = folder / site
    inside = own if own.is_symlink() else own / "ledger.jsonl"  # a link may lead anywhere: refused when it is read
    found = [file for file in (folder / f"{site}.jsonl", inside) if there(file)]
    if len(found) > 1:
        raise ConfigurationError(f"{found[0]} and {found[1]}: which of the two is the ledger of {site}? Keep one")
    return found[0] if found else None


def read_ledgers(
    folder: Path, members: Roster, on_line: Callable[[int], None] = lambda size: None
) -> dict[str, tuple[Path, VerifiedLedger]]:
    """Every ledger that the folder has of the roster's sites, verified, by site.

    Args:
        folder: the evidence.
        members: whose ledgers to look for.
        on_line: told the bytes of each line that verified.

    Raises:
        VerificationFailed: the first that does not verify.
    """
    found: dict[str, tuple[Path, VerifiedLedger]] = {}
    for member in members.members:
        file = ledger_file(folder, member.site)
        if file is not None:
            with checking(5, file):
                key = PublicIdentity.from_hex(member.identity)
                found[member.site] = file, read_ledger(file, member.site, key, on_line)
    return found
