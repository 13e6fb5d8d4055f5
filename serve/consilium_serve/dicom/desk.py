"""Reports on received images: predict, write the report, send it to the archive, delete the image.

An image is deleted once its report is on the disk, a report once the archive has it; what a crash interrupts is done
again, and gives the report with the same UID.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pydicom
from pynetdicom import AE, evt
from pynetdicom.sop_class import ComprehensiveSRStorage

from consilium_serve.dicom.report import structured_report
from consilium_serve.dicom_settings import Dicom
from consilium_serve.home import Home
from consilium_serve.images import case_of
from consilium_serve.service import Service
from consilium_shared.errors import ConsiliumError, DataError
from consilium_shared.files import write_atomically
from consilium_shared.protocol.version import about
from consilium_shared.transport import storage_scp

log = logging.getLogger("consilium.predict.dicom")

PAUSE, RETRY = 0.3, 10.0


class Desk:
    """The receiver's process and the thread that works on what it received."""

    def __init__(self, home: Home, service: Service, settings: Dicom) -> None:
        self._home, self._service, self._settings = home, service, settings
        self._stop, self._later = threading.Event(), 0.0
        self._receiver: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="dicom", daemon=True)

    def start(self) -> None:
        """Begin to receive and to report."""
        storage_scp.silence()
        for folder in (self._home.images, self._home.reports):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._thread.start()

    def stop(self) -> None:
        """Stop both; what waits is done after the next start."""
        self._stop.set()
        self._thread.join(30)
        if self._receiver is not None:
            self._receiver.terminate()
            self._receiver.wait(30)

    def _work(self) -> None:
        while not self._stop.wait(PAUSE):
            try:
                self._watch_receiver()
                self.report_images()
                self.send_reports()
            except Exception as error:  # whatever a foreign image brings about, the next one is still worked on
                log.error("the work on images broke off: %s", type(error).__name__)
                self._stop.wait(RETRY)

    def _watch_receiver(self) -> None:
        if self._receiver is None or self._receiver.poll() is not None:
            if self._receiver is not None:
                log.error("the receiver of images ended with status %s; it is started again", self._receiver.returncode)
                self._stop.wait(RETRY / 5)
            command = [sys.executable, "-m", "consilium_serve.dicom.receiver", str(self._home.root)]
            self._receiver = subprocess.Popen(command)

    def report_images(self) -> int:
        """Make the reports of all images that wait; their number."""
        done = 0
        for path in sorted(self._home.images.glob("*.dcm")):
            if sum(1 for _ in self._home.reports.glob("*.dcm")) >= self._settings.waiting:
                break  # the archive is away; the images wait too
            try:
                self._report(path)
                done += 1
            except DataError as error:  # its text names no file and no value
                log.error("an image that cannot be reported on is deleted: %s", error)
                path.unlink()
            except ConsiliumError as error:
                log.error("no report: %s", error)
                break  # the record or the model cannot be used: later, by somebody's hand
            except Exception as error:
                # No image may stop those behind it; its name is a UID, which is an identifier.
                log.error("an image that cannot be reported on is deleted: %s", type(error).__name__)
                path.unlink()
        return done

    def _report(self, path: Path) -> None:
        model = self._service.model(self._settings.study)
        case, image = case_of(model.study, path)
        told = self._service.predict(model, [case], f"DICOM {self._settings.ae_title}")[0]
        report = structured_report(image, told, model, about()["consilium"])
        kept = self._home.reports / f".{report.SOPInstanceUID}"
        report.save_as(kept, enforce_file_format=True)
        write_atomically(self._home.reports / f"{report.SOPInstanceUID}.dcm", kept.read_bytes())
        kept.unlink()
        path.unlink()

    def send_reports(self) -> int:
        """Send the reports that wait to the archive; how many it took. After a failure there is a pause."""
        waiting = sorted(self._home.reports.glob("*.dcm"))
        if not waiting or time.monotonic() < self._later:
            return 0
        archive = self._settings.archive
        entity = AE(ae_title=self._settings.ae_title)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 30
        entity.add_requested_context(ComprehensiveSRStorage)
        bounds = (evt.EVT_CONN_OPEN, storage_scp.bound, [storage_scp.HELD_BYTES, entity.network_timeout])
        sending = entity.associate(archive.address, archive.port, ae_title=archive.ae_title, evt_handlers=[bounds])
        sent = 0
        try:
            if sending.is_established:
                for path in waiting:
                    status = sending.send_c_store(pydicom.dcmread(path))
                    if "Status" not in status or status.Status not in (0x0000, 0xB000, 0xB006, 0xB007):
                        break
                    path.unlink()
                    sent += 1
        finally:
            sending.release() if sending.is_established else sending.abort()
        if sent < len(waiting):
            self._later = time.monotonic() + RETRY
            log.warning("%s reports wait: %s did not take them", len(waiting) - sent, archive.ae_title)
        return sent
