"""How each secure sum was opened: its terms made again from contract and record, and the hospitals' signatures on that.

A site signs one set of survivors for a sum, once, and its share of the masks leaves only for a set that enough others
signed. So the threshold's number of signatures over exactly the participants shows that no other set was opened, as
long as fewer sites lie than the contract's threat model allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from consilium_audit.evidence import checking
from consilium_audit.records import Records
from consilium_shared.documents import signature_bytes
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import PublicIdentity
from consilium_shared.records import OpenedSum, RoundRecord
from consilium_shared.roster import Roster
from consilium_shared.secagg.terms import (
    SURVIVORS_DOMAIN,
    Purpose,
    Slot,
    Terms,
    least_sites,
    threshold,
    tolerated,
)
from consilium_shared.study import Study
from consilium_shared.summand import segments


@dataclass(frozen=True)
class Sum:
    """A secure sum, as its record tells it.

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
    """Every sum that the records tell of, in order; ``roster``: of so many sites."""
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


def check_sums(records: Records, study: Study, roster: Roster) -> tuple[int, int]:
    """Each sum was opened as enough of its sites signed; how many sums, and how many signatures there are.

    Raises:
        VerificationFailed: step 4.
    """
    identities = {member.site: PublicIdentity.from_hex(member.identity) for member in roster.members}
    found, signatures = 0, 0
    for file, record in records:
        for purpose, summed, opened in _opened(record):
            with checking(4, file):
                if opened is None:
                    raise PeerError(
                        f"it does not say how the sum of {_CONTENT[purpose]} was opened: a coordinator of a version "
                        "without secure sums, or another program, could read every site's own"
                    )
                _check(_terms(record, study, len(identities), purpose, opened), summed, opened, identities, study)
            found += 1
            signatures += len(opened.signatures)
    return found, signatures


_CONTENT = {"training": "its updates", "evaluation": "its evaluation counts"}


def _opened(record: RoundRecord) -> Iterator[tuple[Purpose, tuple[str, ...], OpenedSum | None]]:
    """What was summed, over whom, and how that was opened; None where it must say so and does not."""
    yield "training", record.participants, record.opened
    if record.counts or record.opened_counts is not None:
        yield "evaluation", tuple(sorted(record.counts)), record.opened_counts


def _terms(record: RoundRecord, study: Study, roster: int, purpose: Purpose, opened: OpenedSum) -> Terms:
    """What the sites must have agreed to, of a roster of so many; raises PeerError where that is none they could."""
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
            model=record.model_before if purpose == "training" else record.model_after,
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
    least = least_sites(study.aggregation, len(identities))
    needed = max(terms.threshold, least)
    if len(summed) < needed:
        of = f"{len(summed)} of {len(terms.cohort)} sites"
        raise PeerError(f"the sum of {content} is of {of}, and {needed} are needed")
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
