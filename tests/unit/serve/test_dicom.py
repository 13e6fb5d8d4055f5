"""An image goes from an archive to the service, and its Structured Report comes back into the archive."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_FIND_RQ, C_STORE_RQ
from pynetdicom.dimse_primitives import C_FIND, C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.sop_class import ComprehensiveSRStorage, DigitalXRayImageStorageForPresentation, Verification
from tests.unit.serve.conftest import Bundles

from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_serve.dicom.desk import Desk
from consilium_serve.dicom.receiver import Receiver
from consilium_serve.dicom.report import structured_report
from consilium_serve.dicom_settings import Archive, Dicom, Peer
from consilium_serve.home import Home
from consilium_serve.images import case_of
from consilium_serve.record import entries
from consilium_serve.service import Service
from consilium_shared.inputs import Image
from consilium_shared.preparation.picture import read_picture
from consilium_shared.transport import storage_scp

STUDY = "a-small-cnn"
NAME = "Schmidt Anna"  # without a caret, as many are: libraries warn of it, in words that quote it
TAGS = {"PatientName": NAME, "PatientBirthDate": "19500101", "PatientSex": "F", "AccessionNumber": "A7"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_image(path: Path, seed: int = 0, **scanner: Any) -> Path:
    grey = np.random.default_rng(seed).random((40, 32))
    write_radiograph(path, grey, "P-4711", f"image-{seed}", Scanner(tags=TAGS, **scanner))
    return path


class Archive1:
    """An archive by pynetdicom, in this process: sends an image, keeps what it gets."""

    title = "PACS"

    def __init__(self) -> None:
        self.port, self.got, self.takes = free_port(), [], True  # type: ignore[var-annotated]
        entity = AE(ae_title=self.title)
        entity.add_supported_context(ComprehensiveSRStorage)
        self._server = entity.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._keep)]
        )

    def _keep(self, event: evt.Event) -> int:
        if not self.takes:
            return 0xA700
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        self.got.append(dataset)
        return 0x0000

    def send(self, path: Path, port: int) -> int:
        return send(path, port, self.title)

    def reports(self) -> list[pydicom.Dataset]:
        return list(self.got)

    def close(self) -> None:
        self._server.shutdown()


def send(path: Path, port: int, title: str, called: str = "CONSILIUM") -> int:
    """DICOM's status; -1 where no association came about."""
    entity = AE(ae_title=title)
    dataset = pydicom.dcmread(path)
    entity.add_requested_context(DigitalXRayImageStorageForPresentation, dataset.file_meta.TransferSyntaxUID)
    for _ in range(100):
        sending = entity.associate("127.0.0.1", port, ae_title=called)
        if sending.is_established or sending.is_rejected:
            break
        time.sleep(0.1)
    if not sending.is_established:
        return -1
    status = sending.send_c_store(dataset)
    sending.release()
    return int(status.Status)


class Orthanc:
    """The archive that many hospitals have, in a process of its own."""

    title = "ORTHANC"

    def __init__(self, folder: Path, service: int) -> None:
        self.port, self._web = free_port(), free_port()
        configuration = {
            "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "DicomAet": self.title, "DicomPort": self.port, "HttpPort": self._web, "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False, "DicomCheckCalledAet": True, "StableAge": 1, "Plugins": [],
            "DicomModalities": {"consilium": ["CONSILIUM", "127.0.0.1", service]},
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(configuration))
        command = [str(shutil.which("Orthanc")), str(folder / "orthanc.json")]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._web}", timeout=30)
        wait_for(self._answers)

    def _answers(self) -> bool:
        try:
            return self._client.get("/system").status_code == 200
        except httpx.TransportError:
            return False

    def send(self, path: Path, port: int) -> int:
        instance = self._client.post("/instances", content=path.read_bytes()).json()["ID"]
        for _ in range(50):
            if self._client.post("/modalities/consilium/store", content=instance).status_code == 200:
                return 0
            time.sleep(0.2)
        return -1

    def reports(self) -> list[pydicom.Dataset]:
        found: list[pydicom.Dataset] = []
        for each in self._client.get("/instances").json():
            data = self._client.get(f"/instances/{each}/file").content
            dataset = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data))
            if dataset.Modality == "SR":
                found.append(dataset)
        return found

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(30)


def wait_for(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.1)


KINDS = ["pynetdicom", *(["orthanc"] if shutil.which("Orthanc") else [])]
"""Orthanc where it is installed."""


@pytest.fixture(params=KINDS)
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, int]]:
    port = free_port()
    (tmp_path / "archive").mkdir()
    made = Archive1() if request.param == "pynetdicom" else Orthanc(tmp_path / "archive", port)
    yield made, port
    made.close()


def settings(archive: Any, port: int) -> Dicom:
    return Dicom(
        study=STUDY,
        port=port,
        peers=[Peer(ae_title=archive.title, address="127.0.0.1")],
        archive=Archive(ae_title=archive.title, address="127.0.0.1", port=archive.port),
    )


def configure(home: Home, given: Dicom) -> None:
    file = home.root / "predict.yaml"
    file.write_text(file.read_text() + f"dicom: {given.model_dump_json()}\n")


def texts(report: pydicom.Dataset) -> str:
    return "\n".join(str(each.get("TextValue", "")) for each in report.ContentSequence)


def numbers(report: pydicom.Dataset) -> dict[str, float]:
    """Name of each measurement to its value, wherever it stands."""
    found, waiting = {}, [report]
    while waiting:
        item = waiting.pop()
        waiting.extend(item.get("ContentSequence", []))
        if item.get("ValueType") == "NUM":
            name = item.ConceptNameCodeSequence[0].CodeMeaning
            found[name] = float(item.MeasuredValueSequence[0].NumericValue)
    return found


def test_an_image_of_the_archive_comes_back_as_a_report(
    archive: tuple[Any, int], home: Home, bundles: Bundles, tmp_path: Path
) -> None:
    place, port = archive
    configure(home, settings(place, port))
    home.new_token("ward")
    listen = free_port()
    file = home.root / "predict.yaml"
    file.write_text(re.sub(r"  port: 8470\n", f"  port: {listen}\n", file.read_text()))
    path = write_image(tmp_path / "image.dcm")
    log = (tmp_path / "log").open("w")
    root = str(Path(__file__).parents[3] / "serve")
    command = [sys.executable, "-m", "consilium_serve.cli", "serve", "--home", str(home.root)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"})
    try:
        assert place.send(path, port) == 0
        wait_for(place.reports)
    finally:
        process.terminate()
        process.wait(40)
        log.close()
    (report,) = place.reports()
    image = pydicom.dcmread(path)
    assert (report.PatientID, str(report.PatientName), report.StudyInstanceUID) == (
        "P-4711", NAME, image.StudyInstanceUID
    )  # fmt: skip
    assert (
        report.CurrentRequestedProcedureEvidenceSequence[0]
        .ReferencedSeriesSequence[0]
        .ReferencedSOPSequence[0]
        .ReferencedSOPInstanceUID
        == image.SOPInstanceUID
    )
    assert "no diagnosis" in texts(report) and report.VerificationFlag == "UNVERIFIED"
    service_says = numbers(report)
    assert sum(service_says.values()) == pytest.approx(1, abs=1e-5)
    words = (tmp_path / "log").read_text()
    assert "Schmidt" not in words and "4711" not in words and "Traceback" not in words
    assert image.SOPInstanceUID not in words
    assert [*home.images.iterdir()] == [] and [*home.reports.iterdir()] == []
    bodies = [e["body"] for e in entries(home.records, home.identity().public) if e["kind"] == "predictions"]
    assert len(bodies) == 1
    expected = bodies[0]["predictions"][0]["probability"]
    assert service_says["Probability of yes"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("encoding", ["plain", "rle", "jpeg2000"])
def test_an_image_is_prepared_as_at_the_studys_sites(service: Service, tmp_path: Path, encoding: str) -> None:
    path = write_image(tmp_path / "image.dcm", bits=12, inverted=True, encoding=encoding)
    case, _ = case_of(service.model(STUDY).study, path)
    np.testing.assert_array_equal(case.prepared.inputs["image"][0], read_picture(path, Image(size=16))[0])
    assert case.patient == "P-4711" and case.prepared.abstain == ()


def test_an_image_that_the_study_does_not_take_gets_a_report_without_a_prediction(
    service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "image.dcm"
    write_radiograph(path, np.random.default_rng(0).random((9, 9)), "P", "u", Scanner(tags={"Modality": "MG"}))
    model = service.model(STUDY)
    case, image = case_of(model.study, path)
    told = service.predict(model, [case], "test")[0]
    assert told["prediction"] is None and told["abstained"] == ["modality MG"]
    report = structured_report(image, told, model, "0")
    assert "No prediction: modality MG" in texts(report) and numbers(report) == {}


@pytest.mark.parametrize("abstains", [False, True])
def test_a_report_is_valid_dicom(service: Service, tmp_path: Path, abstains: bool) -> None:
    path = write_image(tmp_path / "image.dcm")
    model = service.model(STUDY)
    case, image = case_of(model.study, path)
    told = service.predict(model, [case], "test")[0]
    if abstains:
        told = {**told, "prediction": None, "abstained": ["the image has one brightness everywhere"]}
    report = structured_report(image, told, model, "0.1.0")
    again = structured_report(image, told, model, "0.1.0")
    assert report.SOPInstanceUID == again.SOPInstanceUID
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    read = pydicom.dcmread(tmp_path / "report.dcm")
    assert read.SOPClassUID == ComprehensiveSRStorage
    assert read.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    pydicom.config.settings.reading_validation_mode = pydicom.config.RAISE
    try:
        pydicom.dcmread(tmp_path / "report.dcm").walk(lambda _, element: element.value)
    finally:
        pydicom.config.settings.reading_validation_mode = pydicom.config.WARN
    if shutil.which("dciodvfy"):
        done = subprocess.run(["dciodvfy", tmp_path / "report.dcm"], capture_output=True, text=True, check=False)
        assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []


def test_only_known_peers_are_heard(home: Home, service: Service, tmp_path: Path) -> None:
    place, port = Archive1(), free_port()
    given = settings(place, port)
    configure(home, given)
    desk = Desk(home, service, given)
    desk.start()
    try:
        path = write_image(tmp_path / "image.dcm")
        assert send(path, port, "PACS") == 0
        assert send(path, port, "STRANGER") == -1
        assert send(path, port, "PACS", called="OTHER") == -1
        wait_for(place.reports)
        time.sleep(1)
        assert len(place.reports()) == 1
    finally:
        desk.stop()
        place.close()


def test_reports_wait_for_an_archive_that_is_away_and_images_are_not_lost(
    home: Home, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, port = Archive1(), free_port()
    place.takes = False
    desk = Desk(home, service, settings(place, port))
    home.images.mkdir(parents=True)
    home.reports.mkdir(parents=True)
    for seed in range(3):
        write_image(home.images / f"1.2.{seed}.dcm", seed)
    (home.images / "1.2.9.dcm").write_bytes(b"no image at all")
    assert desk.report_images() == 3
    assert [*home.images.iterdir()] == [] and len([*home.reports.iterdir()]) == 3
    assert desk.send_reports() == 0 and desk.send_reports() == 0
    place.takes = True
    monkeypatch.setattr(desk, "_later", 0.0)
    assert desk.send_reports() == 3 and [*home.reports.iterdir()] == []
    assert len({each.SOPInstanceUID for each in place.reports()}) == 3
    place.close()


@pytest.fixture
def receiving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Dicom, Path, Path]]:
    """A receiver in this process: its settings, the folder of whole images, and that of those that arrive."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(_config, "STORE_RECV_CHUNKED_DATASET", False)
    given = Dicom(
        study=STUDY,
        port=free_port(),
        peers=[Peer(ae_title="PACS", address="127.0.0.1")],
        archive=Archive(ae_title="PACS", address="127.0.0.1", port=1),
        image_mib=1,
    )
    folders = tmp_path / "images", tmp_path / "arriving"
    made = Receiver(given, *folders)
    threading.Thread(target=made.serve, daemon=True).start()
    yield (given, *folders)
    made.stop()


def begin_to_send(path: Path, port: int) -> tuple[Association, list[P_DATA]]:
    """An association over which all of an image was sent but its end, and that end."""
    dataset, entity = pydicom.dcmread(path), AE(ae_title="PACS")
    entity.add_requested_context(DigitalXRayImageStorageForPresentation, dataset.file_meta.TransferSyntaxUID)
    sending = entity.associate("127.0.0.1", port, ae_title="CONSILIUM")
    store = C_STORE()
    store.MessageID, store.Priority = 1, 2
    store.AffectedSOPClassUID, store.AffectedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    store.DataSet = BytesIO(encode(dataset, False, True))
    message = C_STORE_RQ()
    message.primitive_to_message(store)
    *begun, end = message.encode_msg(sending.accepted_contexts[0].context_id, 1024)
    for each in begun:
        sending.dul.send_pdu(each)
    return sending, [end]


def test_an_image_is_among_the_images_when_it_is_whole(receiving: tuple[Dicom, Path, Path], tmp_path: Path) -> None:
    given, images, arriving = receiving
    sending, end = begin_to_send(write_image(tmp_path / "image.dcm"), given.port)
    wait_for(lambda: list(arriving.iterdir()))
    assert list(images.iterdir()) == []
    for each in end:
        sending.dul.send_pdu(each)
    wait_for(lambda: list(images.glob("*.dcm")))
    sending.release()
    assert list(arriving.iterdir()) == []


def test_what_breaks_off_or_is_too_large_leaves_nothing(receiving: tuple[Dicom, Path, Path], tmp_path: Path) -> None:
    given, images, arriving = receiving
    sending, _ = begin_to_send(write_image(tmp_path / "image.dcm"), given.port)
    wait_for(lambda: list(arriving.iterdir()))
    sending.abort()
    wait_for(lambda: not list(arriving.iterdir()))
    large = tmp_path / "large.dcm"
    write_radiograph(large, np.random.default_rng(0).random((1500, 1500)), "P", "large", Scanner())
    entity, dataset = AE(ae_title="PACS"), pydicom.dcmread(large)
    entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    client = entity.associate("127.0.0.1", given.port, ae_title="CONSILIUM")
    assert "Status" not in client.send_c_store(dataset)
    wait_for(lambda: not list(arriving.iterdir()))
    assert list(images.iterdir()) == []


def test_the_receiver_closes_a_connection_whose_pdu_announces_gigabytes(receiving: tuple[Dicom, Path, Path]) -> None:
    with socket.create_connection(("127.0.0.1", receiving[0].port), timeout=10) as attacker:
        attacker.sendall(struct.pack(">BBL", 1, 0, 2**32 - 1) + bytes(1000))
        assert ended(attacker)


def test_the_receiver_holds_no_large_message_that_is_no_image(receiving: tuple[Dicom, Path, Path]) -> None:
    entity = AE(ae_title="PACS")
    entity.add_requested_context(Verification)
    sending = entity.associate("127.0.0.1", receiving[0].port, ae_title="CONSILIUM")
    asked = C_FIND()
    asked.MessageID, asked.Priority, asked.AffectedSOPClassUID = 1, 2, Verification
    asked.Identifier = BytesIO(bytes(storage_scp.HELD_BYTES * 7 // 4))
    message = C_FIND_RQ()
    message.primitive_to_message(asked)
    *begun, _ = message.encode_msg(sending.accepted_contexts[0].context_id, storage_scp.PDU_BYTES)
    for each in begun:
        sending.dul.send_pdu(each)
    wait_for(lambda: not sending.is_established, 10)


def ended(connection: socket.socket) -> bool:
    """Whether the other end closes a connection."""
    try:
        while connection.recv(1024):
            pass
    except ConnectionError:
        pass
    return True
