"""Ask sites a question each, and receive their answers: deadlines, absences, repetitions.

Sites answer idempotently (asked the same again, a site returns the same bytes), so a question is simply repeated
when a SuperNode restarted, was away, or an answer was lost; the first answer of a site counts.

Leans on flwr 1.41 (pinned) through ``study_run`` and by the public ``Message`` alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import ArrayRecord, Message, RecordDict

from consilium_server.transport.study_run import StudyGrid, content_of, open_grid
from consilium_shared import limits
from consilium_shared.errors import TransportError
from consilium_shared.transport.upload import Upload

__all__ = ["Answer", "StudyGrid", "ask", "open_grid"]


SUPERLINK_PATIENCE_S = 90.0
"""Seconds for which the SuperLink may be away. It ends a study's lease itself after 60 s without a sign of life."""
CENSUS_S = 1.0
"""Seconds between two questions to the SuperLink which SuperNodes are connected."""
REPEAT_S = 2.0
"""Least time between two deliveries of one question to one site."""
MESSAGE_TYPE = "train"


@dataclass(frozen=True)
class Answer:
    """Answer of one site, or why there is nothing.

    Attributes:
        site: the site's name.
        header: the answer's bytes, unverified; empty when there is a problem.
        payload: unverified; to be read before the next answer is asked for, which closes it.
        problem: None, or ``unavailable`` (never reached within the time), ``timeout`` (reached, no answer),
            ``crashed`` (the site's software failed), ``malformed`` (an answer of the wrong form or size),
            ``aborted`` (we stopped waiting).
    """

    site: str
    header: bytes
    payload: Upload
    problem: str | None


@dataclass
class _Question:
    """A site that has not answered yet."""

    site: str
    node: int
    content: RecordDict
    activation: str | None = None  # the life of the SuperNode that holds our question; None: nobody holds it
    next_push: float = 0.0
    problem: str = "unavailable"


def ask(
    grid: StudyGrid,
    requests: Mapping[str, tuple[bytes, bytes | Upload]],
    nodes: Mapping[str, int],
    timeout_s: float,
    *,
    spool: Path,
    poll_s: float = 0.2,
    payload_bytes: int = limits.PAYLOAD_BYTES,
    on_wait: Callable[[Mapping[str, str]], None] | None = None,
    abort: Callable[[], bool] | None = None,
    compact: Container[str] = (),
) -> Iterator[Answer]:
    """Ask every site its question; yield each answer as it arrives, and one ``Answer`` per site in the end.

    A site that is offline is asked as soon as it is back within ``timeout_s``. Between two yields the answers of
    other sites stay in the SuperLink's store; of a large payload at most one piece is in memory here.

    Args:
        grid: from ``open_grid``.
        requests: site -> (header, payload). One payload *object* given to many sites is sent and stored once.
        nodes: site -> node id, from ``superlink_control.register_nodes``.
        timeout_s: seconds after which the missing sites are reported.
        spool: folder for an answer's payload when it is large; nothing of it is left there.
        poll_s: seconds between two looks.
        payload_bytes: largest payload accepted in an answer.
        on_wait: called before each pause with site -> ``offline`` or ``asked`` for the sites still missing.
        abort: return True to stop waiting.
        compact: sites that read compact messages (``consilium_shared/transport/objects.py``).

    Raises:
        TransportError: the SuperLink was away too long, or has ended this study's run.
    """
    shared: dict[int, ArrayRecord] = {}
    waiting = {
        site: _Question(site, nodes[site], content_of(header, payload, shared, site in compact))
        for site, (header, payload) in requests.items()
    }
    asked: dict[str, str] = {}  # message id -> site; a repeated question has several ids
    deadline = time.monotonic() + timeout_s
    patience = _Patience(grid)
    next_census = 0.0
    try:
        while waiting and time.monotonic() < deadline:
            if abort is not None and abort():
                for question in waiting.values():
                    question.problem = "aborted"
                break
            with patience:
                if time.monotonic() >= next_census:
                    _push_due(grid, waiting, asked, grid.activations(), deadline)
                    next_census = time.monotonic() + CENSUS_S
                seconds = min(next_census, deadline) - time.monotonic()
                for reply in grid.receive(set(asked), payload_bytes, spool, max(seconds, 0.0)):
                    with reply.payload:
                        site = asked.pop(reply.question, "")
                        if site not in waiting:
                            continue  # a second answer to a question that was repeated
                        if reply.problem in ("lost", "unavailable"):
                            question = waiting[site]
                            question.activation, question.problem = None, "unavailable"
                            question.next_push = time.monotonic() + REPEAT_S
                            continue
                        del waiting[site]
                        yield Answer(site, reply.header, reply.payload, reply.problem)
            if waiting:
                if on_wait is not None:
                    on_wait({each.site: "asked" if each.activation else "offline" for each in waiting.values()})
                grid.pause(min(poll_s, max(0.0, deadline - time.monotonic())))
    finally:
        with contextlib.suppress(httpx.HTTPError):
            grid.forget()
    for question in waiting.values():
        with Upload(spool) as nothing:
            yield Answer(question.site, b"", nothing, question.problem)


def _push_due(
    grid: StudyGrid,
    waiting: Mapping[str, _Question],
    asked: dict[str, str],
    online: Mapping[int, str],
    deadline: float,
) -> None:
    """Send the question to every connected site whose present SuperNode does not hold it."""
    now = time.monotonic()
    due = []
    for question in waiting.values():
        activation = online.get(question.node)
        if activation is not None and activation != question.activation and now >= question.next_push:
            due.append((question, activation))
    if not due:
        return
    # A site that answers after the deadline is refused by the SuperLink, so nothing stale is stored.
    ttl = max(deadline - now, 1.0) + 60.0
    messages = [Message(each.content, each.node, MESSAGE_TYPE, ttl=ttl) for each, _ in due]
    for message_id, (question, activation) in zip(grid.push_messages(messages), due, strict=True):
        question.next_push = now + REPEAT_S
        if message_id:
            asked[message_id] = question.site
            question.activation, question.problem = activation, "timeout"


class _Patience:
    """Bridges a short absence of the SuperLink; tells an absence from the end of the run."""

    def __init__(self, grid: StudyGrid) -> None:
        self._grid = grid
        self._since: float | None = None

    def __enter__(self) -> None:
        self._grid.check()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None:
            self._since = None
            return False
        if not isinstance(error, httpx.HTTPError):
            return False
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            raise TransportError(
                f"The SuperLink no longer accepts this study's run (HTTP {error.response.status_code}). "
                "Resume the study from its checkpoint."
            ) from None
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > SUPERLINK_PATIENCE_S:
            raise TransportError(f"The SuperLink has been away for {SUPERLINK_PATIENCE_S:.0f} s.") from None
        return True
