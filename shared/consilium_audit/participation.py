"""Participation of each site in each round, and the reasons of absences, from the signed records. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from consilium_shared.protocol.records import RoundRecord

Standing = Literal["took part", "away", "refused", "not asked"]


@dataclass(frozen=True)
class Absence:
    """One reason for which a site was not in some rounds.

    Attributes:
        standing: away or refused.
        reason: of the record: for a refusal the code and the site's sentence.
        rounds: ascending.
    """

    standing: Standing
    reason: str
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Participation:
    """One site over all recorded rounds.

    Attributes:
        standings: of round 1, 2, ….
        absences: by reason, in the order of their first rounds.
    """

    site: str
    standings: tuple[Standing, ...]
    absences: tuple[Absence, ...]

    def count(self, standing: Standing) -> int:
        """In how many rounds it stood so."""
        return self.standings.count(standing)


def participation(records: Sequence[RoundRecord], sites: Iterable[str]) -> tuple[Participation, ...]:
    """Every site's part in the records, by site in the order given."""
    return tuple(_of_site(records, site) for site in sites)


def _of_site(records: Sequence[RoundRecord], site: str) -> Participation:
    standings: list[Standing] = []
    reasons: dict[tuple[Standing, str], list[int]] = {}
    for record in records:
        standing, reason = _standing(record, site)
        standings.append(standing)
        if reason is not None:
            reasons.setdefault((standing, reason), []).append(record.round)
    absences = tuple(Absence(standing, reason, tuple(rounds)) for (standing, reason), rounds in reasons.items())
    return Participation(site, tuple(standings), absences)


def _standing(record: RoundRecord, site: str) -> tuple[Standing, str | None]:
    if site in record.participants:
        return "took part", None
    if site in record.refused:
        code, sentence = record.refused[site]
        return "refused", f"{code}: {sentence}" if sentence else code
    if site in record.away:
        return "away", record.away[site]
    return "not asked", None


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``1–4, 7, 9–10``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("–".join(map(str, part)) for part in parts)
