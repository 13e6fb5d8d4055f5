"""The storage SCP: archives and modalities send instances here, and they go into the inbox.

A connection is taken from the addresses of the allow-list alone, before a byte of it is read; an association from a
title and an address that belong together. Data sets are never parsed here: they are stored as they come, and read by a
program that has no network.
"""

from __future__ import annotations

import errno
import resource
import signal
import threading
from collections.abc import Callable

from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification

from consilium_client.intake import association
from consilium_client.intake.association import log
from consilium_client.intake.inbox import Inbox
from consilium_client.intake.settings import Receive
from consilium_shared.errors import ConfigurationError
from consilium_shared.transport import storage_scp

_MEMORY = 4 * 2**30
"""Address space of the process. It holds PDUs, never whole instances; whoever finds a way to fill it ends it alone."""


class PortTaken(ConfigurationError):
    """Another program listens on the receiver's port."""


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
        storage_scp.prepare(inbox.arriving)
        entity = AE(ae_title=settings.ae_title)
        entity.require_called_aet = True
        entity.maximum_pdu_size = storage_scp.PDU_BYTES
        entity.maximum_associations = settings.associations
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = settings.timeout
        entity.supported_contexts = association.storage_contexts()
        entity.add_supported_context(Verification)
        try:
            self._server = entity.make_server(
                (settings.host, settings.port),
                evt_handlers=[
                    *association.handlers(inbox, settings.timeout, "C-STORE from"),
                    (evt.EVT_REQUESTED, storage_scp.admit, [settings.knows, log]),
                    (evt.EVT_CONN_CLOSE, storage_scp.let_go),
                    (evt.EVT_ACCEPTED, _report),
                ],
                server_class=storage_scp.Server,
                known=lambda address: any(peer.sends_from(address) for peer in settings.peers),
                most=settings.associations,
                timeout=settings.timeout,
                log=log,
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
