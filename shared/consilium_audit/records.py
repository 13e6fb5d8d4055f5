"""Signed documents: what the coordinator says of the rounds, and the sites of that: records, countersignatures,
closings. Each is read and verified on its own here; against the ledgers it is held elsewhere (``witnesses.py``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from consilium_audit.evidence import CLOSING, ROUNDS, VerificationFailed, checking
from consilium_audit.handed import names_in, read_file
from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import PublicIdentity
from consilium_shared.keeping import ends, of_records
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Closing
from consilium_shared.protocol.records import RoundRecord, open_record
from consilium_shared.protocol.roster import Roster
from consilium_shared.protocol.summand import counts_with
from consilium_shared.schema import OLDEST
from consilium_shared.secagg.terms import fewest_sites
from consilium_shared.study import Study

Records = list[tuple[Path, RoundRecord]]
"""Every round's record with its file, in order."""


@dataclass(frozen=True)
class Closed:
    """One site's closing: its file, what it says, and the SHA-256 of the file, which its ledger has as released."""

    file: Path
    closing: Closing
    sha256: str


def read_records(
    folder: Path,
    study: Study,
    roster: Roster,
    coordinator: PublicIdentity,
    on_record: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Records, list[str]]:
    """The records, and the SHA-256 of each one's file; ``on_record`` is told how many of how many were read.

    Raises:
        VerificationFailed: step 2: a record is missing, not signed, of something else, or not the next one.
    """
    with checking(2, folder / ROUNDS):
        names = sorted(names_in(folder / ROUNDS), key=lambda name: (len(name), name))
    files = [folder / ROUNDS / name for name in names]
    records: Records = []
    digests: list[str] = []
    for number, file in enumerate(files, start=1):
        with checking(2, file):
            if file.name != f"{number:04d}.json":
                raise PeerError(f"it stands where the record of round {number} belongs: that one is missing")
            data = read_file(file)
            record = open_record(data, coordinator)
            if record.round != number:
                raise PeerError(f"it is the record of round {record.round}")
            if record.previous != (digests[-1] if digests else None):
                raise PeerError("it does not name the record that stands before it")
            _check_content(record, study, roster)
        records.append((file, record))
        digests.append(digest(data))
        on_record(number, len(files))
    for (file, record), best in zip(records, of_records(study, [each for _, each in records]), strict=True):
        with checking(2, file):
            if record.kept != best:
                raise PeerError("the model that it calls the best is not the one that the records' metrics make so")
            if record.round < len(records) and ends(study, record.round, best):
                raise PeerError(f"the study ends with it (evaluation.keep), and there are {len(records)} records")
    return records, digests


def _check_content(record: RoundRecord, study: Study, roster: Roster) -> None:
    participants, minimum = set(record.participants), fewest_sites(study, roster.members)
    if (record.study, record.federation, record.roster) != (study.digest, roster.federation, roster.digest):
        raise PeerError("it is a record of another study, federation or roster")
    strangers = participants - {member.site for member in roster.members}
    if strangers:
        raise PeerError(f"{', '.join(sorted(strangers))} took part, but not in the roster")
    if len(participants) < minimum:
        raise PeerError(f"{len(participants)} sites took part, fewer than the contract's {minimum}")
    if study.schema_version > OLDEST:  # coordinators of the first release did not name everybody
        _check_everybody(record, roster)
    if record.round > study.training.rounds:
        raise PeerError(f"the contract has {study.training.rounds} rounds")
    if set(record.answers) != participants:
        raise PeerError("it has not the answer of each participant, or that of somebody else")
    last = study.may_end(record.round) and bool(study.evaluated_rounds)
    if record.counts and not last:
        raise PeerError("it has evaluation counts in a sum of their own, which there are after the last round alone")
    _check_metrics(record.metrics, minimum, len(record.counts), "its metrics")
    before = len(participants) if counts_with(study, record.round) else 0
    _check_metrics(record.metrics_before, minimum, before, "its metrics of the model before")


def _check_everybody(record: RoundRecord, roster: Roster) -> None:
    """Check that no site is missing in a record, and that none is in it with two accounts."""
    named = Counter([*record.participants, *record.away, *record.refused])
    once = Counter(member.site for member in roster.members)
    wrong = sorted((named - once) | (once - named))
    if wrong:
        raise PeerError(
            f"{', '.join(wrong)}: every site of the roster, and no other, stands in it once: as participant, away or "
            "refused"
        )


def _check_metrics(metrics: dict[str, Any] | None, least: int, most: int, what: str) -> None:
    """``least``: sites whose counts may be told; ``most``: that can have counted; 0 where no counts are asked for."""
    if metrics is None:
        return
    sites = metrics.get("sites")
    if type(sites) is not int or not 1 <= sites <= most:
        raise PeerError(f"{what} are of {sites} sites, and at most {most} gave evaluation counts for them")
    if sites < least:
        raise PeerError(
            f"{what} are of {sites} sites, and the contract wants {least}: counts of so few tell whose they are"
        )


def check_models(records: Records) -> list[int]:
    """Check that every round began with the model of the one before, and that none applied a sum it calls implausible.

    Returns:
        The rounds without a step.

    Raises:
        VerificationFailed: step 3.
    """
    for (_, before), (file, after) in pairwise(records):
        if after.model_before != before.model_after:
            raise VerificationFailed(
                3, file, None, f"round {after.round} did not begin with the model of round {before.round}"
            )
    still = [(file, record) for file, record in records if record.implausible is not None]
    for file, record in still:
        if record.model_after != record.model_before:
            raise VerificationFailed(3, file, None, f"round {record.round} stepped on a sum that it calls implausible")
    return [record.round for _, record in still]


def check_countersignatures(records: Records, digests: list[str], roster: Roster) -> int:
    """Check that every participant of a round signed the record of the round before; returns the number of signatures.

    Raises:
        VerificationFailed: step 4.
    """
    count = 0
    for (file, record), before in zip(records, [None, *digests], strict=False):
        with checking(4, file):
            expected = set(record.participants) if before is not None else set()
            wrong = sorted(expected ^ set(record.countersigned))
            if wrong:
                raise PeerError(f"it has not the countersignatures of exactly its participants: {', '.join(wrong)}")
            for site, signature in record.countersigned.items():
                _check_countersignature(site, signature, str(before), roster)
                count += 1
    return count


def read_closings(
    folder: Path, records: Records, digests: list[str], study: Study, roster: Roster
) -> dict[str, Closed]:
    """Closings: what each site signed about the last record, by site.

    Raises:
        VerificationFailed: step 4: one is not the site's, of another study, or over another record.
    """
    found: dict[str, Closed] = {}
    took_part = {site for _, record in records for site in record.participants}
    with checking(4, folder / CLOSING):
        names = names_in(folder / CLOSING)
    for file in (folder / CLOSING / name for name in names):
        with checking(4, file):
            member = roster.member(file.name.removesuffix(".json"))
            if member is None or (records and member.site not in took_part):
                raise PeerError("it is of no site that took part")
            data = read_file(file)
            answer = messages.decode_answer(data, PublicIdentity.from_hex(member.identity))
            if not isinstance(answer, Closing) or answer.payload != messages.NO_PAYLOAD:
                raise PeerError("it is not a site's closing")
            if (answer.federation, answer.study, answer.site) != (roster.federation, study.digest, member.site):
                raise PeerError("it is a closing of another study, federation or site")
            if not study.may_end(answer.round) or answer.round != len(records):
                raise PeerError(f"it closes round {answer.round}, but the records end with round {len(records)}")
            _check_countersignature(member.site, answer.countersignature, digests[-1], roster)
            found[member.site] = Closed(file, answer, digest(data))
    return found


def _check_countersignature(site: str, signature: str, record: str, roster: Roster) -> None:
    member = roster.member(site)
    try:
        if member is None:
            raise SignatureError("not in the roster")
        messages.verify_countersignature(signature, record, PublicIdentity.from_hex(member.identity))
    except SignatureError as error:
        raise PeerError(f"what {site} countersigned is not the record that is here") from error
