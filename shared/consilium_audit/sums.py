"""Opening of each secure sum: its terms, rebuilt from contract and record, and the hospitals' signatures on them.

A site signs one set of survivors for a sum, once, and its share of the masks leaves only for a set that enough others
signed. So the threshold's number of signatures over exactly the participants shows that no other set was opened, as
long as fewer sites lie than the contract's threat model allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from consilium_audit.evidence import checking
from consilium_audit.records import Records
from consilium_shared.documents import signature_bytes
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import PublicIdentity
from consilium_shared.protocol.records import OpenedSum, RoundRecord
from consilium_shared.protocol.roster import Roster
from consilium_shared.protocol.summand import segments
from consilium_shared.schema import OLDEST
from consilium_shared.secagg.terms import (
    SURVIVORS_DOMAIN,
    Purpose,
    Slot,
    Terms,
    fewest_sites,
    threshold,
    tolerated,
)
from consilium_shared.study import Study


@dataclass(frozen=True)
class Sum:
    """Secure sum as its record describes it.

    Attributes:
        of: updates, or counts of the last model, which have a sum of their own.
        attempt: the one that was opened; those before it were abandoned unopened.
        cohort: sites whose keys took part.
        summed: sites whose vectors are in it.
        signed: those of them who signed that.
        needed: how many signatures it takes.
        implausible: why no step was taken with it, or None.
    """

    round: int
    of: Literal["updates", "counts"]
    attempt: int
    cohort: tuple[str, ...]
    summed: tuple[str, ...]
    signed: tuple[str, ...]
    needed: int
    implausible: str | None

    @property
    def smooth(self) -> bool:
        """Opened at once, with everybody in it and signing."""
        return self.attempt == 1 and self.cohort == self.summed == self.signed and self.implausible is None


def sums(records: Sequence[RoundRecord], study: Study, roster: int) -> Iterator[Sum]:
    """Secure sums in the records, in order; ``roster``: number of its sites."""
    liars = tolerated(study.aggregation, roster)
    for record in records:
        for purpose, summed, opened in _opened(record):
            if opened is not None:
                yield Sum(
                    record.round,
                    "updates" if purpose == "training" else "counts",
                    opened.attempt,
                    tuple(opened.adverts),
                    summed,
                    tuple(sorted(opened.signatures)),
                    threshold(len(opened.adverts), study.aggregation.threat_model, liars),
                    record.implausible if purpose == "training" else None,
                )


@dataclass(frozen=True)
class Checked:
    """All sums of a study's records.

    Attributes:
        sums: how many.
        signatures: on who is in them.
        few: of each sum that has the counts of few sites, (round, how many offered some, how many there are). Only
            under contracts of the oldest schema: whoever takes part in later ones refuses.
    """

    sums: int
    signatures: int
    few: tuple[tuple[int, int, int], ...]


def check_sums(records: Records, study: Study, roster: Roster) -> Checked:
    """Check that enough sites signed each sum as it was opened, and that it has the counts of none or enough of them.

    Raises:
        VerificationFailed: step 4.
    """
    identities = {member.site: PublicIdentity.from_hex(member.identity) for member in roster.members}
    found, signatures, few = 0, 0, []
    for file, record in records:
        for purpose, summed, opened in _opened(record):
            with checking(4, file):
                if opened is None:
                    raise PeerError(
                        f"it does not say how the sum of {_CONTENT[purpose]} was opened: a coordinator of a version "
                        "without secure sums, or another program, could read every site's own"
                    )
                terms = _terms(record, study, len(identities), purpose, opened)
                _check(terms, summed, opened, identities, study)
                told = record.metrics_before if purpose == "training" else record.metrics
                counting = _counting(terms, summed, told, fewest_sites(study, identities))
                if counting:
                    few.append((record.round, counting, len(summed)))
            found += 1
            signatures += len(opened.signatures)
    return Checked(found, signatures, tuple(few))


def _counting(terms: Terms, summed: tuple[str, ...], metrics: dict[str, Any] | None, least: int) -> int:
    """Number of summed sites that added counts, as their own signed keys offer it, where that is fewer than ``least``.

    Returns:
        0 where none did, or enough.

    Raises:
        PeerError: ``metrics`` are of more sites than offered counts.
    """
    offered = terms.counting(summed) if terms.adds_counts(least) else 0
    if metrics is not None and metrics["sites"] > offered:
        raise PeerError(
            f"its metrics of counts in {_CONTENT[terms.slot.purpose]} are of {metrics['sites']} sites, and {offered} "
            "of the summed ones offered counts with enough others of the cohort"
        )
    return offered if offered < least else 0


_CONTENT = {"training": "its updates", "evaluation": "its evaluation counts"}


def _opened(record: RoundRecord) -> Iterator[tuple[Purpose, tuple[str, ...], OpenedSum | None]]:
    """Sums: of what, over whom, and how each was opened; None where it must say so and does not."""
    yield "training", record.participants, record.opened
    if record.counts or record.opened_counts is not None:
        yield "evaluation", tuple(sorted(record.counts)), record.opened_counts


def _terms(record: RoundRecord, study: Study, roster: int, purpose: Purpose, opened: OpenedSum) -> Terms:
    """Terms that the sites of a roster of so many must have agreed to; raises PeerError where they could to none."""
    try:
        return Terms(
            slot=Slot(
                federation=record.federation,
                study=record.study,
                roster=record.roster,
                purpose=purpose,
                round=record.round,
                attempt=opened.attempt,
            ),
            model=record.model_before if purpose == "training" else record.published,
            segments=segments(study, purpose, record.round, opened.parameters),
            threat_model=study.aggregation.threat_model,
            adverts=opened.adverts,
            corrupt=tolerated(study.aggregation, roster),
        )
    except ValidationError as error:
        raise PeerError(f"the cohort of the sum: {error.errors()[0]['msg']}") from error


def _check(
    terms: Terms, summed: tuple[str, ...], opened: OpenedSum, identities: dict[str, PublicIdentity], study: Study
) -> None:
    content = _CONTENT[terms.slot.purpose]
    try:
        terms.check(identities)
    except SignatureError as error:
        raise PeerError(f"a key in the sum of {content} is not its site's for this sum: {error}") from error
    strangers = sorted(set(summed) - set(terms.cohort))
    if strangers:
        raise PeerError(f"{', '.join(strangers)}: in the sum of {content}, but with no key in it")
    foreign = sorted(set(opened.signatures) - set(summed))
    if foreign:
        raise PeerError(f"{', '.join(foreign)}: signed the sum of {content}, but not in it")
    least = fewest_sites(study, identities)
    needed = max(terms.threshold, least)
    if len(summed) < needed:
        of = f"{len(summed)} of {len(terms.cohort)} sites"
        raise PeerError(f"the sum of {content} is of {of}, and {needed} are needed")
    sums = study.privacy.sums
    try:
        terms.check_shares(len(summed), 1 if sums is None else sums.honest_sites)
    except PeerError as error:
        raise PeerError(f"the sum of {content} may hold less noise than was charged for: {error}") from error
    if study.schema_version > OLDEST:  # sites of the first release did not refuse that: a note
        terms.check_counts(summed, least)
    if len(opened.signatures) < terms.threshold:
        raise PeerError(
            f"{len(opened.signatures)} of {len(terms.cohort)} sites signed who is in the sum of {content}, and "
            f"{terms.threshold} are needed to open it"
        )
    for site, signature in opened.signatures.items():
        try:
            identities[site].verify(SURVIVORS_DOMAIN, terms.survivors_signed(summed), signature_bytes(signature))
        except SignatureError as error:
            why = f"what {site} signed is not that exactly these sites are in the sum of {content}"
            raise PeerError(why) from error
