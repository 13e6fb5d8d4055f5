"""Objects in transit at the SuperLink: small ones in memory, large ones in nameless files that only this process reads.

Flower's store in memory would hold every model and every update there at once; its database costs three times the
SuperLink's whole time (``docs/decisions/0030-superlink-in-memory.md``). Here what is large lies on the disk, encrypted
under a key that never leaves this process, in a file without a name. So nothing is left behind, however the process
ends: the system gives a file's room back with its last descriptor, and what was in it cannot be read without the key.

Leans on these internals of flwr 1.41 (pinned): ``InMemoryObjectStore`` keeps what was put in ``ObjectEntry.content``,
hands out that in ``get``, and drops the entry when it is deleted; ``ObjectStoreFactory.store_instance``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import weakref
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

logger = logging.getLogger(__name__)

LARGE_BYTES = 64 * 1024
"""Least length of an object that goes to the disk. A round's small messages are far below, pieces of arrays above."""
_NONCE_BYTES, _TAG_BYTES = 12, 16


class Place:
    """Place of an object on the disk: an open file without a name, which ends with this."""

    def __init__(self, descriptor: int, nonce: bytes, length: int) -> None:
        """``length``: of the object, in bytes; its authentication tag follows it in the file."""
        self.descriptor, self.nonce, self.length = descriptor, nonce, length
        weakref.finalize(self, os.close, descriptor)


class Shelf:
    """Encrypted bytes in nameless files of one folder, each for as long as its place is held."""

    def __init__(self, folder: Path) -> None:
        """``folder``: on the disk that is to hold them; nothing appears in it."""
        self._folder = folder
        self._cipher = AESGCM(AESGCM.generate_key(256))

    def lay(self, content: bytes) -> Place:
        """Store ``content``; its place. Raises OSError where the disk takes no more."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            sealed = memoryview(self._cipher.encrypt(nonce, content, None))
            while sealed:
                sealed = sealed[file.write(sealed) :]
            return Place(os.dup(file.fileno()), nonce, len(content))

    def read(self, place: Place) -> bytes:
        """Read what was laid there. Raises OSError or cryptography's InvalidTag where the disk is damaged."""
        sealed = os.pread(place.descriptor, place.length + _TAG_BYTES, 0)
        return self._cipher.decrypt(place.nonce, sealed, None)


class ObjectsInTransit(InMemoryObjectStore):
    """Flower's object store in memory, whose large objects lie on the disk."""

    def __init__(self, folder: Path) -> None:
        """``folder``: on the disk that is to hold large objects."""
        super().__init__()
        self._shelf = Shelf(folder)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store a registered object. Raises ValueError for other bytes than ``object_id`` names, as Flower's own."""
        super().put(object_id, object_content)
        if len(object_content) < LARGE_BYTES:
            return
        # A full disk costs memory, not the message.
        with contextlib.suppress(OSError):
            place = self._shelf.lay(object_content)
            with self.lock_store:
                entry: Any = self.store.get(object_id)  # Flower says that its content is bytes
                if entry is not None and isinstance(entry.content, bytes):
                    entry.content = place

    def get(self, object_id: str) -> bytes | None:
        """Look up an object's bytes; ``b""`` while they are on their way, None where it is not registered."""
        found: Any = super().get(object_id)
        return self._shelf.read(found) if isinstance(found, Place) else found
