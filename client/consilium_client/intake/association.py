"""A DICOM association that may bring instances, whichever side asked for it: into the inbox, within the site's bounds.

What a peer may make the process read, hold and wait for is bounded in ``consilium_shared/transport/storage_scp.py``.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from pynetdicom import AllStoragePresentationContexts, build_context, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.presentation import PresentationContext

from consilium_client.intake.certificates import Certificates
from consilium_client.intake.inbox import Inbox, NoRoom
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.transport import storage_scp

SUCCESS, NO_ROOM, FAILED, NOT_ASKED_FOR, NOT_UNDERSTOOD = 0x0000, 0xA700, 0x0110, 0x0124, 0xC000

log = logging.getLogger("consilium_client.intake")


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


def keep(event: evt.Event, inbox: Inbox, how: str, wanted: Container[str] | None = None) -> int:
    """Take an instance that arrived whole into the inbox; the handler of ``EVT_C_STORE``.

    Args:
        event: pynetdicom's.
        inbox: takes it.
        how: it came, for the journal.
        wanted: UIDs of the instances that were asked for; None takes any.

    Returns:
        DICOM's status. Success is said when the instance is on the disk, never before.
    """
    peer = event.assoc.requestor if event.assoc.is_acceptor else event.assoc.acceptor
    source = f"{how} {str(peer.ae_title).strip()} ({peer.address})"
    uid = str(event.request.AffectedSOPInstanceUID or "")
    if wanted is not None and uid not in wanted:
        log.warning("%s sent an instance that was not asked for", source)
        return NOT_ASKED_FOR
    try:
        inbox.keep(uid, event.dataset_path, source)
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


def _room(inbox: Inbox) -> Callable[[int], None]:
    def look(coming: int) -> None:
        try:
            inbox.require_room(coming)
        except NoRoom as error:
            log.error("%s", error)
            raise

    return look


def handlers(inbox: Inbox, timeout: float, how: str, wanted: Container[str] | None = None) -> list[tuple[Any, ...]]:
    """Event handlers of an association that may bring instances; arguments as ``keep`` has them."""
    return [
        (evt.EVT_CONN_OPEN, storage_scp.bound, [inbox.limits.object_mib * 2**20, timeout, _room(inbox)]),
        (evt.EVT_CONN_CLOSE, storage_scp.clean),
        (evt.EVT_C_STORE, keep, [inbox, how, wanted]),
    ]
