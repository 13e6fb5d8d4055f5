"""Leftovers of studies that were rejected, or ended because nothing was heard of them: updates, answers, keys and seeds
are deleted, at the latest at the next start.

The ledger stays, and so does what must not be done a second time, should the hospital approve the study again: which
rounds and models were worked on, by digest (``sum_store``), and the noised number of patients (``cohort``).
"""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta

from consilium_client.agent.absence import BY_POLICY, quiet_since
from consilium_client.state.clipping_norms import ClippingNorms
from consilium_client.state.draw_seeds import DrawSeeds
from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.paces import Paces
from consilium_client.state.responses import Responses
from consilium_client.state.results import Results
from consilium_client.state.sum_store import SumStore
from consilium_shared.ledger.entry import Approve, Reject

log = logging.getLogger("consilium.agent")


class Leftovers:
    """Deletion of what rejected studies left in a site's stores.

    Attributes:
        working: held while a request of the coordinator's is answered; nothing is deleted under its hands.
    """

    def __init__(
        self,
        ledger: LedgerFile,
        sums: SumStore,
        results: Results,
        responses: Responses,
        draw_seeds: DrawSeeds,
        clipping_norms: ClippingNorms,
        paces: Paces,
    ) -> None:
        self._ledger, self._sums, self._results, self._responses = ledger, sums, results, responses
        self._draw_seeds, self._clipping_norms = draw_seeds, clipping_norms
        self.working = threading.Lock()
        self._paces = paces
        self._gone: dict[str, Reject] = {}

    def end_quiet(self, days: int | None, now: datetime | None = None) -> None:
        """Withdraw the approval of every study of which nothing was heard for so many days, and delete what it left.

        So it is over in the ledger, whatever is asked later or fails in between: a request of it is refused, and what
        was reserved for it returns. While a request is answered nothing is withdrawn. None: nothing ever is.
        """
        if days is None or not self.working.acquire(blocking=False):
            return
        try:
            with self._ledger.exclusive():
                at = now or datetime.now(UTC)
                for study, decision in list(self._ledger.books.decisions.items()):
                    if not isinstance(decision, Approve):
                        continue
                    if since := quiet_since(self._ledger.entries, study, at, timedelta(days=days)):
                        why = f"nothing was asked since {since}, and the study was not closed"
                        about = {"study": study, "name": decision.name, "by": BY_POLICY, "reason": why}
                        self._ledger.append("reject", about)
                        log.warning("study %s: ended here by policy.quiet_days: %s", decision.name, why)
        finally:
            self.working.release()
        self.forget_rejected()

    def forget_rejected(self) -> None:
        """Delete what rejected studies have left. While a request is answered nothing is: its end calls this again."""
        if not self.working.acquire(blocking=False):
            return
        try:
            with self._ledger.exclusive():
                decided = dict(self._ledger.books.decisions)
            rejected = {study: decision for study, decision in decided.items() if isinstance(decision, Reject)}
            for study, decision in rejected.items():
                if self._gone.get(study) is decision:
                    continue
                self._results.forget(study)  # first: without it nothing is masked again, whatever else stays
                self._sums.forget_secrets(study)
                self._responses.forget(study)
                self._draw_seeds.end(study, "training")
                self._draw_seeds.end(study, "evaluation")
                self._clipping_norms.forget(study)
                self._paces.forget(study)
            self._gone = rejected
        finally:
            self.working.release()
