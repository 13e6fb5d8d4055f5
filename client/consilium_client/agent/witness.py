"""A record that the coordinator shows, held against what this site knows; what fits is entered and countersigned.

So each hospital keeps the others' heads: a coordinator that shows two hospitals two histories, and a hospital that
rewrites its own, are found by whoever holds two of the ledgers.
"""

from __future__ import annotations

import logging

from consilium_client.agent.study_service import StudyService
from consilium_client.state.proposals import Proposal
from consilium_shared.errors import LedgerError, PolicyRefusal
from consilium_shared.ledger.entry import Audit
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import CanaryAudit, Recorded
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")

CONTRADICTION = 8
"""The verification step of ``ledger/verify.py`` that a well-formed entry of our own can fail."""

OLDER = (
    ": either the record is false, or a copy of this home ran, or an older one was put back. Stop all copies but one, "
    "keep every ledger, and see deploy/runbooks/two-homes.md"
)
"""Beside a head of this ledger that it does not have."""


def witness(service: StudyService, proposal: Proposal, recorded: Recorded) -> str:
    """Enter in the ledger what is shown of a record, once, and sign it.

    Returns:
        The countersignature: the same bytes for the same record.

    Raises:
        PolicyRefusal: reason ``witness``: what is shown contradicts this site's own ledger or what it was shown before.
            The text, for the ledger and the log, says in what.
    """
    try:
        _enter(service, proposal, recorded)
    except PolicyRefusal as refusal:
        log.error("the coordinator shows a wrong history of study %s: %s", proposal.study.study, refusal.detail)
        raise
    return messages.countersign(recorded.record, service.identity)


def _enter(service: StudyService, proposal: Proposal, recorded: Recorded) -> None:
    strangers = set(recorded.heads) - set(proposal.identities)
    if strangers:
        raise PolicyRefusal("witness", f"{', '.join(sorted(strangers))} stands in the record, but not in the roster")
    study, fields = proposal.study.digest, recorded.model_dump(mode="json")
    with service.ledger.exclusive():
        before = service.ledger.books.witnessed.get(study, {}).get(recorded.round)
        if before is not None:
            if before.model_dump(mode="json") != {"study": study, **fields}:
                raise PolicyRefusal("witness", f"another record of round {recorded.round} was shown before")
            return
        try:
            service.ledger.append("witness", {"study": study, **fields})
        except LedgerError as error:
            if error.step != CONTRADICTION:
                raise
            why = str(error).removeprefix(f"line {error.line}: step {error.step}: ")
            if service.site in recorded.heads and "head of this ledger" in why:
                why += OLDER
            raise PolicyRefusal("witness", why) from error


def last_audit(service: StudyService, study: Study) -> CanaryAudit | None:
    """The outcome of the last audit of the study with canaries at this site, in which no patient took part, or None."""
    audits = [
        entry.body
        for entry in service.ledger.entries
        if isinstance(entry.body, Audit) and entry.body.study == study.digest
    ]
    if not audits:
        return None
    last = audits[-1]
    return CanaryAudit(canaries=last.canaries, guesses=last.guesses, correct=last.correct)
