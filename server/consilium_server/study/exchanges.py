"""Exchanges of a study with its sites: one request to many, repeated until the exchange is done; every reply logged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from consilium_server.state.heads import TwoLedgers
from consilium_server.study.context import WEEK_SECONDS, AskAgain, RemovedSite, StudyContext
from consilium_server.study.exchange_state import LATECOMER_SECONDS, ExchangeState
from consilium_server.study.recruitment import Recruitment
from consilium_server.transport.exchange import Answer as Arrival
from consilium_server.transport.exchange import ask
from consilium_shared.errors import PeerError
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Refusal
from consilium_shared.protocol.reasons import PASSING
from consilium_shared.schema import OLDEST
from consilium_shared.study import seconds
from consilium_shared.transport.upload import Upload

log = logging.getLogger("consilium.study")

RETRY_SECONDS = 1.0
SHORT = frozenset({"keys", "handshake", "survivors", "opening"})
"""Phases whose answers take a site no work: their time is that of the way."""
KEYS = frozenset({"keys", "handshake"})
"""Phases before a site's answer is counted on."""

Requests = Mapping[str, tuple[bytes, bytes | Upload]]
"""Site to the header and the payload of what it is asked."""
Accept = Callable[[messages.Answer, Arrival], None]
"""Takes a verified answer, or raises PeerError for one that cannot be used."""


@dataclass(frozen=True)
class Aside:
    """Request for keys sent alongside another exchange; nobody waits for its answers.

    Attributes:
        number: the round that it is about.
        header: what is asked.
        sites: whom to ask now.
        accept: takes an answer.
    """

    number: int
    header: bytes
    sites: Callable[[], tuple[str, ...]]
    accept: Accept


@dataclass(frozen=True)
class Exchange:
    """One request to each of many sites, and when there are enough answers.

    Attributes:
        phase: ``keys``, ``handshake``, ``training``, ``evaluation``, ``survivors``, ``opening`` or ``closing``.
        number: the round that it belongs to.
        requests: site to the header and the payload of what it is asked.
        accept: takes an answer.
        minimum: so many answers are enough.
        answer_bytes: largest payload of an answer.
        awaited, least: as ``ExchangeState`` has them.
        aside: a question for keys that is put beside this one.
    """

    phase: str
    number: int
    requests: Requests
    accept: Accept
    minimum: int
    answer_bytes: int = 0
    awaited: frozenset[str] | None = None
    least: int | None = None
    aside: Aside | None = None


class Exchanges:
    """Runner of a study's exchanges: what they all have in common, and the pace of each site."""

    def __init__(self, context: StudyContext, recruitment: Recruitment) -> None:
        self.context, self.folder, self.recruitment = context, context.folder, recruitment
        self._pace: dict[str, float] = {}
        """Seconds that a site's last short answer took, from when it was there to be asked."""
        self._status: dict[str, str] = {}
        self._there: dict[str, float] = {}
        """Time at which a site that is asked was first seen to have the state."""

    def run(self, exchange: Exchange) -> ExchangeState:
        """Send the request, and again, until the exchange is done; returns who answered, who refused, who was away."""
        self.folder.event("round", round=exchange.number, phase=exchange.phase, sites=list(exchange.requests))
        state = ExchangeState(
            tuple(exchange.requests),
            exchange.minimum,
            time.monotonic(),
            seconds(self.context.study.aggregation.round_timeout),
            exchange.awaited,
            exchange.least,
            exchange.phase,
        )
        self._status, self._there = {}, {}
        said: dict[str, Any] = {}

        def look(status: Mapping[str, str]) -> None:
            now = time.monotonic()
            self._status.update(status)
            for site, what in status.items():
                if what == "asked":
                    self._there.setdefault(site, now)
                else:
                    self._there.pop(site, None)
            if state.phase == "keys":
                state.latecomers = self._window(state)
            late = now - state.opened > state.timeout
            waiting = {site: status[site] for site in state.open() if site in status}
            offline = {site: what for site, what in waiting.items() if late or what == "offline"}
            about = {"sites": offline, "have": len(state.answered), "minimum": state.minimum}
            if offline and about != said:
                self.folder.event("waiting", **about)
            said.update(about)

        while not state.done(time.monotonic()):
            self._pass(exchange, state, look)
            if not state.done(time.monotonic()):
                self.context.pause(RETRY_SECONDS)
        waited = time.monotonic() - state.opened
        attendance, number = self.recruitment.attendance, exchange.number
        for site, what in state.away().items():
            told = self._told(site, state.phase, what, waited)
            timed_out = state.phase == "training" and waited >= state.timeout
            if timed_out and (again := attendance.late(site, number)) > number + 1:
                told += f"; it is left out until round {again}, as it was late before"
            attendance.note_away(site, told)
        return state

    def _pass(self, exchange: Exchange, state: ExchangeState, look: Callable[[Mapping[str, str]], None]) -> None:
        """Ask whoever is open once, and whoever is to be asked aside."""
        for site in state.open():
            if (why := self.context.removal(site)) is not None:
                self._refused(exchange, state, site, "removed", why)
            elif site not in self.context.nodes:
                state.problem(site, "its SuperNode is not registered")
        aside = exchange.aside
        asked = {site: exchange.requests[site] for site in state.open() if site in self.context.nodes}
        beside = [site for site in aside.sites() if self.context.removal(site) is None] if aside is not None else []
        put: dict[str, tuple[bytes, bytes | Upload]] = dict(asked)
        if aside is not None:
            put |= {site: (aside.header, b"") for site in beside if site in self.context.nodes and site not in asked}
        put = {site: self.context.instead(site) or request for site, request in put.items()}
        left = set(asked)
        for site, (header, _) in put.items():
            self.context.note_asked(site, header)

        def abort() -> bool:
            self.context.check_wanted()
            return state.done(time.monotonic()) or not left or self.context.nodes_changed()

        arrivals = ask(
            self.context.grid,
            put,
            self.context.nodes,
            WEEK_SECONDS,
            spool=self.folder.root,
            payload_bytes=exchange.answer_bytes,
            on_wait=look,
            abort=abort,
            compact=asked if self.context.study.schema_version > OLDEST else (),
        )
        for arrival in arrivals:
            left.discard(arrival.site)
            if arrival.site in asked:
                self._take(exchange, state, arrival, put[arrival.site][0])
            elif aside is not None and arrival.problem is None:
                self._take_aside(aside, arrival, put[arrival.site][0])

    def _take(self, exchange: Exchange, state: ExchangeState, arrival: Arrival, header: bytes) -> None:
        site, number = arrival.site, exchange.number
        if arrival.problem is not None:
            if arrival.problem != "aborted":
                state.problem(site, arrival.problem)
                self.folder.event("problem", round=number, site=site, what=arrival.problem)
            return
        try:
            refusal = self._read(arrival, header, exchange.accept)
        except AskAgain as again:
            state.problem(site, str(again))
            log.info("%s: %s", site, again)
            return
        if refusal is None:
            state.answer(site)
            took = time.monotonic() - state.opened
            if state.phase in SHORT:
                self._keep_pace(site)
            about = {"phase": state.phase, "seconds": round(took, 3), "bytes": arrival.payload.size}
            self.folder.event("answer", round=number, site=site, **about)
            return
        self._refused(exchange, state, site, *refusal)

    def _refused(self, exchange: Exchange, state: ExchangeState, site: str, reason: str, detail: str) -> None:
        number, attendance = exchange.number, self.recruitment.attendance
        state.refuse(site, reason, detail)
        attendance.note_refusal(site, reason, detail)
        if site in state.open():
            self.folder.event("problem", round=number, site=site, what=detail)
            return
        if reason in PASSING:
            self.folder.event("refusal", round=number, site=site, reason=reason, detail=detail)
        else:
            self._out(site, number, reason, detail, costly=state.phase not in KEYS)
        if reason in ("pending", "unknown-study"):
            attendance.undecided(site, lost=reason != "pending")

    def _take_aside(self, aside: Aside, arrival: Arrival, header: bytes) -> None:
        site, attendance = arrival.site, self.recruitment.attendance
        self._keep_pace(site)
        try:
            refusal = self._read(arrival, header, aside.accept)
        except AskAgain:
            return  # with the next exchange
        if refusal is None:
            if attendance.come(site):
                self.folder.event("back", round=aside.number, site=site)
        elif refusal[0] in ("pending", "unknown-study"):
            attendance.undecided(site, lost=refusal[0] != "pending")
        elif refusal[0] not in PASSING:
            self._out(site, aside.number, *refusal)

    def _read(self, arrival: Arrival, header: bytes, accept: Accept) -> tuple[str, str] | None:
        """Take an answer; the reason and the sentence where it is a refusal or cannot be used. Raises AskAgain."""
        try:
            answer = self.context.decode(arrival, header)
            if isinstance(answer, Refusal):
                return answer.reason, answer.detail
            accept(answer, arrival)
        except AskAgain:
            raise
        except RemovedSite as error:
            return "removed", str(error)
        except TwoLedgers as error:
            return "ledger", str(error)
        except PeerError as error:
            return "malformed", str(error)
        return None

    def _out(self, site: str, number: int, reason: str, detail: str, *, costly: bool = False) -> None:
        again = self.recruitment.attendance.refuse(site, reason, detail, number, costly=costly)
        self.folder.event("refusal", round=number, site=site, reason=reason, detail=detail, again=again)

    def _keep_pace(self, site: str) -> None:
        if site in self._there:
            self._pace[site] = time.monotonic() - self._there[site]

    def _window(self, state: ExchangeState) -> float:
        """Seconds for latecomers: twice what the slowest took last of those who are there and not in yet."""
        paces = [self._pace.get(site, 0.0) for site in state.open() if self._status.get(site) == "asked"]
        return min(max([LATECOMER_SECONDS, *(2 * pace for pace in paces)]), state.timeout)

    def _told(self, site: str, phase: str, what: str, waited: float) -> str:
        """Reason in words why a question closed without a site."""
        missed = {"keys": "gave no keys", "handshake": "no answer to the handshake", "training": "gave no update"}
        found = f"{missed.get(phase, f'no answer ({phase})')} in {waited:.1f} s"
        if site not in self.context.nodes or what not in ("no answer yet", "timeout", "unavailable"):
            return f"{found}: {what}"
        where = {"asked": "it was asked and had not answered", "offline": "its SuperNode was not connected"}
        pace = self._pace.get(site)
        took = f"; its last answer took {pace:.1f} s" if phase in SHORT and pace is not None else ""
        return f"{found}: {where.get(self._status.get(site, 'offline'), 'not reached')}{took}"
