"""What a model card claims, held against the round records and the contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from consilium_audit.records import Closed
from consilium_shared.canonical import canonical_digest
from consilium_shared.records import CardRound, ModelCard, RoundRecord
from consilium_shared.roster import Roster
from consilium_shared.study import Study


def unfounded(
    card: ModelCard, records: Sequence[RoundRecord], closings: Mapping[str, Closed], study: Study, roster: Roster
) -> str | None:
    """The first claim of the card that its foundations do not bear out, by its name; None when all hold."""
    return next((name for name, holds in _claims(card, records, closings, study, roster) if not holds), None)


def _claims(
    card: ModelCard, records: Sequence[RoundRecord], closings: Mapping[str, Closed], study: Study, roster: Roster
) -> Iterator[tuple[str, bool]]:
    epsilon: dict[str, float | None] = {}
    metrics = None
    for record in records:
        epsilon.update(record.epsilon)
        metrics = metrics if record.metrics is None else record.metrics
    epsilon.update({site: closed.closing.epsilon for site, closed in closings.items()})
    audits = {site: closed.closing.audit for site, closed in closings.items() if closed.closing.audit is not None}
    sites = tuple(member.site for member in roster.members)
    yield "study", (card.study, card.version, card.study_digest) == (study.study, study.version, study.digest)
    yield "contract", canonical_digest(card.contract) == study.digest
    yield "federation", card.federation == roster.federation
    yield "roster", (card.roster.digest, card.roster.version, card.roster.sites) == (
        roster.digest,
        roster.version,
        sites,
    )
    yield "number of rounds", len(records) == study.training.rounds
    yield "list of rounds", list(card.rounds) == [CardRound.of(record) for record in records]
    yield "model", bool(records) and card.model.sha256 == records[-1].model_after
    yield "architecture", card.model.architecture == study.model.name
    yield "privacy (ε and δ)", card.epsilon == epsilon and card.delta == study.privacy.delta
    yield "list of metrics", card.metrics == metrics
    yield "list of audits", card.audits == audits
