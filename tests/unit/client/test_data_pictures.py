"""Folders of PNG, JPEG and TIFF files: whose each is, the site says; nobody is taken for a patient in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import PicturesAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.head import look
from consilium_client.data.image_files import read_image_file
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable
from consilium_shared.study import Study

RAMP = np.tile(np.linspace(0.0, 1.0, 32), (32, 1))
COLOURS = np.stack([RAMP, RAMP.T, np.full_like(RAMP, 0.25)], -1)


def study(modality: tuple[str, ...] = ("GM",), split: bool = False, **image: Any) -> Study:
    return studies.study(
        "small-cnn",
        {
            "asset": "a",
            "label": {"column": "finding", "classes": ["well", "ill"]},
            "image": {"size": 16, "modality": modality, **image},
        },
        name="pictures",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
        **({"evaluation": {"split": None, "split_column": "part"}} if split else {}),
    )


def write(path: Path, picture: NDArray[np.float64] = RAMP, mode: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Pillow.fromarray(np.round(picture * 255).astype(np.uint8))
    (made if mode is None else made.convert(mode)).save(path, **options)
    return path


def asset(folder: Path, **options: Any) -> PicturesAsset:
    return PicturesAsset.model_validate({"kind": "pictures", "path": "p", "modality": "GM", **options}).at(folder)


def reasons(records: ArrayDataset) -> dict[str, int]:
    return dict(records.report.set_aside.counts)


def test_the_paths_say_class_patient_and_part_where_the_layout_says_so(tmp_path: Path) -> None:
    names = ["train/ill/p1_1.png", "train/ill/p1_2.JPG", "test/well/p2_1.tif", "train/well/p3_1.png", "train/odd.png"]
    for number, name in enumerate([*names, "train/well/notes_1.gif"]):
        write(tmp_path / "p" / name, RAMP * (0.5 + number / 12))
    found = asset(tmp_path, layout="{split}/{label}/{patient}_*.*", columns={"part": "of"})
    records = load(found, study(split=True))
    assert records.patient_count == 3
    assert sorted(zip(records.patients.tolist(), records.labels[0].tolist(), strict=True)) == [
        (0, 0), (1, 1), (1, 1), (2, 0)
    ]  # fmt: skip
    assert int((~records.train).sum()) == 1
    assert reasons(records) == {"path that layout does not describe": 1}
    assert look(found) == 3


def test_a_table_says_whose_a_picture_is(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b.png"):
        write(tmp_path / "p" / name)
    rows = "patient,finding,picture\np1,ill,a\\1.png\np1,well,a/2.png\np2,well,lost.png\n"
    (tmp_path / "labels.csv").write_text(rows)
    records = load(asset(tmp_path, table="labels.csv", file="picture"), study())
    assert records.patient_count == 1
    assert reasons(records) == {
        "no usable row in the label table": 1,
        "label table: row without a usable image": 1,
    }


def test_another_patients_row_for_the_same_picture_pushes_nobody_out(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.png")
    seen, own, other = [], "p1,ill,a.png\n", "p2,well,a.png\n"
    for rows in (own, own + other, other + own):
        (tmp_path / "labels.csv").write_text(f"patient,finding,picture\n{rows}")
        records = load(asset(tmp_path, table="labels.csv", file="picture"), study())
        seen.append(sorted(records.labels[0].tolist()))
    assert seen == [[1], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "table, or layout"),
        ({"layout": "{label}/*.png"}, "{patient} whose a picture is"),
        ({"layout": "{patient}/{patient}.png"}, "once at most"),
        ({"layout": "{patient}/{name}.png"}, "no other"),
        ({"layout": "{patient}.png", "table": "labels.csv"}, "table, or layout"),
    ],
)
def test_no_picture_is_a_patient_in_silence(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        asset(tmp_path, **options)


def test_the_study_takes_the_modality_that_the_asset_names(tmp_path: Path) -> None:
    write(tmp_path / "p" / "ill" / "p1.png")
    found = asset(tmp_path, layout="{label}/{patient}.png")
    assert len(load(found, study(modality=()))) == 1
    with pytest.raises(DataError, match="takes pictures of modality CR, and the asset says GM"):
        load(found, study(modality=("CR",)))
    with pytest.raises(DataError, match="selects by tags"):
        load(found, study(select={"view": ["PA"]}))
    with pytest.raises(DataError, match="layout describes none of 1 picture files"):
        load(asset(tmp_path, layout="{label}-{patient}.png"), study())


GREY: dict[str, dict[str, Any]] = {
    "a.png": {},
    "grey-as-colour.png": {"mode": "RGB"},
    "opaque.png": {"mode": "RGBA"},
    "palette.png": {"mode": "P"},
    "a.jpg": {"quality": 95},
    "grey-as-colour.jpg": {"mode": "RGB", "quality": 95},
    "a.tif": {"compression": "tiff_lzw"},
}


@pytest.mark.parametrize(("name", "options"), GREY.items())
def test_a_grey_picture_is_grey_in_whatever_file(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path = write(tmp_path / name, **options)
    grey = read_image_file(path, Image(size=32))
    np.testing.assert_allclose(grey[0], RAMP, atol=4 / 255)
    np.testing.assert_array_equal(read_image_file(path, Image(size=32, channels=3)).shape, (3, 32, 32))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_grey_of_16_bits_keeps_them(tmp_path: Path, name: str) -> None:
    fine = 0.5 + RAMP / 1000
    Pillow.fromarray(np.round(fine * 65535).astype(np.uint16)).save(tmp_path / name)
    np.testing.assert_allclose(read_image_file(tmp_path / name, Image(size=32))[0], fine, atol=1 / 65535)


def test_colours_are_three_channels_and_refused_where_the_study_takes_grey(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", COLOURS)
    np.testing.assert_allclose(
        read_image_file(path, Image(size=32, channels=3)), np.moveaxis(COLOURS, -1, 0), atol=1 / 255
    )
    with pytest.raises(Unusable, match="colour image"):
        read_image_file(path, Image(size=32))


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 3  # upside down
    path = write(tmp_path / "a.png", exif=exif)
    np.testing.assert_allclose(read_image_file(path, Image(size=32))[0], RAMP[:, ::-1], atol=1 / 255)


def bomb(path: Path) -> None:
    Pillow.new("1", (20_000, 20_000)).save(path, "PNG")


def transparent(path: Path) -> None:
    made = Pillow.fromarray(np.round(COLOURS * 255).astype(np.uint8)).convert("RGBA")
    made.putpixel((3, 3), (0, 0, 0, 7))
    made.save(path, "PNG")


def pages(path: Path) -> None:
    page = Pillow.fromarray(np.round(RAMP * 255).astype(np.uint8))
    page.save(path, "TIFF", save_all=True, append_images=[page])


def cut(path: Path) -> None:
    path.write_bytes(write(path.with_suffix(".jpg")).read_bytes()[:-300])


DAMAGED = {
    "more than 100 million pixels": bomb,
    "transparent": transparent,
    "several pictures": pages,
    "damaged": cut,
    "not a PNG, JPEG or TIFF": lambda path: path.write_bytes(b"GIF89a" + bytes(64)),
    "one brightness": lambda path: write(path.with_suffix(".png"), RAMP * 0).rename(path),
    "neither grey nor RGB": lambda path: write(path.with_suffix(".jpg"), COLOURS, mode="CMYK").rename(path),
}


@pytest.mark.parametrize(("reason", "make"), DAMAGED.items(), ids=DAMAGED)
def test_what_is_no_single_whole_picture_is_set_aside(tmp_path: Path, reason: str, make: Any) -> None:
    make(tmp_path / "a")
    with pytest.raises(Unusable, match=reason):
        read_image_file(tmp_path / "a", Image(size=32))
