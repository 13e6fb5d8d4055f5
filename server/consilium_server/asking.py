"""A question is put to sites until it is done: who is open is asked, answers are taken one by one, and said aloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from consilium_server.conversation import WEEK_SECONDS, Conversation
from consilium_server.exchange import Answer as Arrival
from consilium_server.exchange import ask
from consilium_server.recruitment import Recruitment
from consilium_server.rounds import Question
from consilium_shared import messages
from consilium_shared.errors import PeerError
from consilium_shared.messages import Refusal
from consilium_shared.study import seconds

RETRY_SECONDS = 1.0

Requests = Mapping[str, tuple[bytes, bytes]]
"""Site to the header and the payload of what it is asked."""
Accept = Callable[[messages.Answer, Arrival], None]
"""Takes a verified answer, or raises PeerError for one that cannot be used."""


class Asking:
    """What every exchange of a study with its sites has in common."""

    def __init__(self, talk: Conversation, recruitment: Recruitment) -> None:
        self.talk, self.folder, self.recruitment = talk, talk.folder, recruitment

    def question(
        self,
        number: int,
        phase: str,
        sites: tuple[str, ...],
        minimum: int,
        *,
        awaited: frozenset[str] | None = None,
        least: int | None = None,
    ) -> Question:
        """A question of round ``number``; the rest as ``rounds.Question`` has it."""
        self.folder.event("round", round=number, phase=phase, sites=list(sites))
        timeout = seconds(self.talk.study.aggregation.round_timeout)
        return Question(sites, minimum, time.monotonic(), timeout, awaited, least, phase)

    def ask(self, question: Question, number: int, requests: Requests, answer_bytes: int, accept: Accept) -> None:
        """Until the question is done; ``answer_bytes``: most that an answer's payload may have."""
        began = time.monotonic()
        said: dict[str, Any] = {}

        def look(status: Mapping[str, str]) -> None:
            late = time.monotonic() - question.opened > question.timeout
            offline = {site: what for site, what in status.items() if late or what == "offline"}
            now = {"sites": offline, "have": len(question.answered), "minimum": question.minimum}
            if offline and now != said:
                self.folder.event("waiting", **now)
            said.update(now)

        def abort() -> bool:
            self.talk.check_wanted()
            return question.done(time.monotonic())

        while not question.done(time.monotonic()):
            for site in question.open():
                if site not in self.talk.nodes:
                    question.problem(site, "its SuperNode is not registered")
            arrivals = ask(
                self.talk.grid,
                {site: requests[site] for site in question.open() if site in self.talk.nodes},
                self.talk.nodes,
                WEEK_SECONDS,
                spool=self.folder.root,
                payload_bytes=answer_bytes,
                on_wait=look,
                abort=abort,
            )
            for arrival in arrivals:
                self._take(question, number, arrival, requests[arrival.site][0], accept, time.monotonic() - began)
            if not question.done(time.monotonic()):
                self.talk.pause(RETRY_SECONDS)
        for site in question.stopped():
            self.recruitment.standing[site] = "refused"

    def _take(
        self,
        question: Question,
        number: int,
        arrival: Arrival,
        header: bytes,
        accept: Accept,
        took: float,
    ) -> None:
        site = arrival.site
        if arrival.problem is not None:
            if arrival.problem != "aborted":
                question.problem(site, arrival.problem)
                self.folder.event("problem", round=number, site=site, what=arrival.problem)
            return
        try:
            answer = self.talk.decode(arrival, header)
            if not isinstance(answer, Refusal):
                accept(answer, arrival)
        except PeerError as error:
            question.refuse(site, "malformed", str(error))
            self.folder.event("refusal", round=number, site=site, reason="malformed", detail=str(error))
            return
        if isinstance(answer, Refusal):
            question.refuse(site, answer.reason, answer.detail)
            if site in question.open():
                self.folder.event("problem", round=number, site=site, what=answer.detail)
                return
            self.folder.event("refusal", round=number, site=site, reason=answer.reason, detail=answer.detail)
            if answer.reason in ("pending", "unknown-study"):
                self.recruitment.standing[site] = "pending"
            return
        question.answer(site)
        size = arrival.payload.size
        about = {"phase": question.phase, "seconds": round(took, 3), "bytes": size}
        self.folder.event("answer", round=number, site=site, **about)
