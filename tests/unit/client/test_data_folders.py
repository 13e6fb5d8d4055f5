"""A folder of images is read to its last file or says what it left; no file is waited for, or unpacked without end."""

from __future__ import annotations

import os
import socket
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data import bounds, head
from consilium_client.data.asset import DicomAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.folder import walk
from consilium_client.data.identity import NOTHING
from consilium_client.data.report import SetAside
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.preparation import foreign
from consilium_shared.preparation.codestream import picture_size
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.picture import read_picture

PICTURE = np.tile(np.linspace(0.1, 0.7, 32), (32, 1))
STUDY = studies.study(
    "small-cnn",
    {"asset": "xray", "label": {"column": "finding", "classes": ["normal", "pneumonia"]}, "image": {"size": 16}},
    name="folders",
    training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
)


def write(base: Path, name: str, patient: str, **tags: Any) -> Path:
    path = base / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_radiograph(path, PICTURE, patient, name, Scanner(tags=tags))
    return path


def asset(folder: Path, people: str = "p1 p2", **options: Any) -> DicomAsset:
    (folder / "images").mkdir(exist_ok=True)
    labels = "".join(f"{name},normal\n" for name in people.split())
    (folder / "l.csv").write_text(f"patient,finding\n{labels}", encoding="utf-8")
    spec = {"kind": "dicom", "path": "images", "table": "l.csv", **options}
    return DicomAsset.model_validate(spec, strict=False).at(folder)


def found(folder: Path) -> tuple[list[str], dict[str, int], dict[str, str]]:
    aside = SetAside()
    paths = [path.relative_to(folder).as_posix() for path in walk(folder, aside)]
    return paths, aside.counts, aside.first


def test_links_to_folders_are_followed_once_for_each_real_folder(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "archive" / "p2"
    write(images, "p1/a.dcm", "p1")
    write(elsewhere, "deep/b.dcm", "p2")
    for name in ("also", "p2"):
        (images / name).symlink_to(elsewhere)
    (images / "0").symlink_to(images / "p1")
    (images / "p1" / "loop").symlink_to(images)
    (images / "p1" / "machine").symlink_to("/")
    (images / "p1" / "gone").symlink_to(tmp_path / "nowhere")
    (images / "p1" / "self").symlink_to("self")
    paths, counts, places = found(images)
    assert paths == ["p1/a.dcm", "also/deep/b.dcm"]
    assert counts == {
        "link to a folder that is read already": 3,
        "link to a folder that holds this one, not followed": 1,
        "link to nothing": 2,
    }
    assert places["link to a folder that is read already"] == "0; p2; p1/loop"
    records = load(asset(tmp_path), STUDY)
    assert records.patient_count == 2
    assert dict(records.report.set_aside.counts) == counts


def test_a_folder_of_nothing_but_links_is_an_archive_too(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        write(tmp_path / "archive", f"{patient}/a.dcm", patient)
        asset(tmp_path).path.joinpath(patient).symlink_to(tmp_path / "archive" / patient)
    assert load(asset(tmp_path), STUDY).patient_count == 2


def test_what_was_deleted_or_hidden_is_not_read_and_is_counted(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in (".Trash-1000/a.dcm", ".snapshot/daily/a.dcm", "x/lost+found/a.dcm", "x/@eaDir/a.dcm", "x/._a.dcm"):
        write(images, name, "p2")
    write(images, "x/a.dcm", "p1")
    paths, counts, places = found(images)
    assert paths == ["x/a.dcm"]
    assert counts == {"hidden folder, not entered": 4, "hidden file, not read": 1}
    assert places["hidden folder, not entered"] == ".Trash-1000; .snapshot; x/@eaDir; x/lost+found"
    assert load(asset(tmp_path), STUDY).patient_count == 1


def test_a_folder_that_this_account_cannot_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    write(images, "a.dcm", "p1")
    write(images, "theirs/b.dcm", "p2")
    listing = os.scandir

    def forbidding(path: Path) -> Any:
        if Path(path).name == "theirs":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    records = load(asset(tmp_path), STUDY)
    reason = "folder not readable: Permission denied"
    assert records.report.set_aside.counts[reason] == 1
    assert records.report.set_aside.first[reason] == "theirs"
    with pytest.raises(DataError, match=r"cannot read .*theirs: Permission denied"):
        load(asset(tmp_path).model_copy(update={"path": images / "theirs"}), STUDY)


def test_what_is_no_regular_file_is_counted_and_never_opened(tmp_path: Path) -> None:
    """A reader of a named pipe waits until somebody writes into it: the agent would stand still."""
    images = asset(tmp_path).path
    os.mkfifo(images / "0.dcm")
    (images / "1.dcm").symlink_to(images / "0.dcm")
    (images / "2.dcm").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(str(images / "3.dcm"))
    write(images, "4.dcm", "p1")
    records = load(asset(tmp_path), STUDY)
    assert head.look(asset(tmp_path)) == 2
    assert len(records) == 1
    assert records.report.set_aside.first["a named pipe, where a file is meant"] == "0.dcm; 1.dcm"
    assert records.report.set_aside.counts["a device, where a file is meant"] == 1
    assert records.report.set_aside.counts["a socket, where a file is meant"] == 1


def test_an_empty_folder_says_what_it_holds_instead(tmp_path: Path) -> None:
    images = asset(tmp_path).path
    os.mkfifo(images / "0.dcm")
    for read in (lambda: load(asset(tmp_path), STUDY), lambda: head.look(asset(tmp_path))):
        with pytest.raises(DataError, match="holds no file; 1 × a named pipe, where a file is meant"):
            read()


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write(tmp_path / "images", name, "p1")
    monkeypatch.setattr(bounds, "FILES", 2)
    with pytest.raises(DataError, match="holds more than 2 files"):
        load(asset(tmp_path), STUDY)


def deflated(path: Path, filling: int) -> Path:
    """The same image deflated, with so many zero bytes in a private tag."""
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x00091010, "OB", bytes(filling))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    return path


def test_a_deflated_file_is_inflated_up_to_a_bound_and_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = write(tmp_path, "a", "p1"), deflated(write(tmp_path, "b", "p1"), 2**20)
    np.testing.assert_array_equal(read_picture(packed, Image(size=16))[0], read_picture(plain, Image(size=16))[0])
    monkeypatch.setattr(foreign, "INFLATED_BYTES", 2**24)
    bomb = deflated(write(tmp_path, "c", "p1"), 2**26)
    assert bomb.stat().st_size < 2**18
    made: list[int] = []
    inflate = zlib.decompressobj

    class Watched:
        def __init__(self, bits: int) -> None:
            self._inner = inflate(bits)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def decompress(self, data: bytes, most: int = 0) -> bytes:
            out = self._inner.decompress(data, most)
            made.append(len(out))
            return out

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    monkeypatch.setattr(pydicom, "dcmread", None)
    for read in (lambda: read_header(bomb), lambda: read_picture(bomb, Image(size=16))[0]):
        made.clear()
        with pytest.raises(Unusable, match="deflated: holds more than 16 MiB"):
            read()
        assert sum(made) <= 2**24 + 2**20
        assert max(made) <= 2**20


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a", "p1")
    with path.open("r+b") as file:
        file.truncate(2**20 + 1)  # sparse
    monkeypatch.setattr(foreign, "FILE_BYTES", 2**20)
    monkeypatch.setattr(pydicom, "dcmread", None)
    with pytest.raises(Unusable, match="file larger than 1 MiB"):
        read_header(path)


JPEG = bytes.fromhex("ffd8 ffe0 0004 4a46 ff ffc1 000b 08 0102 0304 01 011100 ffda")
JPEG_LS = bytes.fromhex("ffd8 fff7 000b 10 0506 0708 01 011100 ffda")
J2K = bytes.fromhex("ff4f ff51 002f 0000 00000908 00000706 00000008 00000006")


@pytest.mark.parametrize(
    ("stream", "size"),
    [
        (JPEG, (0x0102, 0x0304)),
        (JPEG_LS, (0x0506, 0x0708)),
        (J2K, (0x0700, 0x0900)),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + J2K, (0x0700, 0x0900)),
        (JPEG[:12], None),
        (b"", None),
        (b"\xff\xd8\x00", None),
    ],
)
def test_a_code_stream_says_its_own_size(stream: bytes, size: tuple[int, int] | None) -> None:
    assert picture_size(stream) == size


@pytest.mark.parametrize(
    ("syntax", "stream"), [(JPEGBaseline8Bit, JPEG), (JPEGLSLossless, JPEG_LS), (JPEG2000Lossless, J2K)]
)
def test_a_picture_of_another_size_than_the_header_says_is_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, stream: bytes
) -> None:
    path = write(tmp_path, "a", "p1")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.PixelData = encapsulate([stream + bytes(len(stream) % 2)])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path)
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda _: pytest.fail("decoded")))
    with pytest.raises(Unusable, match="another size than Rows and Columns"):
        read_picture(path, Image(size=16))[0]


def test_run_lengths_longer_than_their_pixels_are_never_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a", "p1")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = RLELossless
    dataset.PixelData = encapsulate([bytes([1, 0, 0, 0, 64, *[0] * 59]) + b"\x81\0" * 2**16])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path)
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda _: pytest.fail("decoded")))
    with pytest.raises(Unusable, match="longer than its pixels"):
        read_picture(path, Image(size=16))[0]


def reasons(records: ArrayDataset) -> dict[str, int]:
    return {reason: n for reason, n in records.report.set_aside.counts.items() if not reason.startswith("label table")}


def test_one_identifier_of_two_issuers_is_nobodys(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write(images, "a.dcm", "p1", IssuerOfPatientID="North")
    write(images, "b.dcm", "p1", IssuerOfPatientID="South")
    write(images, "c.dcm", "p1")
    write(images, "d.dcm", "p2", IssuerOfPatientID="North")
    write(images, "e.dcm", "p2", IssuerOfPatientID=" NORTH ")
    write(images, "f.dcm", "p2")
    records = load(asset(tmp_path), STUDY)
    assert (len(records), records.patient_count) == (3, 1)
    why = "PatientID that several issuers gave: two people may have it"
    assert reasons(records) == {why: 3}
    assert records.report.set_aside.first[why] == "a.dcm; b.dcm; c.dcm"


def test_identifiers_in_files_and_table_are_one_spelling(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name, patient in enumerate(["7.0", "8", "9 ", "00123", "nan", "", "a\\b"]):
        write(images, f"{name}.dcm", patient)
    records = load(asset(tmp_path, "7 8.0 9 123"), STUDY)
    assert records.patient_count == 3
    assert reasons(records) == {
        "no usable row in the label table": 1,
        f"PatientID is {NOTHING}": 1,
        "no PatientID in the file": 1,
        "PatientID holds several values (a backslash stands between them)": 1,
    }
    what = "PatientIDs that would match the label table without leading zeros, case or blanks"
    assert (dict(records.report.notes.counts), dict(records.report.notes.first)) == ({what: 1}, {what: "3.dcm"})


@pytest.mark.parametrize("written", [r"sub\ü.dcm", "./sub/ü.dcm", "sub//u\u0308.dcm"])
def test_a_files_name_in_the_table_may_be_written_as_any_system_does(tmp_path: Path, written: str) -> None:
    write(tmp_path / "images", "sub/ü.dcm", "p1")
    spec = asset(tmp_path, file="key")
    spec.table.write_text(f"patient,finding,key\np1,normal,{written}\n", encoding="utf-8")
    assert len(load(spec, STUDY)) == 1


def test_a_file_that_would_match_in_another_case_is_told(tmp_path: Path) -> None:
    write(tmp_path / "images", "a.dcm", "p1")
    write(tmp_path / "images", "B.DCM", "p2")
    spec = asset(tmp_path, file="key")
    spec.table.write_text("patient,finding,key\np1,normal,a.dcm\np2,normal,b.dcm\n", encoding="utf-8")
    records = load(spec, STUDY)
    assert reasons(records) == {"no usable row in the label table": 1}
    what = "files that would match the label table without leading zeros, case or blanks"
    assert (dict(records.report.notes.counts), dict(records.report.notes.first)) == ({what: 1}, {what: "B.DCM"})
