"""Absence of this site from a study that it approved, and of the coordinator from one that it never closed.

Both by the site's own ledger, so that a restart forgets neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from consilium_client.agent.refusals import CURES
from consilium_shared.errors import PolicyRefusal
from consilium_shared.ledger.entry import Approve, Charge, Entry, Refuse, Reject, Release

BY_POLICY = "site.yaml: policy.quiet_days"
"""Stands in the ledger for who withdrew the approval of a study of which nothing was heard."""

QUIET = timedelta(days=7)
"""Silence of a coordinator after which somebody should ask whether a study goes on."""

_BESIDE = {"refusal", "standing"}
"""Messages that are given also while the site is out."""


def out(entries: Sequence[Entry], study: str) -> dict[str, Any] | None:
    """Cause of this site's absence from a study, and what ends it; None where the site takes part.

    It is out from a refusal that its own people can cure (``refusals.CURES``) until it answers again, or decides anew.
    """
    for entry in reversed(entries):
        body = entry.body
        if isinstance(body, Approve | Reject) and body.study == study:
            return None
        if isinstance(body, Release) and body.study == study and body.message not in _BESIDE:
            return None
        if isinstance(body, Refuse) and body.study == study and body.reason in CURES:
            return {
                "since": entry.time,
                "round": body.round,
                "reason": body.reason,
                "detail": body.detail,
                "cure": CURES[body.reason],
            }
    return None


def check_not_rejected(decision: Approve | Reject | None) -> None:
    """Raise PolicyRefusal where the last decision on a study was a rejection, whoever or whatever made it."""
    if isinstance(decision, Reject):
        ended = "nothing was asked here for so long that this site's policy ended the study; it may be approved again"
        why = ended if decision.by == BY_POLICY else "the hospital said no to this study"
        raise PolicyRefusal("rejected", why)


def quiet_since(entries: Sequence[Entry], study: str, now: datetime, longer: timedelta | None = None) -> str | None:
    """Time of the coordinator's last request about an unclosed study; None where that is less than ``longer`` ago, by
    default ``QUIET``."""
    about = [e for e in entries if isinstance(e.body, Approve | Charge | Refuse | Release) and e.body.study == study]
    if not about or any(isinstance(e.body, Release) and e.body.message == "closing" for e in about):
        return None
    return about[-1].time if now - datetime.fromisoformat(about[-1].time).astimezone(UTC) > (longer or QUIET) else None
