"""Bounds of a DICOM association, for both sides: what a peer may make this process read, hold and wait for.

pynetdicom 3.0.4 reads as many bytes as a PDU's header announces, up to 4 GiB, and waits for them without end; it logs
what it receives. It writes an instance into a file while it arrives (``STORE_RECV_CHUNKED_DATASET``); what is set here
has these files in the inbox, and takes away those of a connection that broke off.
"""

from __future__ import annotations

import logging
import ssl
import tempfile
import time
from pathlib import Path
from typing import Any

from pynetdicom import AllStoragePresentationContexts, _config, build_context, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.presentation import PresentationContext

from consilium_client.intake.inbox import Inbox, NoRoom
from consilium_client.intake.settings import Certificates
from consilium_shared.errors import ConfigurationError, DataError

PDU_BYTES = 256 * 2**10
"""Longest PDU with data, as both ends agree."""
_ANY_PDU_BYTES = 2**20
"""Longest PDU of any kind: a request for an association says many things."""
_COMMAND_BYTES = 64 * 2**10
_WAITING = 4
"""Messages that may wait while one is worked on."""
_LOOK_AGAIN = 16 * 2**20
"""Bytes of one instance after which the room on the disk is looked at again."""

SUCCESS, NO_ROOM, FAILED, NOT_UNDERSTOOD = 0x0000, 0xA700, 0x0110, 0xC000

log = logging.getLogger("consilium_client.intake")


def prepare(inbox: Inbox) -> None:
    """Set pynetdicom up in this process: instances go to files in the inbox, and nothing of them into a log."""
    _config.STORE_RECV_CHUNKED_DATASET = True
    _config.LOG_HANDLER_LEVEL = "none"
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    tempfile.tempdir = str(inbox.arriving)


def storage_contexts() -> list[PresentationContext]:
    """Every storage SOP class in every transfer syntax: instances are kept as they come, and nothing is decoded."""
    return [build_context(str(each.abstract_syntax), ALL_TRANSFER_SYNTAXES) for each in AllStoragePresentationContexts]


def server_context(files: Certificates) -> ssl.SSLContext:
    """TLS of the receiving end: who does not show a certificate of the CA is not spoken to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, files)


def client_context(files: Certificates) -> ssl.SSLContext:
    """TLS of the asking end: the other's certificate must be of the CA and for the host's name."""
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files)


def _loaded(context: ssl.SSLContext, files: Certificates) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    reading: Path = files.ca
    try:
        context.load_verify_locations(files.ca)
        if files.certificate is not None and files.key is not None:
            reading = files.certificate
            context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"cannot use {reading} for TLS: {error.strerror or error}") from error
    return context


class _BoundedReader:
    """Replaces ``AssociationSocket.recv``: reads so many bytes, within bounds of size and time, or breaks off."""

    def __init__(self, association: Any, inbox: Inbox, timeout: float) -> None:
        self._association, self._inbox, self._timeout = association, inbox, timeout
        self._message = self._looked = 0

    def __call__(self, count: int) -> bytearray:
        dimse = self._association.dimse
        if dimse.message is None:
            self._message = self._looked = 0
        elif dimse.message.encoded_command_set.tell() > _COMMAND_BYTES:
            raise OSError("a command longer than any")
        self._message += count
        if count > _ANY_PDU_BYTES:
            raise OSError("a PDU longer than was agreed")
        if self._message > self._inbox.limits.object_mib * 2**20 + _ANY_PDU_BYTES:
            raise OSError(f"an instance larger than {self._inbox.limits.object_mib} MiB")
        self._wait(dimse.msg_queue)
        if self._message - self._looked > _LOOK_AGAIN:
            self._looked = self._message
            try:
                self._inbox.require_room(self._message)
            except NoRoom as error:
                log.error("%s", error)
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


def bound(event: evt.Event, inbox: Inbox, timeout: float) -> None:
    """Put an association's reading under bounds; the handler of ``EVT_CONN_OPEN``."""
    event.assoc.dul.socket.recv = _BoundedReader(event.assoc, inbox, timeout)


def clean(event: evt.Event) -> None:
    """Delete what had arrived of an instance when its connection ended; the handler of ``EVT_CONN_CLOSE``."""
    message = event.assoc.dimse.message
    if message is not None and message._data_set_file is not None:
        message._data_set_file.close()
        Path(message._data_set_file.name).unlink(missing_ok=True)


def keep(event: evt.Event, inbox: Inbox, how: str) -> int:
    """Take an instance that arrived whole into the inbox; the handler of ``EVT_C_STORE``.

    Returns:
        DICOM's status. Success is said when the instance is on the disk, never before.
    """
    peer = event.assoc.requestor if event.assoc.is_acceptor else event.assoc.acceptor
    source = f"{how} {str(peer.ae_title).strip()} ({peer.address})"
    try:
        inbox.keep(str(event.request.AffectedSOPInstanceUID or ""), event.dataset_path, source)
    except NoRoom as error:
        log.error("%s", error)
        return NO_ROOM
    except DataError as error:
        log.warning("%s sent %s", source, error)
        return NOT_UNDERSTOOD
    except Exception as error:  # the peer must be told that it was not kept, whatever went wrong
        log.error("an instance of %s could not be kept: %s", source, type(error).__name__)
        return FAILED
    return SUCCESS


def handlers(inbox: Inbox, timeout: float, how: str) -> list[tuple[Any, ...]]:
    """Event handlers of an association that may bring instances."""
    return [
        (evt.EVT_CONN_OPEN, bound, [inbox, timeout]),
        (evt.EVT_CONN_CLOSE, clean),
        (evt.EVT_C_STORE, keep, [inbox, how]),
    ]
