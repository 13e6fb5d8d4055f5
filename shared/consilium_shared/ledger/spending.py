"""Events on an asset's patients that the books tell of, by study. Pure.

Sites spend by it and auditors judge by it. What the events cost is the accountant's business; no ε that a file contains
is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilium_shared.ledger.chain import Books, Charged
from consilium_shared.privacy.event import Event, event_from_dict, really_run


@dataclass(frozen=True)
class StudySpending:
    """Spending of one study on one asset.

    Attributes:
        study: its digest.
        name: its name.
        rounds: the rounds whose training was charged, ascending, each once.
        events: what ran, and in full what was charged and not settled.
        unsettled: how many rounds' charges were never settled. (The one for the number of patients always counts.)
    """

    study: str
    name: str
    rounds: tuple[int, ...]
    events: tuple[Event, ...]
    unsettled: int


@dataclass(frozen=True)
class AssetSpending:
    """Everything that ever touched an asset's patients, by study, in the order of their first charges."""

    asset: str
    studies: tuple[StudySpending, ...]

    @property
    def events(self) -> tuple[Event, ...]:
        """All events of all studies."""
        return tuple(event for study in self.studies for event in study.events)

    def study(self, digest: str) -> tuple[Event, ...]:
        """The events of one study; empty when it was never charged."""
        return next((study.events for study in self.studies if study.study == digest), ())


def asset_spending(books: Books, asset: str) -> AssetSpending:
    """Spending on an asset as the books tell it; for the site's programs and anybody who holds a verified ledger."""
    studies: dict[str, list[Charged]] = {}
    for charged in books.charges.values():
        if charged.body.asset == asset:
            studies.setdefault(charged.body.study, []).append(charged)
    return AssetSpending(asset, tuple(_study_spending(study, charges) for study, charges in studies.items()))


def _study_spending(study: str, charges: Sequence[Charged]) -> StudySpending:
    events: list[Event] = []
    for charged in charges:
        event: Event | None = event_from_dict(charged.body.event.model_dump())
        if charged.settled is not None and event is not None:
            event = really_run(event, charged.settled)
        if event is not None:
            events.append(event)
    return StudySpending(
        study=study,
        name=charges[-1].body.name,
        rounds=tuple(sorted({each.body.round for each in charges if each.body.purpose == "training"})),
        events=tuple(events),
        unsettled=sum(each.settled is None and each.body.purpose != "count" for each in charges),
    )
