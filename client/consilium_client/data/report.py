"""Report on what was read of an asset: what is not used and why, which values are missing, what looks odd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from consilium_client.data.profile import Profile
from consilium_shared.errors import DataError

PLACES = 5
"""Number of places kept for each reason."""


class SetAside:
    """Counts what is not used, by reason, and the first places at which each reason was met.

    A reason and a count may stand in an error and so in a log. A place may be a file's name, which may carry an
    identifier: places are for the screen of ``data check`` alone.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._places: dict[str, list[str]] = {}

    def add(self, reason: str, count: int = 1, where: str = "") -> None:
        """Count ``count`` things under ``reason``; nothing happens when it is 0."""
        if count > 0:
            self.counts[reason] = self.counts.get(reason, 0) + count
            places = self._places.setdefault(reason, [])
            if where and len(places) < PLACES:
                places.append(where)

    @property
    def first(self) -> dict[str, str]:
        """Reason -> the first places."""
        return {reason: "; ".join(places) for reason, places in self._places.items() if places}


class Values(SetAside):
    """Counts single values that are taken as missing, and keeps the profile of all that were read."""

    def __init__(self) -> None:
        super().__init__()
        self.profile = Profile()


@dataclass(frozen=True)
class Report:
    """Findings of a reader besides the records.

    Attributes:
        set_aside: records (or rows, files) that are not used.
        values: single values taken as missing (not a number, out of the study's range …), and the profile of all.
        notes: what is used and looks odd (identifiers that are nearly the same, quoted lines …).
        missing: feature or variable -> records without a single usable value of it.
        looked_at: records among which these were counted, also those that are then set aside for it.
    """

    set_aside: SetAside = field(default_factory=SetAside)
    values: Values = field(default_factory=Values)
    notes: SetAside = field(default_factory=SetAside)
    missing: Mapping[str, int] = field(default_factory=dict)
    looked_at: int = 0


def explain(aside: SetAside) -> str:
    """Reasons counted so far, as the text of an error."""
    return "".join(f"; {count} × {reason}" for reason, count in sorted(aside.counts.items(), key=lambda kv: -kv[1]))


class NothingUsable(DataError):
    """No record of an asset is left. The text has reasons and counts; the places are for this site's screen alone.

    Attributes:
        report: what was read.
    """

    def __init__(self, what: str, report: Report) -> None:
        self.report = report
        super().__init__(what + explain(report.set_aside) + explain(report.values) + explain(report.notes))
