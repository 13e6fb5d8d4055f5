"""A picture comes out right whatever its side tags say, or is set aside for the tag that makes it doubtful."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.selection import require_wanted

RAMP = np.tile(np.linspace(0.0, 1.0, 32), (32, 1))


def write(path: Path, scanner: Scanner | None = None, grey: NDArray[np.float64] = RAMP) -> pydicom.Dataset:
    write_radiograph(path, grey, "p1", path.name, scanner or Scanner())
    return pydicom.dcmread(path)


def image(path: Path) -> NDArray[np.float32]:
    require_wanted(read_header(path), Image(size=32))
    return read_picture(path, Image(size=32))[0]


SIDE_TAGS: dict[str, dict[str, Any]] = {
    "a slope without an intercept": {"RescaleSlope": 4},
    "an intercept without a slope": {"RescaleIntercept": -1024},
    "an empty slope": {"RescaleSlope": None, "RescaleIntercept": 0},
    "a slope twice": {"RescaleSlope": [1, 1], "RescaleIntercept": [0, 0]},
    "a width of 0": {"WindowCenter": 9, "WindowWidth": 0},
    "a negative width": {"WindowCenter": 9, "WindowWidth": -1},
    "an empty window": {"WindowCenter": None, "WindowWidth": None},
    "a function in lower case": {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "linear"},
    "scaled values and a narrow window": {
        "RescaleSlope": "0.00392156862745098", "RescaleIntercept": 0, "WindowCenter": 0.5, "WindowWidth": 0.999999,
    },
    "an empty table": {"VOILUTSequence": [], "WindowCenter": 128, "WindowWidth": 256},
    "a spacing of 0": {"PixelSpacing": [0, 0]},
    "a modality in lower case": {"Modality": "dx"},
    "the shape that fits": {"PresentationLUTShape": "IDENTITY"},
}  # fmt: skip


@pytest.mark.parametrize("tags", SIDE_TAGS.values(), ids=SIDE_TAGS)
def test_a_side_tag_neither_changes_nor_refuses_a_good_picture(tmp_path: Path, tags: dict[str, Any]) -> None:
    write(tmp_path / "a", Scanner(8, tags=tags))
    np.testing.assert_allclose(image(tmp_path / "a"), RAMP, atol=1.5 / 255)


@pytest.mark.parametrize("signed", [0, 1])
def test_values_left_aligned_in_their_word_are_shifted(tmp_path: Path, signed: int) -> None:
    dataset = write(tmp_path / "a", Scanner(12))
    values = dataset.pixel_array.astype(np.int64) - (2048 if signed else 0)
    dataset.PixelData = ((values << 4) & 0xFFFF).astype("<u2").tobytes()
    dataset.HighBit, dataset.PixelRepresentation = 15, signed
    dataset.save_as(tmp_path / "a")
    np.testing.assert_allclose(image(tmp_path / "a"), RAMP, atol=1.5 / 4095)


@pytest.mark.parametrize("encoding", ["plain", "rle", "jpeg2000"])
def test_an_overlay_in_the_upper_bits_is_no_part_of_the_picture(tmp_path: Path, encoding: str) -> None:
    dataset = write(tmp_path / "a", Scanner(16))
    values = np.round(RAMP * 4095).astype("<u2")
    values[8:16, 8:16] |= 0x8000
    dataset.PixelData = values.tobytes()
    if encoding != "plain":
        dataset.compress({"rle": pydicom.uid.RLELossless, "jpeg2000": pydicom.uid.JPEG2000Lossless}[encoding])
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.save_as(tmp_path / "a")
    np.testing.assert_allclose(image(tmp_path / "a"), RAMP, atol=1.5 / 4095)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("padding", [{"PixelPaddingValue": 7}, {"PixelPaddingValue": 9, "PixelPaddingRangeLimit": 5}])
def test_padding_is_black(tmp_path: Path, inverted: bool, padding: dict[str, int]) -> None:
    dataset = write(tmp_path / "a", Scanner(12, inverted=inverted, tags=padding))
    values = dataset.pixel_array.copy()
    values[values < 10] = 10
    values[:4] = 7
    dataset.PixelData = values.tobytes()
    dataset.save_as(tmp_path / "a")
    seen = image(tmp_path / "a")
    assert seen[:4].max() == 0
    np.testing.assert_allclose(seen[4:], RAMP[4:], atol=11 / 4095)


def test_pixel_data_that_is_too_long_gives_its_first_picture(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a")
    dataset.PixelData += bytes(32 * 32)
    dataset.save_as(tmp_path / "a")
    np.testing.assert_allclose(image(tmp_path / "a"), RAMP, atol=1.5 / 255)


DOUBTFUL: dict[str, tuple[Scanner, str]] = {
    "a negative that says otherwise": (Scanner(inverted=True, tags={"PresentationLUTShape": "IDENTITY"}), "Shape"),
    "a slope of 0": (Scanner(tags={"RescaleSlope": 0, "RescaleIntercept": 0}), "RescaleSlope is 0"),
    "two slopes": (Scanner(tags={"RescaleSlope": [1, 2], "RescaleIntercept": 0}), "RescaleSlope holds several"),
    "a window beside the values": (Scanner(window=(5000.0, 10.0)), "one brightness"),
    "a high bit below the stored ones": (Scanner(tags={"HighBit": 3}), "HighBit"),
}


@pytest.mark.parametrize(("scanner", "reason"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_doubtful_picture_is_set_aside_for_the_tag_that_makes_it_so(
    tmp_path: Path, scanner: Scanner, reason: str
) -> None:
    write(tmp_path / "a", scanner)
    with pytest.raises(Unusable, match=reason):
        image(tmp_path / "a")


def test_a_picture_of_32_bits_is_shown_over_its_range(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a", Scanner(16))
    dataset.PixelData = np.round(RAMP * (2**32 - 1)).astype("<u4").tobytes()
    dataset.BitsAllocated = dataset.BitsStored = 32
    dataset.HighBit = 31
    dataset.save_as(tmp_path / "a")
    np.testing.assert_allclose(image(tmp_path / "a"), RAMP, atol=1e-6)
