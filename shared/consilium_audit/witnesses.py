"""Cross-check of ledgers, records and other sites' ledgers: nobody can change the past alone.

A record names heads of ledgers; every participant of the next round entered that record and those heads in a ledger of
its own (``witness``) and signed it; a closing does so for the last record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from consilium_audit.evidence import VerificationFailed
from consilium_audit.records import Closed, Records
from consilium_shared.ledger.entry import Head, Witness
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.protocol.messages import Head as NamedHead

Ledgers = Mapping[str, tuple[Path, VerifiedLedger]]
"""Site to its ledger and the file."""


def entry_digest(ledger: VerifiedLedger, seq: int) -> str | None:
    """SHA-256 of the line of entry ``seq``, as the next entry names it; None when there is no such entry."""
    if not 1 <= seq <= len(ledger.entries):
        return None
    return ledger.entries[seq].prev if seq < len(ledger.entries) else ledger.head.sha256


def check_heads(records: Records, closings: Mapping[str, Closed], ledgers: Ledgers) -> int:
    """Check that every head named by a record or a closing is an entry of that ledger; returns their number.

    Raises:
        VerificationFailed: step 6.
    """
    count = 0
    for source, where, site, head in _named_heads(records, closings):
        if site not in ledgers:
            continue
        file, ledger = ledgers[site]
        if head.seq > len(ledger.entries):
            raise VerificationFailed(
                6,
                file,
                len(ledger.entries) or None,
                f"the ledger ends here, but its head was entry {head.seq} {where} ({source.name}): it was cut off",
            )
        if entry_digest(ledger, head.seq) != head.sha256:
            raise VerificationFailed(
                6,
                file,
                head.seq or None,
                f"the entry is not the one that was the head {where} ({source.name}): the ledger was rewritten, or a "
                "false head was signed",
            )
        count += 1
    return count


def _named_heads(records: Records, closings: Mapping[str, Closed]) -> Iterator[tuple[Path, str, str, NamedHead]]:
    """File, place in words, site and head, of all that the coordinator or the site itself signed."""
    for file, record in records:
        for site, head in record.heads.items():
            yield file, f"in round {record.round}", site, head
    for site, closed in closings.items():
        yield closed.file, "at the end", site, closed.closing.head


def check_witnessed(
    study: str, records: Records, digests: list[str], closings: Mapping[str, Closed], ledgers: Ledgers
) -> int:
    """Every ``witness`` entry agrees with the records and with the ledgers whose heads it has; none is missing.

    Args:
        study: digest of the contract.
        records: of all rounds.
        digests: SHA-256 of each record's file.
        closings: by site.
        ledgers: of whichever sites there are.

    Returns:
        How many witness entries of the study there are.

    Raises:
        VerificationFailed: step 7.
    """
    for file, _, line, body in _witness_entries(ledgers):
        _check_others(body, file, line, ledgers)
    entered: dict[tuple[str, int], int] = {}
    for file, site, line, body in _witness_entries(ledgers):
        if body.study == study:
            _check_record(body, file, line, records, digests)
            entered[site, body.round] = line
    demanded = [
        (site, record.round - 1, record.heads[site]) for _, record in records[1:] for site in record.participants
    ]
    demanded += [(site, closed.closing.round, closed.closing.head) for site, closed in closings.items()]
    for site, number, head in demanded:
        line_found = entered.get((site, number))
        if site in ledgers and (line_found is None or line_found > head.seq):
            raise VerificationFailed(
                7,
                ledgers[site][0],
                head.seq,
                f"the record of round {number} was not witnessed up to here, although {site} countersigned it",
            )
    return len(entered)


def last_committed(records: Records, closings: Mapping[str, Closed], ledgers: Ledgers) -> dict[str, int]:
    """Last entry of each ledger that the coordinator, its own closing or another site's ledger commits to.

    Up to it no entry can be changed unseen.
    """
    last = dict.fromkeys(ledgers, 0)
    named = [(site, head.seq) for _, _, site, head in _named_heads(records, closings)]
    for _, witness, _, body in _witness_entries(ledgers):
        named += [(site, head.seq) for site, head in body.heads.items() if site != witness]
    for site, seq in named:
        if site in last:
            last[site] = max(last[site], seq)
    return last


def _witness_entries(ledgers: Ledgers) -> Iterator[tuple[Path, str, int, Witness]]:
    for site, (file, ledger) in ledgers.items():
        for entry in ledger.entries:
            if isinstance(entry.body, Witness):
                yield file, site, entry.seq, entry.body


def _check_record(body: Witness, file: Path, line: int, records: Records, digests: list[str]) -> None:
    if body.round > len(records):
        why = f"the record of round {body.round} was shown, but the records end with round {len(records)}"
    elif body.record != digests[body.round - 1] or not _same(body, records[body.round - 1][1].heads):
        why = f"another record of round {body.round} was shown than {records[body.round - 1][0].name}"
    else:
        return
    raise VerificationFailed(7, file, line, f"{why}: the coordinator shows two histories, or hides one")


def _same(body: Witness, heads: Mapping[str, NamedHead]) -> bool:
    shown = {site: (head.seq, head.sha256) for site, head in body.heads.items()}
    return shown == {site: (head.seq, head.sha256) for site, head in heads.items()}


def _check_others(body: Witness, file: Path, line: int, ledgers: Ledgers) -> None:
    """Whatever the study: a head that was shown to this site is an entry of the ledger concerned."""
    for site, head in body.heads.items():
        if site in ledgers and not _stands(head, ledgers[site][1]):
            raise VerificationFailed(
                7,
                file,
                line,
                f"entry {head.seq} was shown as the head of {site}, whose ledger ({ledgers[site][0].name}) has no such "
                "entry: it was rolled back or rewritten since, or a false head was shown",
            )


def _stands(head: Head, ledger: VerifiedLedger) -> bool:
    return entry_digest(ledger, head.seq) == head.sha256
