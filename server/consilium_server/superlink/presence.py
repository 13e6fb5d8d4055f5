"""Presence of the sites at the SuperLink: when each was heard last, of which release, and whose clock is refused.

The SuperLink's process notes it from the heads of signed requests, and writes it down every few seconds;
``consilium-server status`` and ``doctor`` read the file, also while nothing serves.

superlink/presence.json     {SHA-256 of a SuperNode's public key (PEM): {"seen": time, "release": text or null,
                            "clock": seconds ahead or null, "refused": time or null}}
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from consilium_shared.canonical import digest
from consilium_shared.files import write_atomically
from consilium_shared.printable import printable
from consilium_shared.protocol.roster import Roster

logger = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
RELEASE_CHARACTERS = 40
FILE = "presence.json"


@dataclass
class Presence:
    """Last traces of one site's SuperNode; times are seconds since 1970.

    Attributes:
        seen: last request that was taken.
        release: that its requests named; None of one that names none.
        clock: seconds by which its clock was ahead (negative: behind) when a request of its was refused for that.
        refused: time of that refusal.
    """

    seen: float | None = None
    release: str | None = None
    clock: float | None = None
    refused: float | None = None

    def wrong_clock(self) -> float | None:
        """Seconds by which its clock is ahead, where it was refused for that after it was last taken."""
        late = self.refused is not None and (self.seen is None or self.refused > self.seen)
        return self.clock if late else None


class Presences:
    """Presences of all SuperNodes that have signed a request, by the digest of their public key."""

    def __init__(self, directory: Path) -> None:
        """``directory``: the SuperLink's own; what was noted before is read."""
        self._file = directory / FILE
        self._of = read(directory)
        self._changed = False

    def taken(self, key: bytes, release: bytes | None) -> None:
        """A request that this key (PEM) signed was taken; ``release`` as its header says."""
        found = self._of.setdefault(digest(key), Presence())
        found.seen = time.time()
        if release is not None:
            found.release = printable(release.decode("utf-8", "replace"))[:RELEASE_CHARACTERS]
        self._changed = True

    def refused(self, key: bytes, ahead: float) -> None:
        """A request of a registered key was refused because its time was so many seconds ahead."""
        found = self._of.setdefault(digest(key), Presence())
        found.clock, found.refused = round(ahead, 1), time.time()
        self._changed = True

    def write(self) -> None:
        """Write down what has changed since; a full disk is no reason to end."""
        if not self._changed:
            return
        self._changed = False
        try:
            write_atomically(self._file, json.dumps({key: asdict(each) for key, each in self._of.items()}).encode())
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._file, error.strerror)

    async def keep(self) -> None:
        """Write down every few seconds, until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(EVERY_SECONDS)
                self.write()
        finally:
            self.write()


def read(directory: Path) -> dict[str, Presence]:
    """Presences that were written down; none where there is no file, or one that cannot be read."""
    try:
        content: dict[str, Any] = json.loads((directory / FILE).read_bytes())
        return {key: Presence(**each) for key, each in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def of_sites(directory: Path, roster: Roster) -> dict[str, Presence]:
    """Presence of each site of the roster; an empty one where nothing was heard of it."""
    found = read(directory)
    return {member.site: found.get(_key(member.supernode), Presence()) for member in roster.members}


def _key(supernode: str) -> str:
    public = serialization.load_ssh_public_key(supernode.encode())
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return digest(public.public_bytes(*form))
