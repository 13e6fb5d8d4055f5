"""Data sets without DICOM's preamble, as some archives keep them, are read; nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.selection import require_wanted

RAMP = np.tile(np.linspace(0.0, 1.0, 32), (32, 1))


def bare(folder: Path, syntax: UID, *, meta: bool) -> Path:
    """A 12-bit ramp without preamble, with or without the group that tells the transfer syntax."""
    write_radiograph(folder / "whole.dcm", RAMP, "p1", "1", Scanner(12))
    dataset = pydicom.dcmread(folder / "whole.dcm")
    if syntax == RLELossless:
        dataset.compress(syntax)
    elif syntax == ExplicitVRBigEndian:
        dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    whole = folder / "whole.dcm"
    list(dataset.iterall())  # reads all values, which are then written in the other byte order
    implicit, little = syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    pydicom.dcmwrite(whole, dataset, implicit_vr=implicit, little_endian=little, force_encoding=True)
    content = whole.read_bytes()
    length = int.from_bytes(content[140:144], "little")
    (folder / "a").write_bytes(content[132 if meta else 144 + length :])
    return folder / "a"


@pytest.mark.parametrize(
    ("syntax", "meta"),
    [
        (ImplicitVRLittleEndian, False),
        (ExplicitVRLittleEndian, False),
        (ExplicitVRBigEndian, False),
        (ExplicitVRLittleEndian, True),
        (RLELossless, True),
    ],
    ids=lambda each: str(each),
)
def test_a_data_set_without_preamble_is_read(tmp_path: Path, syntax: UID, meta: bool) -> None:
    path = bare(tmp_path, syntax, meta=meta)
    require_wanted(read_header(path), Image(size=32))
    np.testing.assert_allclose(read_picture(path, Image(size=32))[0], RAMP, atol=1.5 / 4095)


def test_compressed_pixels_of_a_syntax_that_nobody_tells_are_set_aside(tmp_path: Path) -> None:
    path = bare(tmp_path, RLELossless, meta=False)
    with pytest.raises(Unusable, match="does not say how"):
        read_picture(path, Image(size=32))


@pytest.mark.parametrize(
    "content", [b"\x08\0\x05\0" + bytes(300), b"\x08\0\x16\0UI\x04\0abcd", b"\x02\0\0\0UL\x04\0" * 9]
)
def test_what_only_begins_like_one_is_no_dicom_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(Unusable, match="not"):
        require_wanted(read_header(tmp_path / "a"), Image(size=32))


def test_random_bytes_after_the_mark_are_called_damaged_and_a_cut_header_an_image_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM" + np.random.default_rng(3).bytes(2000))
    with pytest.raises(Unusable, match="damaged"):
        read_header(tmp_path / "a")
    write_radiograph(tmp_path / "b", RAMP, "p1", "1", Scanner())
    dataset = pydicom.dcmread(tmp_path / "b")
    del dataset.Rows
    dataset.save_as(tmp_path / "b")
    with pytest.raises(Unusable, match="an image without Rows and Columns"):
        require_wanted(read_header(tmp_path / "b"), Image(size=32))
