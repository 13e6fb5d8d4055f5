"""The start of the SuperLink, waited for as long as it makes progress; a start that fails, with its cause."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from consilium_server.superlink.control import wait_until_ready
from consilium_server.superlink.settings import LAST_WORD, SuperLinkSettings
from consilium_shared.errors import ConfigurationError, TransportError
from consilium_shared.process.supervisor import Supervisor

STILL_SECONDS = 180.0
"""Seconds without a change of log and files after which a start is given up; there is no limit while they change."""
SAID_EVERY_SECONDS = 30.0

_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)(: .+)?")
"""The line of a traceback that says what was raised."""


def wait_for_superlink(log: Path, link: SuperLinkSettings, supervisor: Supervisor, say: Callable[[str], None]) -> None:
    """Wait until the supervised SuperLink answers.

    Args:
        log: its log; what stands in it before this call is of earlier starts.
        link: where it listens.
        supervisor: that which has started it; stopped when the start fails.
        say: told from time to time that it still starts.

    Raises:
        ConfigurationError: it ended, or nothing moves any more; with the line of the log that says why.
    """
    before = log.stat().st_size if log.exists() else 0
    supervisor.tick()
    begun = moved = said = time.monotonic()
    seen = traces(log, link)
    while True:
        try:
            wait_until_ready(link, timeout=1.0)
        except TransportError:
            now = time.monotonic()
            if (found := traces(log, link)) != seen:
                seen, moved = found, now
            if not supervisor.alive("superlink"):
                end = f"the SuperLink does not start ({log})"
            elif now - moved > STILL_SECONDS:
                end = f"the SuperLink does not start: its log and its files stand still since {now - moved:.0f} s"
            else:
                if now - said > SAID_EVERY_SECONDS:
                    said = now
                    say(f"the SuperLink is still starting, for {now - begun:.0f} s now: {cause(log, before)}")
                continue
            supervisor.stop()
            raise ConfigurationError(f"{end}: {cause(log, before)}") from None
        return


def traces(log: Path, link: SuperLinkSettings) -> set[tuple[str, int, int]]:
    """Sizes and times of the files that a start writes."""
    found = set()
    for file in (log, *link.directory.glob("*")):  # of a folder that is not there yet: none
        try:
            status = file.stat()
        except FileNotFoundError:  # renamed since
            continue
        found.add((file.name, status.st_size, status.st_mtime_ns))
    return found


def cause(log: Path, start: int) -> str:
    """The line of the SuperLink's log, from byte ``start`` on, that says why it ended.

    Its last word, where it had one; else what the last traceback says was raised, for the lines after that quote SQL
    and other people's web pages; else the last line.
    """
    try:
        with log.open("rb") as file:
            file.seek(start if start <= log.stat().st_size else 0)  # a long log was moved away at the start
            lines = [line.rstrip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except FileNotFoundError:
        lines = []
    for line in reversed(lines):
        if line.startswith(LAST_WORD):
            return line.removeprefix(LAST_WORD)
        if _RAISED.fullmatch(line):
            return line
    return lines[-1] if lines else "its log is empty"
