"""Studies of a list come from an archive whole, once, by every way that archives know; a killed pull goes on."""

from __future__ import annotations

import hashlib
import signal
import ssl
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydicom import dcmread
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom._globals import ALL_TRANSFER_SYNTAXES
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet, Verification
from tests.intake import studies
from tests.intake.archives import Archive, free_port, trusted
from tests.intake.tls import certificates

from consilium_client.intake.dicomweb import WebSource
from consilium_client.intake.dimse import DimseSource
from consilium_client.intake.inbox import Inbox
from consilium_client.intake.multipart import boundary_of, parts
from consilium_client.intake.pull import Found
from consilium_client.intake.settings import DimseArchive, Limits, WebArchive
from consilium_client.intake.worklist import Wanted, read
from consilium_shared.errors import ConfigurationError, DataError, TransportError

WAYS = ("get", "move", "dicomweb")


def archive_settings(archive: Archive, way: str) -> dict[str, Any]:
    if way == "dicomweb":
        return {"kind": "dicomweb", "url": archive.dicomweb}
    return {"kind": "dimse", "ae_title": archive.title, "host": "127.0.0.1", "port": archive.port, "retrieve": way}


def worklist(folder: Path, *lines: str) -> str:
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def kept(site) -> dict[str, Path]:
    return {file.stem: file for file in (site.root / "intake" / "inbox").glob("??/*.dcm")}


def digests(files: list[Path]) -> set[str]:
    return {hashlib.sha256(dcmread(file).SOPInstanceUID.encode()).hexdigest() for file in files}


@pytest.mark.parametrize("way", WAYS)
def test_a_list_is_pulled_and_a_killed_pull_goes_on(archive: Archive, site, tmp_path: Path, way: str) -> None:
    files = studies.write(tmp_path / "held", studies=4, images=5)
    archive.hold(files)
    site.settings["archives"] = {"main": archive_settings(archive, way)}
    wanted = worklist(tmp_path, "accession,why", "A00000,a", "A00001,b", "A00003,c", "A00001,again")
    running = site.start("pull", wanted)
    until = time.monotonic() + 60
    while len(kept(site)) < 4 and running.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    acknowledged = {each.digest for each in site.inbox().instances()}
    assert acknowledged <= set(kept(site))
    done = site.run("pull", wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = digests([file for file in files if not file.name.startswith("2-")])
    assert set(kept(site)) == expected == {each.digest for each in site.inbox().instances()}
    for file in files[:5]:
        sent = dcmread(file)
        got = dcmread(kept(site)[hashlib.sha256(sent.SOPInstanceUID.encode()).hexdigest()])
        assert (got.pixel_array == sent.pixel_array).all()
    repeats = site.inbox().counts()["repeats"]
    assert site.run("pull", wanted).returncode == 0
    assert site.inbox().counts()["repeats"] == repeats, "what is here was fetched again"


def test_what_an_archive_does_not_have_is_said_and_the_rest_comes(archive: Archive, site, tmp_path: Path) -> None:
    archive.hold(studies.write(tmp_path / "held", studies=2, images=1))
    site.settings["archives"] = {"main": archive_settings(archive, "get")}
    done = site.run("pull", worklist(tmp_path, "study", "1.2.3.4", "1.2.826.0.1.3680043.10.1.1"))
    assert done.returncode == 4
    assert "1.2.3.4: not found" in done.stdout
    assert "1.2.826.0.1.3680043.10.1.1: complete, 1 of 1" in done.stdout


def test_a_receiver_that_runs_takes_what_a_pull_has_moved(archive: Archive, site, tmp_path: Path) -> None:
    archive.hold(studies.write(tmp_path / "held", studies=1, images=2))
    site.settings["archives"] = {"main": archive_settings(archive, "move")}
    site.receive()
    done = site.run("pull", worklist(tmp_path, "accession", "A00000"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sends to the receiver that runs there" in done.stdout
    assert len(kept(site)) == 2


@pytest.mark.parametrize("way", ["get", "dicomweb"])
def test_an_archive_that_is_not_there_is_said_at_once(site, archive_of, tmp_path: Path, way: str) -> None:
    archive = archive_of("stand-in")
    archive.stop()
    site.settings["archives"] = {"main": archive_settings(archive, way)}
    done = site.run("pull", worklist(tmp_path, "accession", *(f"A{number}" for number in range(50))))
    assert done.returncode == 4
    assert "does not answer" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("failed") == 3


def test_a_list_is_read_as_a_person_writes_it(tmp_path: Path) -> None:
    wanted = worklist(tmp_path, "\ufeffAccessionNumber,StudyInstanceUID", "A1,", " A2 ,", "", "A1,", "A3,1.2.3")
    assert read(Path(wanted)) == [Wanted(accession="A1"), Wanted(accession="A2"), Wanted(study="1.2.3")]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["mrn", "1"], ":1: the header"),
        (["accession", "A*"], ":2: no accession number"),
        (["accession", "A1", "A?2"], ":3: no accession number"),
        (["accession", "A\\B"], ":2: no accession number"),
        (["study", "1.2.x"], ":2: the study is no UID"),
        (["study", "../1"], ":2: the study is no UID"),
        (["study,why", ",x"], ":2: neither"),
        (["study"], "names no study"),
    ],
)
def test_a_list_that_would_ask_for_something_else_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read(Path(worklist(tmp_path, *lines)))


@pytest.mark.parametrize("piece", [1, 3, 7, 5000])
def test_parts_are_read_the_same_however_the_answer_is_cut(piece: int) -> None:
    contents = [b"DICM" * 2000, b"", b"\r\n--fronti", b"x\r\n--frontie\r\n--" * 300]
    body = b"preamble\r\n" + b"".join(
        b"--frontier\r\nContent-Type: application/dicom\r\n\r\n" + each + b"\r\n" for each in contents
    )
    body += b"--frontier--\r\n"

    def cut(text: bytes):
        return (text[start : start + piece] for start in range(0, len(text), piece))

    assert [b"".join(each) for each in parts(cut(body), b"--frontier")] == contents
    for short in (body[:30], body[:-20], body[: len(body) // 2]):
        with pytest.raises(TransportError):
            [b"".join(each) for each in parts(cut(short), b"--frontier")]


def test_of_an_instance_that_nobody_asked_for_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(_config, "STORE_RECV_CHUNKED_DATASET", False)
    asked, other = studies.instance(0, 0), studies.instance(2, 0, PatientID="somebody else")

    def on_get(_: Any):
        yield 2
        yield 0xFF00, other
        yield 0xFF00, asked

    entity, port = AE(ae_title="PACS"), free_port()
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    for each in AllStoragePresentationContexts:
        entity.add_supported_context(each.abstract_syntax, ALL_TRANSFER_SYNTAXES, scu_role=True, scp_role=True)
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_GET, on_get)])
    inbox = Inbox(tmp_path / "inbox", Limits(keep_free_gib=0.0))
    settings = DimseArchive(kind="dimse", ae_title="PACS", host="127.0.0.1", port=port, timeout=10)
    found = Found(asked.StudyInstanceUID, asked.SeriesInstanceUID, asked.SOPInstanceUID)
    with inbox.writing():
        DimseSource(settings, inbox, "CONSILIUM").fetch(found.study, [found], whole=True)
    server.shutdown()
    assert [each.uid for each in inbox.instances()] == [asked.SOPInstanceUID]


def test_of_an_answer_to_a_search_only_what_was_asked_for_is_kept(tmp_path: Path) -> None:
    answer = {"0020000D": {"Value": ["1.2" + "3" * 10**6]}, "00080050": {"Value": ["A1"]}, "00100010": {"Value": ["x"]}}
    pages = [[answer], []]
    source = WebSource(WebArchive(kind="dicomweb", url="http://localhost/"), Inbox(tmp_path / "inbox", Limits()))
    source._client = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=pages.pop(0))))
    (found,) = source._search("studies")
    assert found == {"study": "1.2" + "3" * 62, "accession": "A1", "series": "", "instance": ""}


def test_an_answer_without_end_is_left_after_the_one_instance_that_was_asked_for(tmp_path: Path) -> None:
    made, file = studies.instance(0, 0), tmp_path / "made.dcm"
    made.save_as(file, enforce_file_format=True)
    sent = 0

    def parts_for_ever():
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield b"--x\r\nContent-Type: application/dicom\r\n\r\n" + file.read_bytes() + b"\r\n"

    inbox = Inbox(tmp_path / "inbox", Limits(keep_free_gib=0.0))
    source = WebSource(WebArchive(kind="dicomweb", url="http://localhost/"), inbox)
    headers = {"content-type": "multipart/related; boundary=x"}
    source._client = httpx.Client(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, content=parts_for_ever()))
    )
    found = Found(made.StudyInstanceUID, made.SeriesInstanceUID, made.SOPInstanceUID)
    with pytest.raises(DataError, match="several instances"):
        source.fetch(found.study, [found], whole=True)
    assert inbox.counts() == {"inbox": 1, "repeats": 0, "differing": 0} and sent < 100


def test_an_answer_that_is_not_in_parts_is_refused() -> None:
    for kind in ("application/dicom", "multipart/related", "multipart/related; boundary=" + "x" * 100, ""):
        with pytest.raises(TransportError):
            boundary_of(kind)


def test_an_archive_behind_https_wants_a_certificate_and_a_token(archive_of, site, tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    archive = archive_of("stand-in", tls=tmp_path / "tls")
    tls = {"ca": str(files["ca"]), "certificate": str(files["site"]), "key": str(files["site.key"])}
    archive.hold(studies.write(tmp_path / "held", studies=1, images=2), verify=trusted(tmp_path / "tls"))
    (tmp_path / "token").write_text("secret-7\n")
    (tmp_path / "wrong").write_text("secret-8\n")
    wanted = worklist(tmp_path, "accession", "A00000")
    right = {"kind": "dicomweb", "url": archive.dicomweb, "tls": tls, "token": str(tmp_path / "token")}
    refused = (
        {**right, "token": str(tmp_path / "wrong")},
        {**right, "tls": {"ca": tls["ca"]}},
        {**right, "tls": {**tls, "ca": str(files["site"])}},
        {**right, "url": archive.dicomweb.replace("127.0.0.1", "localhost")},
    )
    for wrong in refused:
        site.settings["archives"] = {"main": wrong}
        done = site.run("pull", wanted)
        assert done.returncode == 4 and kept(site) == {}, done.stdout
        assert "secret" not in done.stdout + done.stderr
    site.settings["archives"] = {"main": right}
    done = site.run("pull", wanted)
    assert done.returncode == 0 and len(kept(site)) == 2, done.stdout + done.stderr


def test_a_receiver_with_tls_speaks_to_nobody_without_a_certificate(site, tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    site.settings["receive"]["tls"] = {
        "ca": str(files["ca"]),
        "certificate": str(files["site"]),
        "key": str(files["site.key"]),
    }
    site.receive()
    entity = AE(ae_title=Archive.title)
    entity.add_requested_context(Verification)
    bare = ssl.create_default_context(cafile=files["ca"])
    known = ssl.create_default_context(cafile=files["ca"])
    known.load_cert_chain(files["archive"], files["archive.key"])
    for tls in (None, (bare, "127.0.0.1")):
        assert not entity.associate("127.0.0.1", site.port, ae_title="CONSILIUM", tls_args=tls).is_established
    right = entity.associate("127.0.0.1", site.port, ae_title="CONSILIUM", tls_args=(known, "127.0.0.1"))
    assert right.is_established and right.send_c_echo().Status == 0
    right.release()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://pacs.hospital/dicom-web"}, "https is needed"),
        ({"url": "https://pacs.hospital/dicom-web"}, "name the file of the CA"),
        ({"url": "https://user:word@pacs.hospital/"}, "url"),
        ({"url": "http://localhost/", "token": "a", "password": "b"}, "not both"),
    ],
)
def test_nothing_is_asked_over_an_open_line(site, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    site.settings["archives"] = {"main": {"kind": "dicomweb", **settings}}
    done = site.run("pull", worklist(tmp_path, "accession", "A1"))
    assert done.returncode == 2 and said in done.stderr
