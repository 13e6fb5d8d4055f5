"""The page on images: what a model would see, by class and by scanner, and how much of the grey range it uses."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import DicomAsset
from consilium_client.quality import page
from consilium_client.quality.assessment import assess
from consilium_client.quality.pictures import thumbnail
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.study import Study

STUDY = Study.model_validate(
    studies.contract(
        "small-cnn",
        {
            "asset": "chest",
            "label": {"column": "ill", "classes": ["no", "yes"]},
            "image": {"size": 16, "modality": ["DX"]},
        },
    )
)


def test_scanners_classes_and_the_grey_range_are_shown(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    old = Scanner(12, tags={"Manufacturer": "Old <b>", "ManufacturerModelName": "X", "StudyDate": "19991231"})
    new = Scanner(8, tags={"Manufacturer": "New", "StudyDate": "20991231", "AcquisitionDate": "20991230"})
    draw, rows = np.random.default_rng(3), ["patient,ill"]
    for number in range(12):
        image = draw.random((20, 24)) if number else np.full((20, 24), 0.5) + 0.01 * draw.random((20, 24))
        name = f"P{number:02d}"
        write_radiograph(tmp_path / "images" / f"{name}.dcm", image, name, name, new if number % 3 else old)
        rows.append(f"{name},{'yes' if number % 2 else 'no'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    asset = DicomAsset(kind="dicom", path=tmp_path / "images", table=tmp_path / "labels.csv")
    quality = assess(load(asset, STUDY), STUDY, "chest")
    report = quality.to_json()
    use = report["pictures"]["grey_range_used"]
    assert (use[0], sum(use[1:6]), sum(use[6:]), report["pictures"]["under_a_tenth"]) == (1, 0, 11, 1)
    assert [(each["name"], each["images"], each["last"]) for each in report["scanners"]] == [
        ("New", 8, "20991230"),
        ("Old <b> X", 4, "19991231"),
    ]
    told = {each.what for each in quality.findings}
    assert "images from days that are still to come" in told
    assert "1 of 12 use less than a tenth of the grey range" in told
    text = page.render(quality, "hospital-a").decode()
    assert text.count("an image of this scanner") == 6 + 4
    assert text.count("an image of yes") == text.count("an image of no") == 6
    assert "Old &lt;b&gt; X" in text
    assert "P07" not in text


@pytest.mark.parametrize("shape", [(9, 11), (1, 300, 200), (3, 8, 8), (1, 5, 8, 8)])
def test_a_thumbnail_is_a_small_png_of_the_image(shape: tuple[int, ...]) -> None:
    image = np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    head, _, data = thumbnail(image).partition(",")
    made = base64.b64decode(data)
    width, height, colour = (int.from_bytes(made[at:end], "big") for at, end in ((16, 20), (20, 24), (25, 26)))
    assert head == "data:image/png;base64"
    assert made[:8] == b"\x89PNG\r\n\x1a\n"
    assert max(width, height) <= 112
    length = int.from_bytes(made[33:37], "big")
    pixels = zlib.decompress(made[41 : 41 + length])
    assert len(pixels) == height * (1 + width * (3 if colour == 2 else 1))
    assert (colour == 2) == (shape[0] == 3 and len(shape) == 3)
