"""The storage SCP, a process of its own with bounded memory: stores what known peers send, and reads none of it."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from pydicom.uid import UID
from pynetdicom import AE, _config, build_context, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
    Verification,
)
from pynetdicom.transport import ThreadedAssociationServer

from consilium_serve.dicom.settings import Dicom
from consilium_serve.home import Home
from consilium_shared.errors import ConfigurationError
from consilium_shared.process import logs

MEMORY = 2 * 2**30
ASSOCIATIONS = 8
SUCCESS, NO_ROOM, FAILED = 0x0000, 0xA700, 0x0110
IMAGES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)

log = logging.getLogger("consilium.predict.dicom")


class _Server(ThreadedAssociationServer):  # type: ignore[misc]  # pynetdicom is not type-checked here
    """Server that closes a stranger's connection before a byte of it is read."""

    daemon_threads = True

    def __init__(self, *args: Any, settings: Dicom, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether a connection is taken."""
        known = any(peer.sends_from(client_address[0]) for peer in self._settings.peers)
        if not known:
            log.warning("a connection from %s, which is no peer's address, was closed", client_address[0])
        return known and len(self.active_associations) < ASSOCIATIONS


class Receiver:
    """A listening storage SCP that writes each image into a folder, whole or not at all."""

    def __init__(self, settings: Dicom, folder: Path) -> None:
        """Listens; raises ConfigurationError where the address cannot be had."""
        self._settings, self._folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in folder.glob(".*"):
            leftover.unlink()
        tempfile.tempdir = str(folder)
        _config.STORE_RECV_CHUNKED_DATASET = True  # into a file there while it arrives
        _config.LOG_HANDLER_LEVEL = "none"
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)  # its lines quote data sets
        entity = AE(ae_title=settings.ae_title)
        entity.require_called_aet = True
        entity.maximum_associations = ASSOCIATIONS
        entity.maximum_pdu_size = 2**18
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
        entity.supported_contexts = [build_context(each, ALL_TRANSFER_SYNTAXES) for each in IMAGES]
        entity.add_supported_context(Verification)
        try:
            self._server = entity.make_server(
                (settings.address, settings.port),
                evt_handlers=[(evt.EVT_REQUESTED, self._admit), (evt.EVT_C_STORE, self._keep)],
                server_class=_Server,
                settings=settings,
            )
        except OSError as error:
            where = f"{settings.address}:{settings.port}"
            raise ConfigurationError(f"cannot receive images on {where}: {error.strerror}") from error
        entity._servers.append(self._server)  # as its start_server does

    def serve(self) -> None:
        """Receive until ``stop``."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()

    def _admit(self, event: evt.Event) -> None:
        requestor = event.assoc.requestor
        title, address = str(requestor.primitive.calling_ae_title).strip(), str(requestor.address)
        if not any(peer.ae_title == title and peer.sends_from(address) for peer in self._settings.peers):
            log.warning("an association of %r from %s was rejected: no such peer", title, address)
            event.assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent, by user, calling title not recognised
            event.assoc.is_rejected = True
            event.assoc.kill()

    def _keep(self, event: evt.Event) -> int:
        """Keep an image; success is said when it is on the disk."""
        try:
            arrived = event.dataset_path
            if arrived.stat().st_size > self._settings.image_mib * 2**20:
                return NO_ROOM
            if sum(1 for _ in self._folder.glob("*.dcm")) >= self._settings.waiting:
                log.warning("%s images wait already; no more are taken", self._settings.waiting)
                return NO_ROOM
            name = UID(str(event.request.AffectedSOPInstanceUID))
            if not name.is_valid:
                return FAILED
            with arrived.open("rb") as file:
                os.fsync(file.fileno())
            kept = self._folder / f".{name}.kept"
            arrived.rename(kept)  # pynetdicom deletes what it finds under its own name
            kept.rename(self._folder / f"{name}.dcm")
        except Exception as error:  # the peer must be told that it was not kept, whatever went wrong
            log.error("an image could not be kept: %s", type(error).__name__)
            return FAILED
        return SUCCESS


def main(root: str) -> None:
    """Receive for the service of a home until SIGTERM, or until its parent is gone."""
    logging.basicConfig(format=logs.FORMAT, level=logging.INFO)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.umask(0o077)
    home = Home(Path(root))
    settings = home.settings().dicom
    if settings is None:
        raise SystemExit(2)
    try:
        receiver = Receiver(settings, home.images)
    except ConfigurationError as error:
        log.error("%s", error)
        raise SystemExit(2) from None
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=receiver.serve, daemon=True).start()
    parent = os.getppid()
    while not stop.wait(1.0) and os.getppid() == parent:
        pass
    receiver.stop()


if __name__ == "__main__":
    main(sys.argv[1])
