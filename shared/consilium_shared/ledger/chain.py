"""Chain of entries: by hash, by number, and by what they say about one another. Pure.

``Books`` is the sense of a ledger: which assets are open, which studies approved, what was charged and settled, and
what the site was shown of the coordinator's records and of other sites' ledgers. It takes one entry at a time and
refuses one that contradicts those before, so a site never writes what an auditor would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import LedgerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.ledger.entry import (
    Approve,
    Charge,
    DpSgd,
    DpSgdPlan,
    DpSgdShared,
    Entry,
    Gaussian,
    Head,
    NonPrivate,
    NonPrivatePlan,
    Open,
    Purpose,
    Reject,
    Release,
    Settle,
    Witness,
)


@dataclass(frozen=True)
class LedgerHead:
    """The last entry, which commits to every one before: its number and the SHA-256 of its line.

    An empty ledger's head is 0 and the genesis.
    """

    seq: int
    sha256: str


def genesis(site: str, public: PublicIdentity) -> LedgerHead:
    """Head of the empty ledger of this site: no entry of one site's ledger can be the first of another's."""
    return LedgerHead(0, canonical_digest({"ledger": "consilium/1", "site": site, "identity": public.hex()}))


def split_lines(data: bytes) -> tuple[list[bytes], bytes]:
    """The complete lines of a ledger's bytes, without their newlines, and the incomplete rest (empty if none)."""
    *lines, rest = data.split(b"\n")
    return lines, rest


@dataclass
class Charged:
    """A charge and what became of it.

    Attributes:
        seq: number of the charge's entry.
        time: when it was written.
        body: the charge.
        settled: steps that really ran, or None while it counts in full.
    """

    seq: int
    time: str
    body: Charge
    settled: int | None = None


@dataclass
class Books:
    """State that the entries so far give.

    Attributes:
        site: whose ledger; empty where the heads of its own that it witnessed are not to be looked at again.
        assets: the ``open`` entry in force for each asset.
        decisions: the last decision on each study's digest.
        charges: every charge by its entry's number, in order.
        counted: of each study's digest the noised numbers of patients whose release was charged.
        witnessed: of each study's digest the rounds, ascending, whose records were witnessed.
        closed: digests of the studies whose end was countersigned.
    """

    site: str = ""
    assets: dict[str, Open] = field(default_factory=dict)
    decisions: dict[str, Approve | Reject] = field(default_factory=dict)
    charges: dict[int, Charged] = field(default_factory=dict)
    counted: dict[str, set[int]] = field(default_factory=dict)
    witnessed: dict[str, dict[int, Witness]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    _charged: dict[tuple[str, str, int], list[int]] = field(default_factory=dict)
    """Study, purpose and round to the numbers of the charges."""
    _heads: dict[tuple[str, int], str] = field(default_factory=dict)
    """Site and number of an entry to its digest, as witnessed."""
    _furthest: dict[tuple[str, str], int] = field(default_factory=dict)
    """Study and site to the last head that was witnessed."""
    _digests: list[str] = field(default_factory=list)
    """The genesis, then the digest of every entry but the last."""

    def attempts(self, study: str, round_number: int, purpose: Purpose = "training") -> int:
        """Number of charges of the round so far for that purpose."""
        return len(self._charged.get((study, purpose, round_number), ()))

    def last_witnessed(self, study: str) -> int:
        """The last round whose record was witnessed; 0 when none was."""
        return next(reversed(self.witnessed.get(study, {})), 0)

    def admit(self, entry: Entry) -> None:
        """Take the next entry.

        Raises:
            LedgerError: it contradicts what stands before; nothing is changed then.
        """
        body = entry.body
        if isinstance(body, Open):
            self._check_open(body)
            self.assets[body.asset] = body
        elif isinstance(body, Approve):
            self._asset(body.asset)
            self.decisions[body.study] = body
        elif isinstance(body, Reject):
            self.decisions[body.study] = body
        elif isinstance(body, Charge):
            plan = self._check_charge(body)
            if body.purpose == "count" and isinstance(plan, DpSgdPlan) and plan.patients is not None:
                self.counted.setdefault(body.study, set()).add(plan.patients)
            self._charged.setdefault((body.study, body.purpose, body.round), []).append(entry.seq)
            self.charges[entry.seq] = Charged(entry.seq, entry.time, body)
        elif isinstance(body, Settle):
            self._check_settle(body)
            self.charges[body.charge_seq].settled = body.steps
        elif isinstance(body, Witness):
            self._check_witness(body, entry)
            self.witnessed.setdefault(body.study, {})[body.round] = body
            for site, head in body.heads.items():
                self._heads[site, head.seq] = head.sha256
                self._furthest[body.study, site] = head.seq
        elif isinstance(body, Release) and body.message == "closing":
            self.closed.add(body.study)
        self._digests.append(entry.prev)

    def _asset(self, name: str) -> Open:
        if name not in self.assets:
            raise LedgerError(f"asset {name!r} was never opened")
        return self.assets[name]

    def _check_open(self, body: Open) -> None:
        if body.asset in self.assets and not body.reason:
            raise LedgerError(f"the budget of asset {body.asset!r} is changed without a reason")

    def _check_charge(self, body: Charge) -> DpSgdPlan | NonPrivatePlan:
        """The approved plan that the charge is for."""
        approval = self.decisions.get(body.study)
        if not isinstance(approval, Approve):
            raise LedgerError(f"study {body.name!r} is charged without an approval")
        if (approval.name, approval.asset) != (body.name, body.asset):
            raise LedgerError(f"study {body.name!r} was approved under another name or for another asset")
        if body.delta != self._asset(body.asset).delta:
            raise LedgerError(f"charged at another delta than the budget of asset {body.asset!r} has")
        if body.attempt != self.attempts(body.study, body.round, body.purpose) + 1:
            raise LedgerError(f"attempt {body.attempt} at round {body.round}, of which the last was another")
        first, last = (0, 0) if body.purpose == "count" else (1, approval.plan.rounds)
        if not first <= body.round <= last:
            raise LedgerError(f"round {body.round} of a study approved for {approval.plan.rounds}")
        # The counts of a round ride on the next one's updates, after its record was shown.
        over = self.last_witnessed(body.study) - (body.purpose == "evaluation")
        if 1 <= body.round <= over:
            raise LedgerError(f"round {body.round} is charged although its record, or a later one, was witnessed")
        if not _within_plan(body.event, body.purpose, approval.plan):
            raise LedgerError("the charged event is not the approved plan's")
        if body.purpose != "count" and not self.has_counted(body.study, approval.plan):
            raise LedgerError(f"round {body.round} is charged before the number of patients of its plan")
        return approval.plan

    def has_counted(self, study: str, plan: DpSgdPlan | NonPrivatePlan) -> bool:
        """True where the release of the plan's noised number of patients was charged, or the plan has none."""
        if isinstance(plan, NonPrivatePlan) or plan.patients is None:
            return True
        return plan.patients in self.counted.get(study, ())

    def _check_settle(self, body: Settle) -> None:
        charged = self.charges.get(body.charge_seq)
        if charged is None:
            raise LedgerError(f"entry {body.charge_seq} is not a charge that could be settled")
        if charged.settled is not None:
            raise LedgerError(f"the charge in entry {body.charge_seq} is settled already")
        event = charged.body.event
        charged_steps = event.steps if isinstance(event, DpSgd) else 1 if isinstance(event, Gaussian) else body.steps
        if body.steps > charged_steps:
            raise LedgerError(f"settled with {body.steps} steps, of which only {charged_steps} were charged")

    def _check_witness(self, body: Witness, entry: Entry) -> None:
        last = self.last_witnessed(body.study)
        if body.round <= last:
            raise LedgerError(f"the record of round {body.round} is witnessed after that of round {last}")
        for site, head in body.heads.items():
            furthest = self._furthest.get((body.study, site), 0)
            if head.seq <= furthest:
                raise LedgerError(
                    f"the record of round {body.round} has entry {head.seq} as the head of {site}, whose ledger had "
                    f"come to entry {furthest} in an earlier round"
                )
            if self._heads.get((site, head.seq), head.sha256) != head.sha256:
                raise LedgerError(
                    f"the record of round {body.round} has another entry {head.seq} of {site} than was witnessed before"
                )
        if self.site and self.site in body.heads:
            self._check_own_head(body, body.heads[self.site], entry)

    def _check_own_head(self, body: Witness, head: Head, entry: Entry) -> None:
        digests = [*self._digests[head.seq : head.seq + 1], entry.prev]
        if head.seq >= entry.seq or digests[0] != head.sha256:
            raise LedgerError(f"the record of round {body.round} has a head of this ledger that is no entry of it")
        charges = self._charged.get((body.study, "training", body.round), ())
        if not any(seq <= head.seq for seq in charges):
            raise LedgerError(f"the record of round {body.round} has a head of this ledger before its charge for it")


def _within_plan(event: DpSgd | Gaussian | NonPrivate, purpose: Purpose, plan: DpSgdPlan | NonPrivatePlan) -> bool:
    if isinstance(plan, NonPrivatePlan):
        return isinstance(event, NonPrivate) and purpose != "count"
    if purpose != "training":
        noise = plan.count_noise if purpose == "count" else plan.evaluation_noise
        return isinstance(event, Gaussian) and event.noise_multiplier == noise
    shared = (event.honest_sites, event.colluding_sites) if isinstance(event, DpSgdShared) else (1, 0)
    return (
        isinstance(event, DpSgd)
        and shared == (plan.honest_sites, plan.colluding_sites)
        and (event.sampling_rate, event.noise_multiplier) == (plan.sampling_rate, plan.noise_multiplier)
        and (event.steps <= plan.steps_per_round)
    )
