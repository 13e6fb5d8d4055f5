"""Texts of refusals: reason code and sentence for the ledger, and the redacted sentence for the coordinator."""

from __future__ import annotations

import logging
from typing import cast

from consilium_shared import limits
from consilium_shared.canonical import parse_canonical
from consilium_shared.errors import (
    ConfigurationError,
    ConsiliumError,
    DataError,
    MachineError,
    PeerError,
    PolicyRefusal,
    SignatureError,
    VersionError,
)
from consilium_shared.printable import printable
from consilium_shared.protocol.reasons import Reason
from consilium_shared.schema import OLDEST, SCHEMA

log = logging.getLogger("consilium.agent")


def reason_of(error: ConsiliumError) -> tuple[Reason, str]:
    """Reason code and sentence of a refusal, for the ledger."""
    match error:
        case PolicyRefusal():
            return cast(Reason, error.reason_code), error.detail  # the message's model checks it
        case DataError():
            log.error("%s", error)  # names files and columns, no values
            return "data", "the site's data cannot be used as the study asks"
        case SignatureError():
            return "bad-signature", "a signature in the request does not verify"
        case VersionError():
            return "version", str(error)
        case PeerError():
            return "malformed", str(error)
        case MachineError():
            log.error("%s", error)
            return "internal", "the site's machine cannot compute the study with privacy; its log says why"
        case ConfigurationError():
            log.error("%s", error)
            return "internal", "the site's configuration does not allow it; its log says what"
        case _:
            log.error("%s", error)
            return "internal", "the site failed; its log says where"


CURES = {
    "data": "mend what log/agent.log names (consilium-site data check STUDY.yaml tells); the coordinator asks again",
    "policy": "the site's policy is in site.yaml; the coordinator asks again",
    "budget": "the budget is in site.yaml (consilium-site budget tells what is left); the coordinator asks again",
    "malformed": "the message is none that this program knows; the coordinator asks again",
    "version": "this program is older than the coordinator's: upgrade it here; the coordinator asks again",
    "witness": "this ledger and the coordinator's records disagree: see the runbook suspected-site.md",
    "too-slow": "a round takes this machine longer than round_timeout (log/agent.log has the figures); free the "
    "machine and run consilium-site retry STUDY, or choose a faster device in site.yaml and restart the site's "
    "programs: the coordinator asks again. Or ask for a longer round_timeout",
    "rejected": "after an approval here the coordinator asks again when its people resume the study",
}
"""Reason to what brings a site back, for its own people."""


def outgoing(reason: str, detail: str) -> str:
    """Redacted sentence of a refusal, for the coordinator: without what it may not learn of this site.

    The arithmetic of a budget tells what other studies spent. What is wrong with a history that was shown would help
    to make up a better one.
    """
    if reason == "budget":
        return "the privacy budget at this site does not cover it"
    if reason == "witness":
        return "what is shown of the rounds before is not what this site knows of them; its ledger says why"
    return detail


def protocol_of(header: bytes) -> int:
    """Protocol in which to refuse an unreadable header: the one that it names, else the oldest.

    Nothing but that may depend on it: whose header it is, is not known.
    """
    try:
        body = parse_canonical(header[: limits.HEADER_BYTES])["body"]
        number = body.get("protocol", OLDEST)
    except (PeerError, KeyError, TypeError, AttributeError):
        return OLDEST
    return min(max(number, OLDEST), SCHEMA) if isinstance(number, int) else OLDEST


def sentence(text: str) -> str:
    """At most ``limits.DETAIL_CHARACTERS`` printable characters of a text that may quote a peer."""
    return printable(text)[: limits.DETAIL_CHARACTERS]


def location_of(error: BaseException) -> str:
    """Type and place of a defect; its text may quote data."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "?"
    return f"{type(error).__name__} at {line}"
