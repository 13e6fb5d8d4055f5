"""Pull of a list of studies from an archive, until the inbox has every instance that the archive has of them.

Nothing is kept of how far a pull came: what is in the inbox's journal is here, the rest is asked for. So a pull that
was killed is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from consilium_client.intake.inbox import Inbox, NoRoom, digest_of
from consilium_client.intake.worklist import Wanted
from consilium_shared.errors import DataError, TransportError

Outcome = Literal["complete", "incomplete", "not found", "failed"]


@dataclass(frozen=True)
class Found:
    """An instance that an archive says it has."""

    study: str
    series: str
    instance: str
    sop_class: str = ""


class Source(Protocol):
    """An archive, whichever way it is spoken to. Every method raises TransportError where it does not answer."""

    def studies(self, wanted: Wanted) -> list[str]:
        """Study instance UIDs of a study of the list: one, several under one accession number, or none."""

    def instances(self, study: str) -> list[Found]:
        """Every instance of a study."""

    def fetch(self, study: str, missing: Sequence[Found], whole: bool) -> None:
        """Bring instances into the inbox. With ``whole`` they are all of the study."""


@dataclass(frozen=True)
class Pulled:
    """Outcome of one study."""

    wanted: str
    study: str
    expected: int
    here: int
    outcome: Outcome
    detail: str = ""


def pull(
    source: Source, archive: str, wanted: Iterable[Wanted], inbox: Inbox, on_study: Callable[[Pulled], None]
) -> list[Pulled]:
    """Fetch what is missing of the studies of a list.

    Args:
        source: the archive.
        archive: its name in site.yaml, for the journal.
        wanted: the list.
        inbox: takes the instances.
        on_study: called with each study that is done.

    Returns:
        what came of each. One study that fails does not keep the others from coming.

    Raises:
        NoRoom: the inbox or its disk is full.
        TransportError: the archive answers none of the first three studies.
    """
    done: list[Pulled] = []
    for each in wanted:
        for result in _one(source, each, inbox):
            inbox.note_pull(archive, result.wanted, result.study, result.expected, result.here, result.outcome)
            on_study(result)
            done.append(result)
        if len(done) == 3 and all(result.outcome == "failed" for result in done):
            raise TransportError(f"the archive {archive!r} does not answer: {done[-1].detail}")
    return done


def _one(source: Source, wanted: Wanted, inbox: Inbox) -> list[Pulled]:
    try:
        studies = source.studies(wanted)
    except (TransportError, DataError) as error:
        return [Pulled(wanted.name, "", 0, 0, "failed", str(error))]
    if not studies:
        return [Pulled(wanted.name, "", 0, 0, "not found")]
    return [_study(source, wanted, study, inbox) for study in studies]


def _study(source: Source, wanted: Wanted, study: str, inbox: Inbox) -> Pulled:
    expected: dict[str, Found] = {}
    detail = ""
    try:
        expected = {digest_of(found.instance): found for found in source.instances(study)}
        missing = [found for digest, found in expected.items() if not inbox.known(digest)]
        if missing:
            inbox.require_room()
            source.fetch(study, missing, whole=len(missing) == len(expected))
    except NoRoom:
        raise
    except (TransportError, DataError) as error:
        detail = str(error)
    here = sum(inbox.known(digest) for digest in expected)
    if here < len(expected) or detail:
        outcome: Outcome = "incomplete" if expected else "failed"
        return Pulled(wanted.name, study, len(expected), here, outcome, detail or "the archive did not send all")
    return Pulled(wanted.name, study, here, here, "complete" if expected else "not found")
