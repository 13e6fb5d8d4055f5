"""Conditions of which a hospital's people are told: a proposal, an absence, a lost connection, days of the server's
certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

from consilium_client.commands.ask import ask
from consilium_client.site import Home
from consilium_client.transport import connection, contact
from consilium_shared import certificates
from consilium_shared.errors import ConsiliumError
from consilium_shared.process.notices import Condition, Notify, Watch, Watcher

AWAY_SECONDS = 300.0
"""Seconds without a word of the server's before somebody is told."""
CERTIFICATE_LOOKS = 120
"""Looks from one at the server's certificate to the next: an hour."""


class Conditions:
    """Everything that is so at this site, look by look."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._looks = 0
        self._certificate: dict[str, Condition] = {}

    def now(self) -> dict[str, Condition]:
        """Everything that is so, by a name of its own."""
        if self._looks % CERTIFICATE_LOOKS == 0:
            self._certificate = dict(self._server_certificate())
        self._looks += 1
        return dict([*self._studies(), *self._connection()]) | self._certificate

    def _studies(self) -> Iterator[tuple[str, Condition]]:
        try:
            studies: list[dict[str, Any]] = ask(self._home.admin_socket, "studies")
        except ConsiliumError:  # the agent is starting, or ends again and again, which `up` says
            return
        for each in studies:
            name, digest = each["study"], each["digest"]
            if each["state"] == "pending":
                text = f"study {name} waits for this hospital's decision: consilium-site show {name}"
                yield f"proposal:{digest}", Condition("proposal", text)
            if each["state"] == "refused":
                text = f"study {name} was proposed, and this site's rules refuse it: consilium-site show {name}"
                yield f"refused:{digest}", Condition("proposal", text)
            if out := each["out"]:
                text = f"this site is out of study {name} ({out['reason']}): {out['cure']}"
                yield f"out:{digest}:{out['since']}", Condition("out", text)

    def _connection(self) -> Iterator[tuple[str, Condition]]:
        found = contact.read(self._home.root)
        if not found.connected():
            text = f"this site is not connected to the server ({found.said()}): consilium-site doctor"
            over = "server-back", "this site is connected to the server again"
            yield "server", Condition("server-away", text, AWAY_SECONDS, over)

    def _server_certificate(self) -> Iterator[tuple[str, Condition]]:
        try:
            shown = connection.presented(connection.of(self._home.root))
        except (OSError, ValueError, ConsiliumError, HTTPException):  # another condition's matter
            return
        if certificates.days_left(shown, datetime.now(UTC)) < certificates.WARNED_DAYS:
            until = f"{shown.not_valid_after_utc:%Y-%m-%d}"
            text = f"the server's certificate is valid until {until}: {connection.RENEWAL}"
            yield f"certificate:{until}", Condition("certificate", text)


def watch(home: Home, who: str, to: Notify | None, say: Callable[[str], None]) -> None:
    """Tell people from now on, where site.yaml names some."""
    if to is not None:
        Watcher(who, to, Watch(home.root / "run" / "told.json"), Conditions(home).now, say).start()
