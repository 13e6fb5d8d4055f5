"""Encodings that few programs decode come out exactly: JPEG of 12 bits, HTJ2K, JPEG XL; a lying stream is set aside."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import UID, HTJ2KLossless, HTJ2KLosslessRPCL, JPEGExtended12Bit

from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.inputs import Image
from consilium_shared.preparation.codestream import picture_size
from consilium_shared.preparation.foreign import Unusable, read_header, read_whole
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.pixels import stored_values
from consilium_shared.preparation.selection import require_wanted

VECTOR = Path(__file__).parents[2] / "vectors" / "dicom" / "jpeg-12-bit.dcm"
"""Made by DCMTK 3.6.7: dcmcjpeg +ee +q 95."""
DECODED_BY_DCMTK = "cc1878456598a567aea07fad0ac856b446e9196d3c9c1ae380c3c0e92ad78861"
XL_LOSSLESS, XL_OF_JPEG, XL = (UID(f"1.2.840.10008.1.2.4.{number}") for number in (110, 111, 112))
DRAW = np.random.default_rng(11)
VALUES = (1000 + 900 * np.sin(np.arange(48)[:, None] / 7) + DRAW.integers(0, 200, (48, 40))).astype(np.uint16)
COLOURS = DRAW.integers(0, 256, (48, 40, 3)).astype(np.uint8)


def write(path: Path, stream: bytes, syntax: UID, **tags: Any) -> Path:
    """A 12-bit radiograph of 48 × 40 pixels with this stream as its pixels."""
    write_radiograph(path, np.zeros((48, 40)), "p1", "1", Scanner(12))
    dataset = pydicom.dcmread(path)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].is_undefined_length = True
    known = HTJ2KLossless if len(syntax) == len(HTJ2KLossless) else syntax  # pydicom writes none that it does not know
    dataset.file_meta.TransferSyntaxUID = known
    pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=True)
    path.write_bytes(path.read_bytes().replace(known.encode(), syntax.encode(), 1))
    return path


def stored(path: Path) -> NDArray[Any]:
    require_wanted(read_header(path), Image(size=16, channels=3))
    read_picture(path, Image(size=16, channels=3))
    return stored_values(read_whole(path))


def test_a_jpeg_of_12_bits_has_the_values_that_dcmtk_decodes() -> None:
    assert hashlib.sha256(stored(VECTOR).astype("<u2").tobytes()).hexdigest() == DECODED_BY_DCMTK


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL], ids=lambda each: each.name)
def test_htj2k_as_openjph_encodes_it_is_exact(tmp_path: Path, syntax: UID) -> None:
    np.testing.assert_array_equal(stored(write(tmp_path / "a", imagecodecs.htj2k_encode(VALUES), syntax)), VALUES)


@pytest.mark.parametrize("deep", [12, None])
@pytest.mark.parametrize("syntax", [XL_LOSSLESS, XL], ids=str)
def test_grey_jpeg_xl_is_exact(tmp_path: Path, syntax: UID, deep: int | None) -> None:
    stream = imagecodecs.jpegxl_encode(VALUES, lossless=True, bitspersample=deep)
    np.testing.assert_array_equal(stored(write(tmp_path / "a", stream, syntax)), VALUES)


def test_values_with_a_sign_keep_it(tmp_path: Path) -> None:
    signed = VALUES.astype(np.int32) - 1500
    stream = imagecodecs.jpegxl_encode((signed & 0xFFF).astype(np.uint16), lossless=True, bitspersample=12)
    np.testing.assert_array_equal(stored(write(tmp_path / "a", stream, XL, PixelRepresentation=1)), signed)


def test_colours_in_jpeg_xl_are_exact_also_of_a_recompressed_jpeg(tmp_path: Path) -> None:
    tags = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    lossless = imagecodecs.jpegxl_encode(COLOURS, lossless=True)
    of_lossless = stored(write(tmp_path / "a", lossless, XL_LOSSLESS, PhotometricInterpretation="RGB", **tags))
    np.testing.assert_array_equal(of_lossless, COLOURS)
    jpeg = imagecodecs.jpeg8_encode(COLOURS, level=95)
    again = imagecodecs.jpegxl_encode_jpeg(jpeg)
    found = stored(write(tmp_path / "b", again, XL_OF_JPEG, PhotometricInterpretation="YBR_FULL_422", **tags))
    assert np.abs(found.astype(int) - imagecodecs.jpeg8_decode(jpeg)).mean() < 2  # two decoders of one lossy stream


@pytest.mark.parametrize("shape", [(8, 8), (48, 40), (256, 256), (90, 160), (9000, 3), (1, 700)])
def test_a_jpeg_xl_stream_tells_its_size_before_it_is_decoded(shape: tuple[int, int]) -> None:
    for deep in (12, None):
        assert picture_size(imagecodecs.jpegxl_encode(np.ones(shape, np.uint16), bitspersample=deep, effort=1)) == shape


LIES: dict[str, tuple[UID, bytes]] = {
    "a larger JPEG XL": (XL, imagecodecs.jpegxl_encode(np.ones((480, 40), np.uint16), effort=1)),
    "JPEG XL in colour": (XL, imagecodecs.jpegxl_encode(COLOURS, effort=1)),
    "no JPEG XL": (XL, b"\xff\x0a"),
    "JPEG called JPEG XL": (XL, imagecodecs.jpeg8_encode(COLOURS)),
    "a larger JPEG": (JPEGExtended12Bit, imagecodecs.jpeg8_encode(np.ones((480, 40, 3), np.uint8))),
    "JPEG in colour": (JPEGExtended12Bit, imagecodecs.jpeg8_encode(COLOURS)),
    "a JPEG cut off": (JPEGExtended12Bit, imagecodecs.jpeg8_encode(COLOURS)[:60]),
}


@pytest.mark.parametrize(("syntax", "stream"), LIES.values(), ids=LIES)
def test_a_stream_that_is_not_what_the_header_says_is_set_aside(tmp_path: Path, syntax: UID, stream: bytes) -> None:
    with pytest.raises(Unusable):
        stored(write(tmp_path / "a", stream, syntax))


def test_any_byte_may_be_damaged(tmp_path: Path) -> None:
    whole = imagecodecs.jpegxl_encode(VALUES, lossless=True, bitspersample=12)
    for place in DRAW.integers(0, len(whole), 24):
        damaged = bytearray(whole)
        damaged[place] ^= int(DRAW.integers(1, 256))
        with suppress(Unusable):
            assert stored(write(tmp_path / "a", bytes(damaged), XL)).shape == (48, 40)
