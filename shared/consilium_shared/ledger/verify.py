"""Check of a ledger: whole, in order, and the site's own. For anybody who has the file and the site's public key.

Steps, each of which raises LedgerError with its number and the line:

    1. The file consists of whole lines, each ending in a newline, none empty or longer than ``LINE_BYTES``.
    2. Each line is canonical JSON.
    3. It has exactly the fields of an entry, and its body exactly those of its kind, with values in their ranges.
    4. Entries are numbered 1, 2, 3, … without a gap.
    5. ``prev`` is the SHA-256 of the line before; of the first, the genesis of this site and key.
    6. ``sig`` is the site's Ed25519 signature over the rest of the entry.
    7. Time never goes back.
    8. The entry fits those before it: what ``chain.Books`` says. Where a ``witness`` entry shows a head of this very
       ledger, it is the entry with that number.

Left to the caller: **a ledger whose last lines were cut off, or that was rolled back to an earlier state, passes.**
Only somebody else's copy of a later head shows that; compare ``head`` with those that other parties hold. What
the entries cost is not computed here either, and ``epsilon_after`` is not believed (``privacy/accountant.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from consilium_shared.errors import LedgerError, SignatureError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.chain import Books, LedgerHead, genesis, split_lines
from consilium_shared.ledger.entry import DOMAIN, LINE_BYTES, Entry, decode_entry, decode_json, line_digest


@dataclass(frozen=True)
class VerifiedLedger:
    """A ledger that passed every step.

    Attributes:
        site: name of the site.
        entries: in order.
        head: its last entry.
        books: what the entries say.
    """

    site: str
    entries: tuple[Entry, ...]
    head: LedgerHead
    books: Books


class LedgerVerifier:
    """The state of a verification between two lines; grows by one line at a time."""

    def __init__(self, site: str, public: PublicIdentity) -> None:
        self.site = site
        self.public = public
        self.head = genesis(site, public)
        self.books = Books(site)
        self.time = ""

    def check(self, data: bytes, on_line: Callable[[int], None] = lambda size: None) -> tuple[Entry, ...]:
        """Steps 1 to 8 for all of ``data``, the next lines of the ledger; raises as ``check_line``.

        ``on_line`` is told the bytes of each line that verified.
        """
        lines, rest = split_lines(data)
        entries: list[Entry] = []
        for line in lines:
            entries.append(self.check_line(line))
            on_line(len(line) + 1)
        if rest:
            number = self.head.seq + 1
            raise LedgerError(f"line {number}: step 1: the last line is incomplete", line=number, step=1)
        return tuple(entries)

    def check_line(self, line: bytes) -> Entry:
        """Steps 2 to 8 for the next line, without its newline.

        Raises:
            LedgerError: with line and step; the verifier stays as it was.
        """
        number = self.head.seq + 1
        step = 1
        try:
            if not line or len(line) > LINE_BYTES:
                raise LedgerError(f"a line has 1 to {LINE_BYTES} bytes, this one {len(line)}")
            step = 2
            value = decode_json(line)
            step = 3
            entry = decode_entry(value)
            step = 4
            if entry.seq != number:
                raise LedgerError(f"entry {entry.seq} stands where {number} belongs")
            step = 5
            if entry.prev != self.head.sha256:
                before = f"line {number - 1}" if number > 1 else "the genesis of this site and key"
                raise LedgerError(f"prev is not the digest of {before}")
            step = 6
            self.public.verify(DOMAIN, entry.signed_bytes(), bytes.fromhex(entry.sig))
            step = 7
            if entry.time < self.time:
                raise LedgerError(f"time {entry.time} is before that of the entry before, {self.time}")
            step = 8
            self.books.admit(entry)
        except (LedgerError, SignatureError) as error:
            raise LedgerError(f"line {number}: step {step}: {error}", line=number, step=step) from error
        self.head = LedgerHead(number, line_digest(line))
        self.time = entry.time
        return entry


def verify_ledger(
    data: bytes, site: str, public: PublicIdentity, on_line: Callable[[int], None] = lambda size: None
) -> VerifiedLedger:
    """The ledger in ``data``, verified by the steps above; ``on_line`` is told the bytes of each line that verified.

    Raises:
        LedgerError: the first step that fails, with the line.
    """
    verifier = LedgerVerifier(site, public)
    entries = verifier.check(data, on_line)
    return VerifiedLedger(site, entries, verifier.head, verifier.books)
