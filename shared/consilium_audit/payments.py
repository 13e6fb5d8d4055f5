"""Payments in every study of a ledger: which charge paid for what left, what the ledger says against itself. Pure.

No contract is needed for that: an update leaves on a charge for training of its round, counts on one for evaluation of
theirs, and both on one for the number of patients where the approved plan has it. A charge on which something left
cannot be given back. Where a ledger says that it was, the charge counts in full, whatever was settled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from consilium_shared.errors import LedgerError
from consilium_shared.ledger.chain import Charged
from consilium_shared.ledger.entry import Approve, Charge, DpSgd, DpSgdPlan, NonPrivate, Purpose, Release, Settle
from consilium_shared.ledger.verify import VerifiedLedger
from consilium_shared.printable import printable


@dataclass(frozen=True)
class Contradiction:
    """Something left, and the ledger does not say truly that it was paid for.

    Attributes:
        line: the entry that shows it.
        study: digest of the study concerned.
        name: of that study, as the ledger has it.
        why: what is wrong.
    """

    line: int
    study: str
    name: str
    why: str

    def __str__(self) -> str:
        return f"study {printable(self.name)}: {self.why}"


@dataclass(frozen=True)
class Payments:
    """Charges of a ledger, and where it contradicts them.

    Attributes:
        charges: every charge, in order; settled as the ledger says, and not at all where that is contradicted.
        contradictions: by line.
    """

    charges: tuple[Charged, ...]
    contradictions: tuple[Contradiction, ...]

    def check(self) -> None:
        """Raises LedgerError with the first contradiction and its line."""
        for found in self.contradictions:
            raise LedgerError(str(found), line=found.line)


@dataclass
class _Study:
    """One study while the ledger is followed."""

    name: str = ""
    patients: int | None = None
    """The noised number of patients of the plan approved last, which a charge of its own pays for; None without."""
    unused: dict[tuple[Purpose, int], list[int]] = field(default_factory=dict)
    """Lines of charges for which nothing left yet, by purpose and round; of a count, by the number of patients."""
    used: list[int] = field(default_factory=list)
    """Lines of those for which something left, so that they cannot be given back."""
    counted: set[int] = field(default_factory=set)
    """The noised numbers of patients that were paid for and have left in an update."""
    left: dict[tuple[str, int], Release] = field(default_factory=dict)
    """By message and round: what left last with a charge of its own."""

    def charged(self, body: Charge, line: int) -> None:
        number = self.patients or 0 if body.purpose == "count" else body.round
        self.unused.setdefault((body.purpose, number), []).append(line)

    def released(self, body: Release) -> str | None:
        """Take what pays for it; why it is not paid, or None.

        The same result under other masks needs no second charge: it leaves only where its first sum can never be
        opened.
        """
        number, place = body.round or 0, (body.message, body.round or 0)
        first = self.left.get(place)
        if body.again and first is None:
            return f"the {body.message} of round {number} left again, but not before"
        if body.again and first is not None:
            if not body.counts or first.counts:
                return None
            self.left[place] = body  # in the sum before too few of the others added theirs
            return self._evaluation(number - 1)
        self.left[place] = body
        if body.message == "counts":
            return self._evaluation(number)
        unpaid = self._training(number)
        return unpaid or (self._evaluation(number - 1) if body.counts else None)

    def _training(self, number: int) -> str | None:
        if not self._use("training", number):
            return f"the update of round {number} left without a charge of its own before it"
        if self.patients is not None and self.patients not in self.counted:
            if not self._use("count", self.patients):
                return f"the update of round {number} left before the number of patients was charged"
            self.counted.add(self.patients)
        return None

    def _evaluation(self, number: int) -> str | None:
        """Also without privacy: there a charge costs nothing more, but says that counting was done anew."""
        if not self._use("evaluation", number):
            return f"the counts of round {number} left without a charge of their own before them"
        return None

    def _use(self, purpose: Purpose, number: int) -> bool:
        """Take the last unused charge; False when there is none."""
        found = self.unused.get((purpose, number))
        if not found:
            return False
        self.used.append(found.pop())
        return True


def payments(ledger: VerifiedLedger) -> Payments:
    """Follow every study of a verified ledger."""
    studies: dict[str, _Study] = {}
    settled: dict[int, int] = {}
    """By the line of a charge: the line that settles it."""
    found: list[Contradiction] = []
    for entry in ledger.entries:
        body, line = entry.body, entry.seq
        if isinstance(body, Settle):
            settled[body.charge_seq] = line
        elif isinstance(body, Approve):
            study = studies.setdefault(body.study, _Study())
            study.name = body.name
            study.patients = body.plan.patients if isinstance(body.plan, DpSgdPlan) else None
        elif isinstance(body, Charge):
            studies.setdefault(body.study, _Study(body.name)).charged(body, line)
        elif isinstance(body, Release) and body.message in ("update", "counts"):
            study = studies.setdefault(body.study, _Study(body.study[:12]))
            why = study.released(body)
            if why is not None:
                found.append(Contradiction(line, body.study, study.name, why))
    charges = dict(ledger.books.charges)
    for digest, study in studies.items():
        for line in study.used:
            charge = charges[line]
            full = _steps(charge.body)
            if full is not None and charge.settled not in (None, full):
                steps = f"{charge.settled} of {full} steps"
                why = f"the charge in line {line} is settled with {steps}, but what it paid for left"
                found.append(Contradiction(settled[line], digest, study.name, why))
                charges[line] = replace(charge, settled=None)
    return Payments(tuple(charges.values()), tuple(sorted(found, key=lambda each: each.line)))


def _steps(body: Charge) -> int | None:
    """Number of steps that were charged; None where any number costs the same."""
    if isinstance(body.event, NonPrivate):
        return None
    return body.event.steps if isinstance(body.event, DpSgd) else 1
