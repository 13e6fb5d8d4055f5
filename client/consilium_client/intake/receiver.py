"""The storage SCP: archives and modalities send instances here, and they go into the inbox.

A connection is taken from the addresses of the allow-list alone, before a byte of it is read; an association from a
title and an address that belong together. Data sets are never parsed here: they are stored as they come, and read by a
program that has no network.
"""

from __future__ import annotations

import errno
import resource
import signal
import ssl
import threading
from collections.abc import Callable
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer

from consilium_client.intake import association
from consilium_client.intake.association import log
from consilium_client.intake.inbox import Inbox
from consilium_client.intake.settings import Receive
from consilium_shared.errors import ConfigurationError

_MEMORY = 4 * 2**30
"""Address space of the process. It holds PDUs, never whole instances; whoever finds a way to fill it ends it alone."""
_REJECTED, _BY_USER, _CALLING_TITLE = 0x01, 0x01, 0x03


class PortTaken(ConfigurationError):
    """Another program listens on the receiver's port."""


class _Server(ThreadedAssociationServer):  # type: ignore[misc]  # pynetdicom is not type-checked here
    """Server that turns strangers away before it reads, and does not wait for anybody's TLS handshake."""

    daemon_threads = True

    def __init__(self, *args: Any, settings: Receive, tls: ssl.SSLContext | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings, self._tls = settings, tls
        self._counting, self._beginning = threading.Lock(), 0

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection is taken, by its address and by how many there are."""
        if not any(peer.sends_from(client_address[0]) for peer in self._settings.peers):
            log.warning("a connection from %s, which is no peer's address, was closed", client_address[0])
            return False
        with self._counting:
            if self._beginning + len(self.active_associations) >= self._settings.associations:
                log.warning("a connection from %s was closed: there are enough", client_address[0])
                return False
            self._beginning += 1
        return True

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, and begin to listen to what the connection says. Runs in a thread of its own."""
        try:
            request.settimeout(self._settings.timeout)
            if self._tls is not None:
                request = self._tls.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)
        finally:
            with self._counting:
                self._beginning -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say that a connection failed before it said anything."""
        log.warning("a connection from %s failed before it said anything", client_address[0])


def _admit(event: evt.Event, settings: Receive) -> None:
    """Reject an association whose title does not belong to the address that it comes from."""
    requestor = event.assoc.requestor
    title, address = str(requestor.primitive.calling_ae_title).strip(), str(requestor.address)
    if not any(peer.ae_title == title and peer.sends_from(address) for peer in settings.peers):
        log.warning("an association of %r from %s was rejected: no such peer", title, address)
        event.assoc.acse.send_reject(_REJECTED, _BY_USER, _CALLING_TITLE)
        event.assoc.is_rejected = True
        event.assoc.kill()  # comes back when the rejection is on its way


def _let_go(event: evt.Event) -> None:
    """End an association whose connection closed before it asked for anything; else it waits for the timeout."""
    if not event.assoc.is_established:
        event.assoc.dul.to_user_queue.put(None)


def _report(event: evt.Event) -> None:
    log.info("association with %s from %s", str(event.assoc.requestor.ae_title).strip(), event.assoc.requestor.address)


class Receiver:
    """A listening storage SCP."""

    def __init__(self, settings: Receive, inbox: Inbox) -> None:
        """Listens.

        Args:
            settings: who may send, and where to listen.
            inbox: takes what arrives.

        Raises:
            PortTaken: another program has the port.
            ConfigurationError: the address or the port cannot be had, or the TLS files cannot be used.
        """
        association.prepare(inbox)
        entity = AE(ae_title=settings.ae_title)
        entity.require_called_aet = True
        entity.maximum_pdu_size = association.PDU_BYTES
        entity.maximum_associations = settings.associations
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = settings.timeout
        entity.supported_contexts = association.storage_contexts()
        entity.add_supported_context(Verification)
        try:
            self._server = entity.make_server(
                (settings.host, settings.port),
                evt_handlers=[
                    *association.handlers(inbox, settings.timeout, "C-STORE from"),
                    (evt.EVT_REQUESTED, _admit, [settings]),
                    (evt.EVT_CONN_CLOSE, _let_go),
                    (evt.EVT_ACCEPTED, _report),
                ],
                server_class=_Server,
                settings=settings,
                tls=None if settings.tls is None else association.server_context(settings.tls),
            )
        except OSError as error:
            kind = PortTaken if error.errno == errno.EADDRINUSE else ConfigurationError
            raise kind(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
        entity._servers.append(self._server)  # as its start_server does

    def serve(self) -> None:
        """Receive until ``stop``."""
        self._server.serve_forever(poll_interval=0.2)

    def start(self) -> None:
        """Receive in a thread of its own."""
        threading.Thread(target=self.serve, daemon=True).start()

    def stop(self) -> None:
        """Listen no more, and end the associations. What they had not brought whole comes again."""
        self._server.shutdown()
        for each in self._server.active_associations:
            each.abort()


def receive_forever(settings: Receive, inbox: Inbox, say: Callable[[str], None]) -> None:
    """Receive until SIGINT or SIGTERM, in bounded memory."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with inbox.writing():
        receiver = Receiver(settings, inbox)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=receiver.stop, daemon=True).start())
        tls = "with TLS" if settings.tls is not None else "without TLS"
        say(f"{settings.ae_title} receives on {settings.host}:{settings.port}, {tls}, into {inbox.folder}")
        receiver.serve()
