"""The storage SCP, a process of its own with bounded memory: stores what known peers send, and reads none of it."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path

from pynetdicom import AE, build_context, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
    Verification,
)

from consilium_serve.dicom_settings import Dicom
from consilium_serve.home import Home
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import put_in_place, received_halves
from consilium_shared.process import logs
from consilium_shared.transport import storage_scp

MEMORY = 2 * 2**30
ASSOCIATIONS = 8
TIMEOUT = 30.0
"""Seconds without progress after which a connection is closed."""
SUCCESS, NO_ROOM, FAILED = 0x0000, 0xA700, 0x0110
_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
IMAGES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    SecondaryCaptureImageStorage,
)

log = logging.getLogger("consilium.predict.dicom")


class Receiver:
    """A listening storage SCP that writes each image into a folder, whole or not at all."""

    def __init__(self, settings: Dicom, folder: Path, arriving: Path) -> None:
        """Listens.

        Args:
            settings: who may send, and where to listen.
            folder: takes whole images.
            arriving: takes what arrives, on the same disk; nobody else reads it, and half images go here.

        Raises:
            ConfigurationError: the address cannot be had.
        """
        self._settings, self._folder = settings, folder
        for each in (folder, arriving):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in received_halves(arriving):
            leftover.unlink()
        storage_scp.prepare(arriving)
        entity = AE(ae_title=settings.ae_title)
        entity.require_called_aet = True
        entity.maximum_associations = ASSOCIATIONS
        entity.maximum_pdu_size = storage_scp.PDU_BYTES
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = TIMEOUT
        entity.supported_contexts = [build_context(each, ALL_TRANSFER_SYNTAXES) for each in IMAGES]
        entity.add_supported_context(Verification)
        try:
            self._server = entity.make_server(
                (settings.address, settings.port),
                evt_handlers=[
                    (evt.EVT_CONN_OPEN, storage_scp.bound, [settings.image_mib * 2**20, TIMEOUT]),
                    (evt.EVT_CONN_CLOSE, storage_scp.clean),
                    (evt.EVT_CONN_CLOSE, storage_scp.let_go),
                    (evt.EVT_REQUESTED, storage_scp.admit, [settings.knows, log]),
                    (evt.EVT_C_STORE, self._keep),
                ],
                server_class=storage_scp.Server,
                known=lambda address: any(peer.sends_from(address) for peer in settings.peers),
                most=ASSOCIATIONS,
                timeout=TIMEOUT,
                tls=None,
                log=log,
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

    def _keep(self, event: evt.Event) -> int:
        """Keep an image; success is said when it is on the disk."""
        try:
            arrived = event.dataset_path
            if arrived.stat().st_size > self._settings.image_mib * 2**20:
                return NO_ROOM
            if sum(1 for _ in self._folder.glob("*.dcm")) >= self._settings.waiting:
                log.warning("%s images wait already; no more are taken", self._settings.waiting)
                return NO_ROOM
            name = str(event.request.AffectedSOPInstanceUID)
            if len(name) > 64 or not _UID.fullmatch(name):
                return FAILED
            with arrived.open("rb") as file:
                put_in_place(file, arrived, self._folder / f"{name}.dcm")
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
        receiver = Receiver(settings, home.images, home.arriving)
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
