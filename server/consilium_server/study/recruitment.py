"""Recruitment of sites: the study is proposed until enough hospitals have approved it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping

from consilium_server.state.heads import TwoLedgers
from consilium_server.study.attendance import Attendance
from consilium_server.study.context import WEEK_SECONDS, AskAgain, Halted, RemovedSite, StudyContext
from consilium_server.study.exchange_state import LATECOMER_SECONDS
from consilium_server.transport.exchange import ask
from consilium_shared.errors import PeerError
from consilium_shared.protocol.messages import ApprovalStatus, Refusal
from consilium_shared.secagg.terms import fewest_sites, least_sites
from consilium_shared.study import seconds

log = logging.getLogger("consilium.study")

PENDING_SECONDS = 2.0
"""Seconds between the first two questions to hospitals that have not decided."""
PENDING_GROWTH = 1.25
"""Growth of the pause while none of them decides: a question costs the server and each site work."""
PENDING_LONGEST = 60.0
"""Seconds; a decision is seen within them."""


class Recruitment:
    """Status of the study with each site of its roster."""

    def __init__(self, context: StudyContext) -> None:
        self.context = context
        sites = [member.site for member in context.roster.members]
        self.attendance = Attendance(sites, context.study.training.rounds, context.folder.root / "attendance")

    def gather(self, awaited: frozenset[str]) -> None:
        """Propose to the undecided until enough have approved and all of ``awaited`` have decided, or time is up.

        Nobody can hold a study up for longer than ``round_timeout``, unless there are too few without them.
        """
        opened = time.monotonic()
        patience = seconds(self.context.study.aggregation.round_timeout)
        minimum = fewest_sites(self.context.study, self.context.roster.members)
        said: dict[str, str] = {}
        pause = PENDING_SECONDS
        while undecided := self.sites("pending"):
            enough = len(self.sites("approved")) >= minimum
            left = patience - (time.monotonic() - opened)
            self._propose(undecided, max(left, 0.0) if awaited & set(undecided) else patience, enough and not awaited)
            approved, undecided = self.sites("approved"), self.sites("pending")
            if len(approved) + len(undecided) < minimum:
                raise Halted(self.too_few())
            late = time.monotonic() - opened >= patience
            if len(approved) >= minimum and (late or not awaited & set(undecided)):
                return
            waiting = dict.fromkeys(undecided, "not decided")
            if waiting and waiting != said:
                self.context.folder.event("waiting", sites=waiting, have=len(approved), minimum=minimum)
                said, pause = waiting, PENDING_SECONDS
            self.context.pause(pause)
            pause = min(pause * PENDING_GROWTH, PENDING_LONGEST)
        if len(self.sites("approved")) < minimum:
            raise Halted(self.too_few())

    def _propose(self, sites: tuple[str, ...], longest: float, latecomers: bool) -> None:
        """Ask sites where the study stands with them, for at most so many seconds; latecomers hold nobody up."""
        header = self.context.proposal()
        seen: dict[str, str] = {}
        deadline = time.monotonic() + (LATECOMER_SECONDS if latecomers else max(LATECOMER_SECONDS, longest))

        def abort() -> bool:
            self.context.check_wanted()
            only_offline = bool(seen) and "asked" not in seen.values()
            return only_offline or time.monotonic() >= deadline or self.context.nodes_changed()

        def look(status: Mapping[str, str]) -> None:
            seen.clear()
            seen.update(status)

        for site in sites:
            if (why := self.context.removal(site)) is not None:
                self._set_standing(site, "refused", "removed", why)
        sites = tuple(site for site in sites if self.context.removal(site) is None)
        requests = {site: self.context.instead(site) or (header, b"") for site in sites if site in self.context.nodes}
        for site, (asked, _) in requests.items():
            self.context.note_asked(site, asked)
        arrivals = ask(
            self.context.grid,
            requests,
            self.context.nodes,
            WEEK_SECONDS,
            spool=self.context.folder.root,
            payload_bytes=0,
            on_wait=look,
            abort=abort,
        )
        for arrival in arrivals:
            if arrival.problem is not None:
                continue
            try:
                answer = self.context.decode(arrival, requests[arrival.site][0])
            except AskAgain as again:
                log.info("%s: %s", arrival.site, again)
                continue
            except RemovedSite as error:
                self._set_standing(arrival.site, "refused", "removed", str(error))
                continue
            except TwoLedgers as error:
                self._set_standing(arrival.site, "refused", "ledger", str(error))
                continue
            except PeerError as error:
                self._set_standing(arrival.site, "refused", "malformed", str(error))
                continue
            if isinstance(answer, ApprovalStatus):
                self._set_standing(arrival.site, answer.state, None, "")
            elif isinstance(answer, Refusal) and answer.reason != "internal":  # a failure there may pass
                self._set_standing(arrival.site, "refused", answer.reason, answer.detail)

    def _set_standing(self, site: str, state: str, reason: str | None, detail: str) -> None:
        there, again = self.attendance, None
        if state != there.standing[site] or state == "refused":
            log.info("%s: %s %s", site, state, reason or "")
        known = there.standing[site]
        if reason is not None:
            again = there.refuse(site, reason, detail, there.round, costly=True)
        elif state == "approved":
            there.come(site)
        else:
            there.undecided(site)
        if known != state or state == "refused":
            about = {"state": state, "reason": reason, "detail": detail, "again": again}
            self.context.folder.event("proposal", site=site, **about)

    def sites(self, state: str) -> tuple[str, ...]:
        """Sites that are ``pending``, ``approved`` or ``refused``."""
        return self.attendance.sites(state)

    def due(self, number: int, cohort: Collection[str]) -> tuple[str, ...]:
        """Sites outside the cohort that are to be asked for keys for round ``number``."""
        if self.context.resumed():
            self.attendance.recall()
        return self.attendance.due(number, cohort)

    def resting(self, number: int) -> frozenset[str]:
        """Sites that are left out of round ``number``, as they were late too often."""
        return self.attendance.resting(number)

    def too_few(self) -> str:
        """Reason why the study cannot go on with the sites that are left."""
        refused = self.attendance.told_out() or "none"
        undecided = ", ".join(self.sites("pending")) or "none"
        roster, asked = len(self.context.roster.members), self.context.study.aggregation.min_sites
        least = least_sites(self.context.study.aggregation, roster)
        why = f" (of a roster of {roster}: aggregation.corrupt_sites)" if least > asked else ""
        return (
            f"{least} sites are needed{why}, {len(self.sites('approved'))} take part; "
            f"refused or stopped: {refused}; not decided: {undecided}"
        )
