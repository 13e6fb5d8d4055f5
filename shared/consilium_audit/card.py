"""Claims of a model card, compared with the round records and the contract."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from consilium_audit.records import Closed
from consilium_shared import keeping
from consilium_shared.canonical import canonical_digest
from consilium_shared.privacy.alone import cost_alone
from consilium_shared.protocol.records import CardRound, Measured, ModelCard, RoundRecord
from consilium_shared.protocol.roster import Roster
from consilium_shared.study import Study

TOLERANCE = 1e-3
"""In ε: a bisection on another machine may end one step beside."""


def unsupported_claim(
    card: ModelCard, records: Sequence[RoundRecord], closings: Mapping[str, Closed], study: Study, roster: Roster
) -> str | None:
    """Name of the first claim of the card that records, closings and contract do not support; None when all hold."""
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
    sites = tuple(member.site for member in roster.members)
    yield "study", (card.study, card.version, card.study_digest) == (study.study, study.version, study.digest)
    yield "contract", canonical_digest(card.contract) == study.digest
    yield "federation", card.federation == roster.federation
    yield (
        "roster",
        (card.roster.digest, card.roster.version, card.roster.sites)
        == (
            roster.digest,
            roster.version,
            sites,
        ),
    )
    ended = bool(records) and keeping.ends(study, len(records), records[-1].kept)
    yield "number of rounds", ended
    yield "list of rounds", list(card.rounds) == [CardRound.of(record) for record in records]
    yield "model", bool(records) and card.model.sha256 == records[-1].published
    yield "choice of a round", bool(records) and card.kept == records[-1].kept
    if study.evaluation.keep is not None:
        yield "reason of that choice", card.chosen == keeping.words(study, card.kept, len(records))
    yield "architecture", card.model.architecture == study.model.name
    yield "privacy (ε and δ)", card.epsilon == epsilon and card.delta == study.privacy.delta
    yield "ε by a site's own share of the noise", _close(card.epsilon_alone, cost_alone(study))
    yield "list of metrics", card.metrics == metrics
    yield "list of what was measured", _measured(card) == _audits(closings, study)
    for site, claim in card.measured.items():
        recomputed = Measured.of(claim, study.privacy.delta or 0.0)
        close = abs(claim.epsilon_at_least - recomputed.epsilon_at_least) <= TOLERANCE
        yield f"measured ε of {site}", close and claim.confidence == recomputed.confidence


def _close(told: float | None, found: float | None) -> bool:
    if told is None or found is None:
        return told is found
    return abs(told - found) <= TOLERANCE * max(1.0, found)


def _measured(card: ModelCard) -> dict[str, tuple[int, int, int]]:
    return {site: (each.canaries, each.guesses, each.correct) for site, each in card.measured.items()}


def _audits(closings: Mapping[str, Closed], study: Study) -> dict[str, tuple[int, int, int]]:
    """Audits that the sites reported at the end; without privacy there is no bound to compare them with."""
    said = {site: closed.closing.audit for site, closed in closings.items() if study.privacy.delta is not None}
    return {site: (each.canaries, each.guesses, each.correct) for site, each in said.items() if each is not None}
