"""Does the evidence of a study hold together? Everything is recomputed; no number in a file is believed.

Each step must hold before the next begins:

    1. The roster is signed by the coordinator, whose fingerprint is the expected one where one is given; the contract
       is a study written out in full.
    2. Every round record is signed by the coordinator, for this study, federation and roster; they are numbered from 1
       without a gap; every participant stands in the roster; there were enough of them.
    3. Every round began with the model with which the one before ended.
    4. Every ledger is whole, in order, and signed by its site (``consilium_shared.ledger.verify``).
    5. Every head that a record names is the entry with that number in that site's ledger: cutting, rolling back or
       rewriting what stood before it is found.
    6. In every ledger the study was approved as the contract has it, every charge is the approved plan's, and no update
       left without a charge of its own before it; every participant of a record was charged before, and every update
       and every count in it stands in its site's ledger; no later round was charged than the records tell of.
    7. ε, recomputed from the events: no charge, of any study, went beyond the budget of its asset or beyond what was
       approved; no record states less than what was spent when it was made.
    8. The model card, where there is one, says what the records say; and the model's file beside it is that model.

Not to be seen from evidence: what a site wrote after the last head that a record names may have been cut off by that
site, as far as no record demands it; and whether a site ran what it charged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from consilium_audit.budget import TOLERANCE, check_limits, study_epsilons
from consilium_audit.card import unfounded
from consilium_audit.evidence import (
    CARD,
    CONTRACT,
    COORDINATOR,
    MODEL,
    ROUNDS,
    STEPS,
    VerificationFailed,
    checking,
    read_coordinator,
    read_ledgers,
    read_roster,
)
from consilium_audit.releases import Trace, trace
from consilium_shared.canonical import digest, parse_canonical
from consilium_shared.errors import ConfigurationError, LedgerError, PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import line_digest
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.privacy.budget import in_words
from consilium_shared.records import RoundRecord, open_card, open_record
from consilium_shared.roster import Roster
from consilium_shared.study import Study


@dataclass(frozen=True)
class Passed:
    """A step that holds, and what was looked at, in words."""

    number: int
    says: str

    @property
    def name(self) -> str:
        """What the step is about."""
        return STEPS[self.number]


@dataclass
class Verdict:
    """What was verified.

    Attributes:
        steps: those that hold, in order.
        unchecked: participants whose ledgers are not there.
        notes: what an auditor should know although it breaks no rule.
        witnessed: of each ledger, (entries behind the last head that a record names, all entries).
    """

    study: str = ""
    coordinator: str = ""
    rounds: int = 0
    steps: list[Passed] = field(default_factory=list)
    unchecked: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    witnessed: dict[str, tuple[int, int]] = field(default_factory=dict)


OnStep = Callable[[Passed], None]


class Verification:
    """One verification of a folder of evidence.

    Attributes:
        verdict: what is known so far; whole when ``run`` has returned.
    """

    def __init__(
        self, folder: Path, fingerprint: str | None = None, on_step: OnStep = lambda passed: None
    ) -> None:
        """Reads nothing yet.

        Args:
            folder: what ``evidence.py`` describes.
            fingerprint: the coordinator's, as the auditor heard it; in groups or not.
            on_step: told of every step that holds.

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
        self.coordinator: PublicIdentity
        self.roster: Roster
        self.study: Study
        self.records: list[tuple[Path, RoundRecord]] = []
        self.ledgers: dict[str, tuple[Path, VerifiedLedger]] = {}
        self.traces: dict[str, Trace] = {}

    def run(self) -> Verdict:
        """All steps.

        Raises:
            ConfigurationError: the folder holds no evidence.
            VerificationFailed: the first thing that does not verify.
        """
        steps = (
            self._identities,
            self._round_records,
            self._models,
            self._ledgers,
            self._heads,
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
        if self._fingerprint is None:
            self.verdict.notes.append(
                "the coordinator's fingerprint was compared with nothing: ask the coordinator, or a hospital, for it "
                "by telephone, and give it with --coordinator"
            )
        elif _digits(self._fingerprint) != _digits(shown):
            raise VerificationFailed(
                1, self.folder / COORDINATOR, None, f"it is the key of another coordinator, with fingerprint {shown}"
            )
        self.roster = read_roster(self.folder, self.coordinator)
        file = self.folder / CONTRACT
        with checking(1, file):
            self.study = Study.from_contract(parse_canonical(file.read_bytes()))
        self.verdict.study = self.study.study
        return f"{len(self.roster.members)} sites, signed by {shown}; study {self.study.study}"

    def _round_records(self) -> str:
        files = sorted(file for file in (self.folder / ROUNDS).glob("*") if not file.name.startswith("."))
        expected = (self.study.digest, self.roster.federation, self.roster.digest)
        sites = {member.site for member in self.roster.members}
        for number, file in enumerate(files, start=1):
            with checking(2, file):
                if file.name != f"{number:04d}.json":
                    raise PeerError(f"it stands where the record of round {number} belongs: that one is missing")
                record = open_record(file.read_bytes(), self.coordinator)
                if record.round != number:
                    raise PeerError(f"it is the record of round {record.round}")
                if (record.study, record.federation, record.roster) != expected:
                    raise PeerError("it is a record of another study, federation or roster")
                strangers = set(record.participants) - sites
                if strangers:
                    raise PeerError(f"{', '.join(sorted(strangers))} took part, but not in the roster")
                if len(record.participants) < self.study.aggregation.min_sites:
                    raise PeerError(
                        f"{len(record.participants)} sites took part, fewer than the contract's "
                        f"{self.study.aggregation.min_sites}"
                    )
                if number > self.study.training.rounds:
                    raise PeerError(f"the contract has {self.study.training.rounds} rounds")
            self.records.append((file, record))
        self.verdict.rounds = len(files)
        return f"{len(files)} of {self.study.training.rounds} rounds, each signed, none missing"

    def _models(self) -> str:
        for (_, before), (file, after) in zip(self.records, self.records[1:], strict=False):
            if after.model_before != before.model_after:
                raise VerificationFailed(
                    3, file, None, f"round {after.round} did not begin with the model of round {before.round}"
                )
        return f"each round began with the model of the one before ({len(self.records)} rounds)"

    def _ledgers(self) -> str:
        self.ledgers = read_ledgers(self.folder, self.roster)
        if not self.records and not self.ledgers:
            raise ConfigurationError(f"{self.folder} holds neither a round's record nor a site's ledger")
        took_part = {site for _, record in self.records for site in record.participants}
        self.verdict.unchecked = tuple(sorted(took_part - set(self.ledgers)))
        names = {f"{site}.jsonl" for site in self.ledgers}
        for file in sorted(self.folder.glob("*.jsonl")):
            if file.name not in names:
                self.verdict.notes.append(f"{file.name} is the ledger of no site in the roster: not looked at")
        for member in self.roster.members:
            if member.site not in self.ledgers and member.site not in took_part:
                self.verdict.notes.append(f"{member.site} took part in no round, and its ledger is not here")
        entries = sum(len(ledger.entries) for _, ledger in self.ledgers.values())
        text = f"{len(self.ledgers)} ledgers, {entries} entries, each chained and signed"
        if self.verdict.unchecked:
            text += f"; NOT CHECKED, for want of a ledger: {', '.join(self.verdict.unchecked)}"
        return text

    def _heads(self) -> str:
        last = dict.fromkeys(self.ledgers, 0)
        count = 0
        for record_file, record, site, file, ledger in self._participations():
            head = record.heads[site]
            if head.seq > len(ledger.entries):
                raise VerificationFailed(
                    5,
                    file,
                    len(ledger.entries) or None,
                    f"the ledger ends here, but its head was entry {head.seq} in round {record.round} "
                    f"({record_file.name}): entries were cut off",
                )
            if head.seq < 1 or line_digest(ledger.entries[head.seq - 1].line()) != head.sha256:
                raise VerificationFailed(
                    5,
                    file,
                    head.seq or None,
                    f"the entry is not the one that was the head in round {record.round} ({record_file.name}): the "
                    "ledger was rewritten, or the record names a false head",
                )
            last[site] = max(last[site], head.seq)
            count += 1
        self.verdict.witnessed = {site: (last[site], len(ledger.entries)) for site, (_, ledger) in self.ledgers.items()}
        return f"{count} heads in the records are entries of the ledgers"

    def _charges(self) -> str:
        for site, (file, ledger) in self.ledgers.items():
            with checking(6, file):
                found = trace(ledger, self.study)
                beyond = [number for number in found.charges if number > len(self.records) + 1]
                if beyond:
                    raise LedgerError(
                        f"round {min(beyond)} was charged, but the records end with round {len(self.records)}: the "
                        "last ones are missing",
                        line=found.charges[min(beyond)][0],
                    )
            self.traces[site] = found
            alone = sorted(set(found.charges) - {r.round for _, r in self.records if site in r.participants})
            if alone:
                self.verdict.notes.append(
                    f"{site} was charged for round {', '.join(map(str, alone))}, but no record has it take part in that"
                )
        for record_file, record, site, file, _ in self._participations():
            head, found = record.heads[site].seq, self.traces[site]
            if not any(line <= head for line in found.charges.get(record.round, ())):
                raise VerificationFailed(
                    6, file, head, f"no charge for round {record.round} up to here, but {site} took part in it"
                )
            if not any(line > head for line in found.updates.get(record.round, ())):
                raise VerificationFailed(
                    6,
                    file,
                    None,
                    f"no update of round {record.round} left after entry {head}, but {record_file.name} has one",
                )
        self._counts()
        charges = sum(len(lines) for found in self.traces.values() for lines in found.charges.values())
        return f"{charges} charges of the study, each as approved, each before what it paid for left"

    def _counts(self) -> None:
        """Every site whose evaluation counts are in a record has an entry that says that they left."""
        for record_file, record in self.records:
            evaluated = (record.metrics or {}).get("sites", 0)
            silent = [
                site
                for site in record.participants
                if site in self.traces and not self.traces[site].counts.get(record.round)
            ]
            if isinstance(evaluated, int) and evaluated > len(record.participants) - len(silent):
                raise VerificationFailed(
                    6,
                    self.ledgers[silent[0]][0] if silent else record_file,
                    None,
                    f"{record_file.name} has evaluation counts of {evaluated} sites, but no counts of that round left "
                    f"{', '.join(silent) or 'so many'}",
                )

    def _privacy(self) -> str:
        for site, (file, ledger) in self.ledgers.items():
            with checking(7, file):
                check_limits(ledger)
            at: dict[int, list[tuple[Path, RoundRecord]]] = {}
            for path, record in self.records:
                if site in record.participants:
                    at.setdefault(record.heads[site].seq, []).append((path, record))
            with checking(7, file):
                for seq, spent in study_epsilons(ledger, self.study.digest, at):
                    self._check_stated(site, spent, at[seq])
        sites = len(self.ledgers)
        return f"recomputed at {sites} sites: within every budget and approval, nowhere understated"

    def _check_stated(self, site: str, spent: float, records: list[tuple[Path, RoundRecord]]) -> None:
        for file, record in records:
            stated = _stated(record.epsilon[site])
            if spent > stated + TOLERANCE:
                why = f"it says ε {in_words(stated)} of {site}, whose ledger comes to {in_words(spent)} there"
                raise VerificationFailed(7, file, None, why)

    def _card(self) -> str:
        file = self.folder / CARD
        if not file.exists():
            return "there is none: the study has not finished, or its card was not handed over"
        with checking(8, file):
            card = open_card(file.read_bytes(), self.coordinator)
            what = unfounded(card, [record for _, record in self.records], self.study, self.roster)
            if what is not None:
                raise PeerError(f"its {what} is not what the round records and the contract say")
        model = self.folder / MODEL
        text = f"as the records say: model {card.model.sha256[:12]}"
        if model.exists():
            with checking(8, model):
                if digest(model.read_bytes()) != card.model.sha256:
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


def _digits(fingerprint: str) -> str:
    return re.sub(r"[\s:]", "", fingerprint).lower()


def _stated(epsilon: float | None) -> float:
    return math.inf if epsilon is None else epsilon
