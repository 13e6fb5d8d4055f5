"""Facts that a report says: verified or not, and everything that can be shown. ``page.py`` makes a page of them.

A report is made of evidence that does not verify, too. Then it shows what single files tell that are signed by those
whose they are said to be, and says of every other file why it is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from consilium_audit.evidence import (
    CARD,
    CLOSING,
    CONTRACT,
    COORDINATOR,
    LEDGER_BYTES,
    MODEL,
    ROSTER,
    ROUNDS,
    STEPS,
    VerificationFailed,
    checking,
    ledger_file,
    read_ledger,
)
from consilium_audit.handed import names_in, read_file, sha256_of, size_of, there
from consilium_audit.moves import Move, moves
from consilium_audit.odds import EXAMPLES, Odds, odds
from consilium_audit.participation import Participation, participation
from consilium_audit.site_report import SiteReport, site_report
from consilium_audit.sums import Sum, sums
from consilium_audit.verify import Verification
from consilium_shared.errors import PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.limits import CARD_BYTES, FILE_BYTES, PAYLOAD_BYTES
from consilium_shared.protocol.records import RoundRecord, open_record
from consilium_shared.study import Study

State = Literal["verified", "verified in part", "does not verify"]


@dataclass(frozen=True)
class Step:
    """One step of the verification and how it ended."""

    number: int
    name: str
    state: Literal["holds", "fails", "not reached"]
    says: str


@dataclass(frozen=True)
class Failure:
    """Failure at which the verification stopped. ``file`` is named from the evidence folder on."""

    step: int
    name: str
    file: str
    line: int | None
    why: str


@dataclass(frozen=True)
class File:
    """A file that the report is made of, or several with the digest of what ``sha256sum`` prints of them."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Stated:
    """An ε with its δ, whose it is, and what it bounds."""

    what: str
    odds: Odds


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Attributes:
        coordinator: fingerprint of the key in the evidence; empty when there is none to be read.
        compared: whether that is the one that the auditor was told.
        open: what stays open where every step holds.
        study: None when the roster or the contract does not verify; then there is nothing below either.
        rounds: recorded rounds whose records are authentic.
        sums: secure sums that these records tell of.
        moves: how far each round's updates moved the model, where the records say it.
        witnessed: of each site, (entries behind the last head that a record names, all entries).
        left_out: file to why nothing of it is shown.
        stated: the largest ε of the study, of the assets so far, and of the budgets.
        dated: time of the last entry of any ledger, the date of the report.
    """

    state: State
    open: tuple[str, ...]
    coordinator: str
    compared: bool
    steps: tuple[Step, ...]
    failure: Failure | None
    unchecked: tuple[str, ...]
    notes: tuple[str, ...]
    study: Study | None
    federation: str
    rounds: int
    metrics: dict[str, Any] | None
    sites: tuple[SiteReport, ...]
    participation: tuple[Participation, ...]
    sums: tuple[Sum, ...]
    moves: tuple[Move, ...]
    witnessed: dict[str, tuple[int, int]]
    left_out: dict[str, str]
    stated: tuple[Stated, ...]
    examples: tuple[Odds, ...]
    files: tuple[File, ...]
    dated: str


OnWork = Callable[[str, int, int], None]
"""Callback told what is done now, how many parts are done, of how many."""


def make_report(
    folder: Path, fingerprint: str | None = None, on_work: OnWork = lambda what, done, parts: None
) -> Report:
    """Verify the evidence and gather everything that can be shown of it.

    Args:
        folder: as ``evidence.py`` describes it.
        fingerprint: the coordinator's, as the auditor heard it.
        on_work: told before each part of the work.

    Raises:
        ConfigurationError: the folder holds no evidence, or ``fingerprint`` is none.
    """
    work = Verification(folder, fingerprint, on_work=lambda step, done, of: on_work(STEPS[step], done, of))
    failure: VerificationFailed | None = None
    try:
        work.run()
    except VerificationFailed as error:
        failure = error
    known = failure is None or hasattr(work, "study")
    left_out: dict[str, str] = {}
    records = list(_records(work, left_out)) if known else []
    sites = []
    ledgers = list(_ledgers(work, left_out)) if known else []
    for done, (file, ledger) in enumerate(ledgers):
        on_work(f"what the ledger of {ledger.site} tells", done, len(ledgers))
        try:
            with checking(7, file):
                sites.append(site_report(ledger, work.study))
        except VerificationFailed as error:
            left_out[_name(folder, file)] = error.why
    return Report(
        state="does not verify" if failure else "verified in part" if work.verdict.open else "verified",
        open=work.verdict.open,
        coordinator=work.verdict.coordinator,
        compared=work.verdict.compared,
        steps=tuple(_steps(work, failure)),
        failure=_failure(folder, failure),
        unchecked=work.verdict.unchecked,
        notes=tuple(work.verdict.notes),
        study=work.study if known else None,
        federation=work.roster.federation if known else "",
        rounds=len(records),
        metrics=next((record.metrics for record in reversed(records) if record.metrics is not None), None),
        sites=tuple(sites),
        participation=participation(records, [each.site for each in work.roster.members]) if known else (),
        sums=tuple(sums(records, work.study, len(work.roster.members))) if known else (),
        moves=tuple(moves(records)),
        witnessed=work.verdict.witnessed,
        left_out=left_out,
        stated=tuple(_stated(sites, work.study)) if known else (),
        examples=tuple(odds(epsilon, 0.0) for epsilon in EXAMPLES),
        files=tuple(_files(folder, [file for file, _ in ledgers], left_out)),
        dated=max((site.last for site in sites), default=""),
    )


def _steps(work: Verification, failure: VerificationFailed | None) -> Iterator[Step]:
    held = {passed.number: passed for passed in work.verdict.steps}
    for number, name in STEPS.items():
        if number in held:
            yield Step(number, name, "holds", held[number].says)
        elif failure is not None and number == failure.step:
            yield Step(number, name, "fails", failure.why)
        else:
            yield Step(number, name, "not reached", "not looked at: a step before does not hold")


def _failure(folder: Path, failure: VerificationFailed | None) -> Failure | None:
    if failure is None:
        return None
    return Failure(failure.step, STEPS[failure.step], _name(folder, failure.file), failure.line, failure.why)


def _records(work: Verification, left_out: dict[str, str]) -> Iterator[RoundRecord]:
    """Every record that the coordinator signed for this study and roster."""
    for file in _inside(work.folder, ROUNDS, left_out):
        try:
            with checking(2, file):
                record = open_record(read_file(file), work.coordinator)
                if (record.study, record.roster) != (work.study.digest, work.roster.digest):
                    raise PeerError("it is a record of another study or roster")
        except VerificationFailed as error:
            left_out[_name(work.folder, file)] = error.why
        else:
            yield record


def _ledgers(work: Verification, left_out: dict[str, str]) -> Iterator[tuple[Path, VerifiedLedger]]:
    """Every ledger of a site in the roster that is whole and signed by it."""
    if work.ledgers:
        yield from work.ledgers.values()
        return
    for member in work.roster.members:
        file = ledger_file(work.folder, member.site)
        if file is None:
            continue
        try:
            with checking(4, file):
                key = PublicIdentity.from_hex(member.identity)
                yield file, read_ledger(file, member.site, key)
        except VerificationFailed as error:
            place = f"line {error.line}: " if error.line is not None else ""
            left_out[_name(work.folder, file)] = place + error.why


def _stated(sites: list[SiteReport], study: Study) -> Iterator[Stated]:
    """The largest ε of each kind; one that no number bounds is the largest."""
    own = [found for site in sites if (found := site.account.of_study(study.digest)) is not None]
    spent = [(each.epsilon, each.delta) for _, each in own if each.delta is not None]
    if any(each.delta is None and each.rounds for _, each in own):
        yield Stated("this study, at the site where it cost most", odds(float("inf"), 0.0))
    elif spent:
        yield Stated("this study, at the site where it cost most", odds(*max(spent)))
    alone = [(each.alone, each.delta) for _, each in own if each.delta is not None and each.alone is not None]
    if alone:
        yield Stated("this study, where a site's own share of the noise is all that protects it", odds(*max(alone)))
    assets = [asset for asset, _ in own]
    if assets:
        most = max(assets, key=lambda asset: asset.epsilon)
        yield Stated(
            "everything that was ever done to these patients' data, where it cost most", odds(most.epsilon, most.delta)
        )
        widest = max(assets, key=lambda asset: asset.limit)
        yield Stated("the largest budget, were it used up", odds(widest.limit, widest.delta))


def _files(folder: Path, ledgers: list[Path], left_out: dict[str, str]) -> Iterator[File]:
    """Every file with its digest, but for those that are no ordinary files or too large."""
    limits = {CARD: CARD_BYTES, MODEL: PAYLOAD_BYTES, COORDINATOR: FILE_BYTES, ROSTER: FILE_BYTES, CONTRACT: FILE_BYTES}
    single = [file for file in (folder / name for name in (COORDINATOR, ROSTER, CONTRACT, CARD, MODEL)) if there(file)]
    for file in [*single, *ledgers]:
        found = _file(folder, file, limits.get(file.name, LEDGER_BYTES), left_out)
        if found is not None:
            yield found
    for part in (ROUNDS, CLOSING):
        inside = [_file(folder, file, FILE_BYTES, left_out) for file in _inside(folder, part, left_out)]
        many = [each for each in inside if each is not None]
        if many:
            listing = "".join(f"{each.sha256}  {each.name}\n" for each in many)
            name = f"{len(many)} files: sha256sum {part}/*.json | sha256sum"
            yield File(name, sum(each.bytes for each in many), hashlib.sha256(os.fsencode(listing)).hexdigest())


def _file(folder: Path, file: Path, limit: int, left_out: dict[str, str]) -> File | None:
    try:
        return File(_name(folder, file), size_of(file), sha256_of(file, limit))
    except (PeerError, OSError) as error:
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        left_out.setdefault(_name(folder, file), why)
        return None


def _inside(folder: Path, part: str, left_out: dict[str, str]) -> list[Path]:
    """The JSON files of a folder of the evidence."""
    try:
        return [folder / part / name for name in names_in(folder / part) if name.endswith(".json")]
    except (PeerError, OSError) as error:
        left_out[part] = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        return []


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()
