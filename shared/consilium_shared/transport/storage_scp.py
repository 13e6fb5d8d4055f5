"""Bounds of whoever receives DICOM instances: what a peer may make the process read, hold and wait for.

pynetdicom 3.0.4 (pinned; this leans on its internals) reads as many bytes as a PDU's header announces, up to 4 GiB, and
waits for them without end; it shakes TLS hands in the loop that accepts connections, keeps an association whose
connection closed until a timeout, and logs what it receives. It writes an instance into a file while it arrives
(``STORE_RECV_CHUNKED_DATASET``); everything else that has a data set, it holds in memory.
"""

from __future__ import annotations

import logging
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pynetdicom import _config, evt
from pynetdicom.transport import ThreadedAssociationServer

from consilium_shared.errors import DataError

PDU_BYTES = 256 * 2**10
"""Longest PDU with data, as both ends agree."""
ANY_PDU_BYTES = 2**20
"""Longest PDU of any kind: a request for an association says many things."""
COMMAND_BYTES = 64 * 2**10
HELD_BYTES = 2**20
"""Longest data set of a message that is no instance: an answer to a search. It is held in memory."""
_WAITING = 4
"""Messages that may wait while one is worked on."""
_LOOK_AGAIN = 16 * 2**20
"""Bytes of one instance after which the room on the disk is looked at again."""
_REJECTED, _BY_USER, _CALLING_TITLE = 0x01, 0x01, 0x03


def prepare(arriving: Path) -> None:
    """Set pynetdicom up in this process: instances go to files in ``arriving``, and nothing of them into a log."""
    _config.STORE_RECV_CHUNKED_DATASET = True
    silence()
    tempfile.tempdir = str(arriving)


def silence() -> None:
    """Keep pynetdicom's lines, which quote data sets, out of this process's log."""
    _config.LOG_HANDLER_LEVEL = "none"
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)


class Server(ThreadedAssociationServer):  # type: ignore[misc]  # pynetdicom is not type-checked here
    """Server that turns strangers away before it reads, and does not wait for anybody's TLS handshake."""

    daemon_threads = True

    def __init__(
        self,
        *args: Any,
        known: Callable[[str], bool],
        most: int,
        timeout: float,
        tls: ssl.SSLContext | None,
        log: logging.Logger,
        **kwargs: Any,
    ) -> None:
        """Listens.

        Args:
            args: of pynetdicom's server, as ``kwargs``.
            known: whether an address may connect.
            most: connections at once, associated or not.
            timeout: seconds of a TLS handshake.
            tls: of the receiving end; None for none.
            log: gets a line of each connection that is closed.
        """
        super().__init__(*args, **kwargs)
        self._known, self._most, self._seconds, self._tls, self._log = known, most, timeout, tls, log
        self._counting, self._beginning = threading.Lock(), 0

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """True where a connection is taken, by its address and by how many there are."""
        if not self._known(client_address[0]):
            self._log.warning("a connection from %s, which is no peer's address, was closed", client_address[0])
            return False
        with self._counting:
            if self._beginning + len(self.active_associations) >= self._most:
                self._log.warning("a connection from %s was closed: there are enough", client_address[0])
                return False
            self._beginning += 1
        return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, and begin to listen to what the connection says. Runs in a thread of its own."""
        try:
            request.settimeout(self._seconds)
            if self._tls is not None:
                request = self._tls.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)
        finally:
            with self._counting:
                self._beginning -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say that a connection failed before it said anything."""
        self._log.warning("a connection from %s failed before it said anything", client_address[0])


class _BoundedReader:
    """Replaces ``AssociationSocket.recv``: reads so many bytes, within bounds of size and time, or breaks off."""

    def __init__(self, association: Any, largest: int, timeout: float, room: Callable[[int], None]) -> None:
        self._association, self._largest, self._timeout, self._room = association, largest, timeout, room
        self._message = self._looked = 0

    def __call__(self, count: int) -> bytearray:
        dimse = self._association.dimse
        message = dimse.message
        if message is None:
            self._message = self._looked = 0
        elif message.encoded_command_set.tell() > COMMAND_BYTES:
            raise OSError("a command longer than any")
        elif message._data_set_file is None and message.data_set is not None and message.data_set.tell() > HELD_BYTES:
            raise OSError("a message that is no instance, and longer than any")
        self._message += count
        if count > ANY_PDU_BYTES:
            raise OSError("a PDU longer than was agreed")
        if self._message > self._largest + ANY_PDU_BYTES:
            raise OSError("an instance larger than permitted")
        self._wait(dimse.msg_queue)
        if self._message - self._looked > _LOOK_AGAIN:
            self._looked = self._message
            try:
                self._room(self._message)
            except DataError as error:
                raise OSError(str(error)) from error
        return self._read(count)

    def _wait(self, messages: Any) -> None:
        """Wait until messages that came were worked on: whoever sends faster waits for the network."""
        deadline = time.monotonic() + self._timeout
        while messages.qsize() > _WAITING:
            if time.monotonic() > deadline:
                raise TimeoutError("messages that nobody works on")
            time.sleep(0.001)

    def _read(self, count: int) -> bytearray:
        socket, read = self._association.dul.socket.socket, bytearray(count)
        view, done, deadline = memoryview(read), 0, time.monotonic() + self._timeout
        while done < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("a PDU that takes too long")
            socket.settimeout(left)
            got = socket.recv_into(view[done:])
            if not got:
                break
            done += got
        view.release()
        del read[done:]
        return read


def bound(event: evt.Event, largest: int, timeout: float, room: Callable[[int], None] = lambda _: None) -> None:
    """Put an association's reading under bounds; the handler of ``EVT_CONN_OPEN``.

    Args:
        event: pynetdicom's.
        largest: bytes of one instance.
        timeout: seconds without progress.
        room: called now and then with the bytes of an instance that arrives; raises DataError where there is no room.
    """
    event.assoc.dul.socket.recv = _BoundedReader(event.assoc, largest, timeout, room)


def clean(event: evt.Event) -> None:
    """Delete what had arrived of an instance when its connection ended; a handler of ``EVT_CONN_CLOSE``."""
    message = event.assoc.dimse.message
    if message is not None and message._data_set_file is not None:
        message._data_set_file.close()
        Path(message._data_set_file.name).unlink(missing_ok=True)


def let_go(event: evt.Event) -> None:
    """End an association whose connection closed before it asked for anything; else it waits for the timeout."""
    if not event.assoc.is_established:
        event.assoc.dul.to_user_queue.put(None)


def admit(event: evt.Event, known: Callable[[str, str], bool], log: logging.Logger) -> None:
    """Reject an association whose title does not belong to its address; the handler of ``EVT_REQUESTED``.

    Args:
        event: pynetdicom's.
        known: whether a title may send from an address.
        log: gets a line of each that is rejected.
    """
    requestor = event.assoc.requestor
    title, address = str(requestor.primitive.calling_ae_title).strip(), str(requestor.address)
    if not known(title, address):
        log.warning("an association of %r from %s was rejected: no such peer", title, address)
        event.assoc.acse.send_reject(_REJECTED, _BY_USER, _CALLING_TITLE)
        event.assoc.is_rejected = True
        event.assoc.kill()  # comes back when the rejection is on its way
