"""Verification that the evidence of a study holds together. Everything is recomputed; no number in a file is believed.

Each step must hold before the next begins:

    1. The roster is signed by the coordinator, whose fingerprint is the expected one where one is given; the contract
       is a study written out in full.
    2. Every round record is signed by the coordinator, for this study, federation and roster; they are numbered from 1
       without a gap, and each names the bytes of the one before by digest; every participant stands in the roster, and
       there were enough of them, and every other site of the roster stands in it once, as away or refused (not asked
       of contracts of schema 1); metrics are of models that the contract evaluates, and of no more sites than counted.
    3. Every round began with the model with which the one before ended; none stepped on an implausible sum.
    4. Every participant of a round countersigned the record of the round before; what sites signed at the end
       (``closing``) is their own, and over the last record. Every secure sum was opened on enough signatures of sites
       in it, over the terms that contract and record give, the cohort's signed keys among them, and over exactly the
       record's participants; and by those keys it has the evaluation counts of none of them, or of enough. Where the
       contract has empty coordinates, no round began after sums whose measured noise is not the contract's.
    5. Every ledger is whole, in order, and signed by its site (``consilium_shared.ledger.verify``).
    6. Every head that a record or a closing names is the entry with that number in that site's ledger: cutting, rolling
       back or rewriting what stood before it is found.
    7. What each site entered of the records that it was shown is what the records are, and none is missing; every head
       of another site's ledger that it was shown, in any study, is an entry of that ledger. So a coordinator that shows
       two histories is found, and a ledger that was rolled back, even if the coordinator lies for it.
    8. In every ledger the study was approved as contract and roster have it, every charge is the approved plan's, and
       nothing that was to be charged left, in any study, without a charge of its own before it, unless the same left
       once more under other masks; no charge for what left is settled as if it had not run; every participant of a
       record was charged before; every update, every count and every closing, by digest, stands in its site's ledger as
       released; a closing's audit is the ledger's; no later round was charged than the records tell of.
    9. ε, recomputed from the events: no charge, of any study, went beyond the budget of its asset or beyond what was
       approved; no record and no closing states less than what was spent when it was made.
   10. The model card, where there is one, says what records and closings say; and the model's file beside it is that
       model.

Not to be seen from evidence: what a site wrote after the last head that others hold may have been cut off by that site,
as far as nothing here demands it; whether a site ran what it charged; and what two sites and the coordinator make up
together, without a third party's ledger or record that says otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from consilium_audit.budget import TOLERANCE, check_limits, study_epsilons
from consilium_audit.card import unsupported_claim
from consilium_audit.evidence import (
    CARD,
    CONTRACT,
    COORDINATOR,
    MODEL,
    VerificationFailed,
    checking,
    ledger_file,
    read_coordinator,
    read_ledgers,
    read_roster,
)
from consilium_audit.handed import names_in, read_file, sha256_of, size_of, there
from consilium_audit.noise import check_noise, of_shares
from consilium_audit.payments import payments
from consilium_audit.records import (
    Closed,
    Records,
    check_countersignatures,
    check_models,
    read_closings,
    read_records,
)
from consilium_audit.releases import Trace, trace
from consilium_audit.sums import check_sums
from consilium_audit.verdict import Passed, Verdict
from consilium_audit.witnesses import check_heads, check_witnessed, last_committed
from consilium_shared.canonical import parse_canonical
from consilium_shared.errors import ConfigurationError, LedgerError, PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.limits import CARD_BYTES, PAYLOAD_BYTES
from consilium_shared.printable import printable
from consilium_shared.privacy.budget import in_words
from consilium_shared.protocol.records import RoundRecord, open_card
from consilium_shared.protocol.roster import Roster
from consilium_shared.study import Study

MOST_STRANGE = 20
"""Files that notes name of those that are no ledger of the study's sites; more are only counted."""

OnStep = Callable[[Passed], None]
"""Progress callback of a step that holds."""

OnWork = Callable[[int, int, int], None]
"""Progress callback of a step that takes long: number of the step, how much is done, of how much."""


class Verification:
    """One verification of a folder of evidence.

    Attributes:
        verdict: what is known so far; whole when ``run`` has returned.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str | None = None,
        on_step: OnStep = lambda passed: None,
        on_work: OnWork = lambda step, done, total: None,
    ) -> None:
        """Prepare to verify; no file is read yet.

        Args:
            folder: what ``evidence.py`` describes.
            fingerprint: the coordinator's, as the auditor heard it; in groups or not.
            on_step: called with every step that holds.
            on_work: called with the progress of a long step.

        Raises:
            ConfigurationError: no such folder, or ``fingerprint`` is none.
        """
        if fingerprint is not None and not re.fullmatch(r"[0-9a-f]{32}", _digits(fingerprint)):
            raise ConfigurationError("a fingerprint has 32 hex digits, as: b84d 90e3 1ed9 e3c8 793e 47f0 10f8 53b0")
        if not folder.is_dir():
            raise ConfigurationError(f"{folder} is not a folder")
        self.folder = folder
        self.verdict = Verdict()
        self._fingerprint = fingerprint
        self._on_step = on_step
        self._on_work = on_work
        self.coordinator: PublicIdentity
        self.roster: Roster
        self.study: Study
        self.records: Records = []
        self.digests: list[str] = []
        """SHA-256 of each record's file."""
        self.closings: dict[str, Closed] = {}
        self.ledgers: dict[str, tuple[Path, VerifiedLedger]] = {}
        self.traces: dict[str, Trace] = {}

    def run(self) -> Verdict:
        """Run all steps, each on what the ones before have established.

        Raises:
            ConfigurationError: the folder holds no evidence.
            VerificationFailed: the first thing that does not verify.
        """
        steps = (
            self._identities,
            self._round_records,
            self._models,
            self._signatures,
            self._ledgers,
            self._heads,
            self._witnessed,
            self._charges,
            self._privacy,
            self._card,
        )
        for number, step in enumerate(steps, start=1):
            passed = Passed(number, step())
            self.verdict.steps.append(passed)
            self._on_step(passed)
        return self.verdict

    # -- the steps

    def _identities(self) -> str:
        self.coordinator = read_coordinator(self.folder)
        shown = self.coordinator.fingerprint
        self.verdict.coordinator = shown
        if self._fingerprint is not None:
            if _digits(self._fingerprint) != _digits(shown):
                why = f"it is the key of another coordinator, with fingerprint {shown}"
                raise VerificationFailed(1, self.folder / COORDINATOR, None, why)
            self.verdict.compared = True
        self.roster = read_roster(self.folder, self.coordinator)
        file = self.folder / CONTRACT
        with checking(1, file):
            self.study = Study.from_contract(parse_canonical(read_file(file)))
        self.verdict.study = self.study.study
        if self.study.model.start is not None:
            self.verdict.notes.append(self.study.model.start.said())
        return f"{len(self.roster.members)} sites, signed by {shown}; study {self.study.study}"

    def _round_records(self) -> str:
        self.records, self.digests = read_records(
            self.folder,
            self.study,
            self.roster,
            self.coordinator,
            lambda done, total: self._on_work(2, done, total),
        )
        self.verdict.rounds = len(self.records)
        return f"{len(self.records)} of {self.study.training.rounds} rounds, each signed, each names the one before"

    def _models(self) -> str:
        for number in check_models(self.records):
            self.verdict.notes.append(f"round {number} took no step: its sum was none that honest sites can give")
        return f"each round began with the model of the one before ({len(self.records)} rounds)"

    def _signatures(self) -> str:
        count = check_countersignatures(self.records, self.digests, self.roster)
        checked = check_sums(self.records, self.study, self.roster)
        off = check_noise(self.records, self.study)
        for number, counting, summed in checked.few:
            self.verdict.notes.append(
                f"the sum of round {number} has the evaluation counts of {counting} of its {summed} sites alone, fewer "
                "than the contract wants: the coordinator could read them. Sites of older releases did not refuse that"
            )
        self.closings = read_closings(self.folder, self.records, self.digests, self.study, self.roster)
        missing = sorted({site for _, record in self.records for site in record.participants} - set(self.closings))
        if missing and there(self.folder / CARD):
            self.verdict.notes.append(
                f"the last record is not countersigned by {', '.join(missing)}: away when the study ended, or left out"
            )
        return (
            f"{count} by participants over the record before, {len(self.closings)} at the end; "
            f"{checked.signatures} on the opening of {checked.sums} secure sums"
            + ("" if off is None else f"; their noise is as the contract has it ({off:+.1f} deviations)")
        )

    def _ledgers(self) -> str:
        files = [ledger_file(self.folder, member.site) for member in self.roster.members]
        total = sum(size_of(file) for file in files if file is not None)
        done = 0

        def read(size: int) -> None:
            nonlocal done
            done += size
            self._on_work(5, done, total)

        self.ledgers = read_ledgers(self.folder, self.roster, read)
        if not self.records and not self.ledgers:
            raise ConfigurationError(f"{self.folder} holds neither a round's record nor a site's ledger")
        took_part = {site for _, record in self.records for site in record.participants}
        self.verdict.unchecked = tuple(sorted(took_part - set(self.ledgers)))
        names = {f"{site}.jsonl" for site in self.ledgers}
        with checking(5, self.folder):
            strange = [
                name for name in names_in(self.folder.resolve()) if name.endswith(".jsonl") and name not in names
            ]
        for name in strange[:MOST_STRANGE]:
            self.verdict.notes.append(f"{printable(name)} is the ledger of no site in the roster: not looked at")
        if len(strange) > MOST_STRANGE:
            more = len(strange) - MOST_STRANGE
            self.verdict.notes.append(f"{more} other files are ledgers of no site in the roster: not looked at")
        for member in self.roster.members:
            if member.site not in self.ledgers and member.site not in took_part:
                self.verdict.notes.append(f"{member.site} took part in no round, and its ledger is not here")
        self.verdict.notes += of_shares(self.study, len(self.roster.members), self.verdict.unchecked)
        entries = sum(len(ledger.entries) for _, ledger in self.ledgers.values())
        text = f"{len(self.ledgers)} ledgers, {entries} entries, each chained and signed"
        if self.verdict.unchecked:
            text += f"; NOT CHECKED, for want of a ledger: {', '.join(self.verdict.unchecked)}"
        return text

    def _heads(self) -> str:
        count = check_heads(self.records, self.closings, self.ledgers)
        return f"{count} heads in records and closings are entries of the ledgers"

    def _witnessed(self) -> str:
        count = check_witnessed(self.study.digest, self.records, self.digests, self.closings, self.ledgers)
        last = last_committed(self.records, self.closings, self.ledgers)
        self.verdict.witnessed = {site: (last[site], len(ledger.entries)) for site, (_, ledger) in self.ledgers.items()}
        return f"{count} times a site was shown a record: always the one that is here, with heads that are entries"

    def _charges(self) -> str:
        for site, (file, ledger) in self.ledgers.items():
            with checking(8, file):
                self.traces[site] = self._charged(site, ledger)
        # From records and closings to the ledgers: what took part was charged before, what was received had left.
        for record_file, record, site, file, _ in self._participations():
            head = record.heads[site].seq
            if not any(line <= head for line in self.traces[site].charges.get(record.round, ())):
                raise VerificationFailed(
                    8, file, head, f"no charge for round {record.round} up to here, but {site} took part in it"
                )
            self._check_left(site, "update", record.answers[site], head, record_file)
        for record_file, record in self.records:
            for site in sorted(set(record.counts) & set(self.ledgers)):  # its update may have come too late
                head = record.heads[site].seq if site in record.heads else 0
                self._check_left(site, "counts", record.counts[site], head, record_file)
        for site, closed in self.closings.items():
            if site in self.traces:
                self._check_left(site, "closing", closed.sha256, closed.closing.head.seq, closed.file)
                self._check_audit(site, closed)
        charges = sum(len(lines) for found in self.traces.values() for lines in found.charges.values())
        return f"{charges} charges of the study, each as approved, each before what it paid for left"

    def _charged(self, site: str, ledger: VerifiedLedger) -> Trace:
        """Entries of the study in a site's ledger: as approved, none beyond the records, all that left paid for."""
        found = trace(ledger, self.study, self.roster.digest)
        beyond = [number for number in found.charges if number > len(self.records) + 1]
        if beyond:
            raise LedgerError(
                f"round {min(beyond)} was charged, but the records end with round {len(self.records)}: the last ones "
                "are missing",
                line=found.charges[min(beyond)][0],
            )
        payments(ledger).check()
        alone = sorted(set(found.charges) - {r.round for _, r in self.records if site in r.participants})
        if alone:
            self.verdict.notes.append(
                f"{site} was charged for round {', '.join(map(str, alone))}, but no record has it take part in that"
            )
        return found

    def _check_left(self, site: str, message: str, sha256: str, head: int, source: Path) -> None:
        """Check that the site's ledger says, after that head, that exactly this message was about to leave."""
        if self.traces[site].released.get((message, sha256), 0) <= head:
            raise VerificationFailed(
                8,
                self.ledgers[site][0],
                None,
                f"the {message} that {source.name} names, {sha256[:12]}, is not among what left after entry {head}",
            )

    def _check_audit(self, site: str, closed: Closed) -> None:
        told = closed.closing.audit
        said = (told.canaries, told.guesses, told.correct) if told is not None else None
        if said != self.traces[site].audit(closed.closing.head.seq):
            raise VerificationFailed(8, closed.file, None, f"its audit is not the last one in the ledger of {site}")

    def _privacy(self) -> str:
        stated: dict[str, dict[int, list[tuple[Path, float | None]]]] = {site: {} for site in self.ledgers}
        for record_file, record, site, _, _ in self._participations():
            line = self.traces[site].released.get(("counts", record.counts.get(site, "")), record.heads[site].seq)
            stated[site].setdefault(line, []).append((record_file, record.epsilon[site]))
        for site, closed in self.closings.items():
            if site in stated:
                stated[site].setdefault(closed.closing.head.seq, []).append((closed.file, closed.closing.epsilon))
        done, total = 0, sum(map(len, stated.values()))
        for site, (file, ledger) in self.ledgers.items():
            with checking(9, file):
                check_limits(ledger)
                for seq, spent in study_epsilons(ledger, self.study.digest, stated[site]):
                    for source, told in stated[site][seq]:
                        _check_stated(source, site, told, spent)
                    done += 1
                    self._on_work(9, done, total)
        sites = len(self.ledgers)
        return f"recomputed at {sites} sites: within every budget and approval, nowhere understated"

    def _card(self) -> str:
        file = self.folder / CARD
        if not there(file):
            return "there is none: the study has not finished, or its card was not handed over"
        with checking(10, file):
            card = open_card(read_file(file, CARD_BYTES), self.coordinator)
            what = unsupported_claim(
                card, [record for _, record in self.records], self.closings, self.study, self.roster
            )
            if what is not None:
                raise PeerError(f"its {what} is not what records, closings and the contract say")
        model = self.folder / MODEL
        text = f"as the records say: model {card.model.sha256[:12]}"
        if there(model):
            with checking(10, model):
                if sha256_of(model, PAYLOAD_BYTES) != card.model.sha256:
                    raise PeerError("it is not the model of the card")
            text += ", and the file beside it is that model"
        for site, (_, ledger) in self.ledgers.items():
            total = dict(study_epsilons(ledger, self.study.digest, [len(ledger.entries)]))
            spent = total.get(len(ledger.entries), 0.0)
            if site in card.epsilon and spent > _stated(card.epsilon[site]) + TOLERANCE:
                self.verdict.notes.append(
                    f"{site} spent ε {in_words(spent)} on the study in the end, more than the card's "
                    f"{in_words(_stated(card.epsilon[site]))}: it was charged again after its last update came in"
                )
        return text

    def _participations(self) -> Iterator[tuple[Path, RoundRecord, str, Path, VerifiedLedger]]:
        """Every participant of every record whose ledger is here."""
        for record_file, record in self.records:
            for site in record.participants:
                if site in self.ledgers:
                    yield record_file, record, site, *self.ledgers[site]


def _check_stated(source: Path, site: str, said: float | None, spent: float) -> None:
    stated = _stated(said)
    if spent > stated + TOLERANCE:
        why = f"it says ε {in_words(stated)} of {site}, whose ledger comes to {in_words(spent)} there"
        raise VerificationFailed(9, source, None, why)


def _digits(fingerprint: str) -> str:
    return re.sub(r"[\s:]", "", fingerprint).lower()


def _stated(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon
