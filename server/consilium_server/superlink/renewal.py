"""Renewal of the server's certificate while it serves: a new one on the disk is taken for every new connection."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_SECONDS = 3.0


class Renewal:
    """Files of a certificate and its key, as they were last taken."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._taken = self._stamps()

    def _stamps(self) -> list[tuple[int, int]]:
        found = []
        for file in self._files:
            try:
                status = file.stat()
            except OSError:  # between one name and the next
                return []
            found.append((status.st_ino, status.st_mtime_ns))
        return found

    def look(self, contexts: Iterable[ssl.SSLContext]) -> bool:
        """Give a changed pair to contexts that are in use; returns whether it did. Half a pair is left for later."""
        now = self._stamps()
        if not now or now == self._taken:
            return False
        certificate, key = self._files
        try:
            # A pair that does not fit together would leave a context that is in use without either.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except (OSError, ValueError):  # an SSLError is an OSError
            return False
        for context in contexts:
            context.load_cert_chain(certificate, key)
        self._taken = now
        logger.info("the certificate on the disk is another now; new connections get it")
        return True

    async def keep(self, contexts: Callable[[], Iterable[ssl.SSLContext]]) -> None:
        """Look every few seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look(contexts())
