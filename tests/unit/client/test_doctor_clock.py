"""A clock that Flower refuses is found by the site's doctor, held against the server's own, with what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from tests.support.listener import listening

from consilium_client.commands import doctor
from consilium_client.commands.doctor import Finding
from consilium_client.site import Home

Told = Callable[[], str | None]


@pytest.fixture
def clock(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Told], Finding]]:
    """``clock(told)``: the finding where a server with the federation's certificate says that it is ``told()``."""
    answer: list[Told] = []

    def reply(_: BaseHTTPRequestHandler) -> tuple[int, dict[str, str]]:
        date = answer[-1]()
        return 401, {} if date is None else {"Date": date}  # the status does not matter

    def found(told: Told) -> Finding:
        answer.append(told)
        return doctor._clock(coordinator.site)

    with listening(coordinator, monkeypatch, reply):
        yield found


def shifted(seconds: float) -> Told:
    """What a server says against whose clock this machine's is so much ahead."""
    return lambda: formatdate(time.time() - seconds, usegmt=True)


@pytest.mark.parametrize(
    ("ahead", "state", "words"),
    [
        (7200, "error", "7200 s ahead of the server's"),
        (60, "error", "ahead of the server's; Flower refuses more than 5 s ahead or 300 s behind: set it (NTP)"),
        (0, "ok", "as the server's"),
        (-30, "ok", "s behind the server's"),
        (-200, "warning", "s behind the server's; Flower refuses"),
        (-1200, "error", "s behind the server's; Flower refuses"),
    ],
)
def test_a_clock_is_held_against_the_servers(
    clock: Callable[[Told], Finding], ahead: float, state: str, words: str
) -> None:
    finding = clock(shifted(ahead))
    assert finding.state == state
    assert words.removeprefix("7200 ") in finding.detail


@pytest.mark.parametrize("told", [None, "the day before yesterday"])
def test_an_answer_without_a_time_tells_nothing_and_says_so(clock: Callable[[Told], Finding], told: str | None) -> None:
    finding = clock(lambda: told)
    assert finding.state == "warning"
    assert "cannot be told: the server's answer has no time" in finding.detail


def test_a_server_that_does_not_answer_is_the_other_checks_matter(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = coordinator.site.invitation().model_copy(update={"port": 1})
    monkeypatch.setattr(Home, "invitation", lambda _: there)
    finding = doctor._clock(coordinator.site)
    assert finding.state == "warning"
    assert "see coordinator" in finding.detail


def test_a_clock_near_what_is_refused_is_noted_before() -> None:
    assert doctor.NOTED_AHEAD_SECONDS < doctor.AHEAD_SECONDS == SYSTEM_TIME_TOLERANCE
    assert doctor.NOTED_BEHIND_SECONDS < doctor.BEHIND_SECONDS == TIMESTAMP_TOLERANCE
