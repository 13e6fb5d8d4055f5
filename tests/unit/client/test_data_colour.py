"""Colours, frames, selections: a study says which pictures it takes, and gets those alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.uid import RLELossless
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import DicomAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image, Selection
from consilium_shared.models import build
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.selection import require_selected
from consilium_shared.study import Study

COLOURS = np.stack(np.broadcast_arrays(np.linspace(0, 1, 32)[None], np.linspace(1, 0, 32)[:, None], 0.25), -1)
GREY = np.repeat(np.tile(np.linspace(0, 1, 32), (32, 1))[..., None], 3, -1)
CONTRACTS = Path(__file__).parents[2] / "vectors" / "contracts"
COLOUR, BLACK_AND_WHITE = Image(size=32, channels=3), Image(size=32)


def write(path: Path, picture: NDArray[np.float64], **tags: Any) -> Path:
    """A file as Scanner writes it, with these pixels instead: ``[rows, columns, 3]``, or frames before them."""
    write_radiograph(path, np.zeros((32, 32)), tags.pop("PatientID", "p1"), path.name, Scanner())
    dataset = pydicom.dcmread(path)
    dataset.PixelData = np.round(picture * 255).astype(np.uint8).tobytes()
    if picture.shape[-1] == 3:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def ybr(path: Path) -> Path:
    """Full-range YBR, which JPEG and ultrasound machines store (PS3.3 C.7.6.3.1.2)."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    stored = COLOURS @ matrix.T + [0, 128 / 255, 128 / 255]
    return write(path, stored, PhotometricInterpretation="YBR_FULL")


def palette(path: Path) -> Path:
    """Indices of 256 colours, of which the first table is a ramp, the second its reverse, the third constant."""
    write_radiograph(path, np.tile(np.linspace(0, 1, 32), (32, 1)), "p1", path.name, Scanner())
    dataset = pydicom.dcmread(path)
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    ramp = np.arange(256) * 257
    for name, table in (("Red", ramp), ("Green", ramp[::-1]), ("Blue", np.full(256, 16384))):
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        setattr(dataset, f"{name}PaletteColorLookupTableData", table.astype("<u2").tobytes())
    dataset.save_as(path)
    return path


def planes(path: Path) -> Path:
    write(path, COLOURS)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = np.round(np.moveaxis(COLOURS, -1, 0) * 255).astype(np.uint8).tobytes()
    dataset.PlanarConfiguration = 1
    dataset.save_as(path)
    return path


def rle(path: Path) -> Path:
    dataset = pydicom.dcmread(write(path, COLOURS))
    dataset.compress(RLELossless)
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("made", [lambda path: write(path, COLOURS), planes, rle, ybr])
def test_every_way_to_store_colours_gives_the_same_three_channels(tmp_path: Path, made: Any) -> None:
    seen = read_picture(made(tmp_path / "a"), COLOUR)
    np.testing.assert_allclose(seen, np.moveaxis(COLOURS, -1, 0), atol=4 / 255)
    with pytest.raises(Unusable, match="colour image"):
        read_picture(tmp_path / "a", BLACK_AND_WHITE)


def test_a_palette_gives_its_colours(tmp_path: Path) -> None:
    seen = read_picture(palette(tmp_path / "a"), COLOUR)
    np.testing.assert_allclose(seen[0], GREY[..., 0], atol=1 / 255)
    np.testing.assert_allclose(seen[1], 1 - GREY[..., 0], atol=1 / 255)
    np.testing.assert_allclose(seen[2], 0.25, atol=1 / 255)


def test_a_grey_picture_stored_as_colour_is_grey_and_a_grey_one_has_three_equal_channels(tmp_path: Path) -> None:
    stored = read_picture(write(tmp_path / "a", GREY), BLACK_AND_WHITE)
    plain = read_picture(write(tmp_path / "b", GREY[..., 0]), BLACK_AND_WHITE)
    np.testing.assert_array_equal(stored, plain)
    np.testing.assert_array_equal(read_picture(tmp_path / "b", COLOUR), np.repeat(plain, 3, 0))


def frames(path: Path) -> Path:
    """Three frames, each with a spot that is brighter than the one before."""
    run = np.zeros((3, 32, 32))
    run[:, 8:16, 8:16] = np.array([0.2, 0.4, 0.6])[:, None, None]
    return write(path, run, NumberOfFrames=3)


def test_a_run_gives_its_middle_frame_or_each(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    frames(tmp_path / "dicom" / "a")
    (tmp_path / "labels.csv").write_text("patient,finding\np1,ill\n")
    asset = DicomAsset(kind="dicom", path=tmp_path / "dicom", table=tmp_path / "labels.csv")
    spots = {}
    for how in ("middle", "each"):
        records = load(asset, study(frames=how, size=32))
        spots[how] = [round(float(each.max()), 2) for each in records.inputs[0]]
        assert records.patient_count == 1
    assert spots == {"middle": [0.4], "each": [0.2, 0.4, 0.6]}


def test_a_window_of_the_study_or_the_pictures_own_values_take_the_place_of_the_files_window(tmp_path: Path) -> None:
    write(tmp_path / "a", GREY[..., 0], RescaleSlope=4, RescaleIntercept=-1000, WindowCenter=1, WindowWidth=2)
    hounsfield = np.round(GREY[..., 0] * 255) * 4 - 1000
    window = read_picture(tmp_path / "a", Image(size=32, intensity="window", window=(-500.0, -100.0)))
    np.testing.assert_allclose(window[0], np.clip((hounsfield + 500) / 400, 0, 1), atol=1e-5)
    own = read_picture(tmp_path / "a", Image(size=32, intensity="percentiles"))
    low, high = np.percentile(hounsfield, [1, 99])
    np.testing.assert_allclose(own[0], np.clip((hounsfield - low) / (high - low), 0, 1), atol=1e-5)


def study(**image: Any) -> Study:
    return studies.study(
        "small-cnn",
        {"asset": "a", "label": {"column": "finding", "classes": ["well", "ill"]}, "image": {"size": 16, **image}},
        name="pictures",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
    )


@pytest.mark.parametrize("model", ["small-cnn", "resnet18-gn"])
def test_a_colour_study_has_a_model_of_three_channels(model: str) -> None:
    contract = study(channels=3).contract
    colours = Study.model_validate({**contract, "model": {**contract["model"], "name": model}})
    assert next(build(colours).parameters()).shape[1] == 3
    assert Study.from_contract(colours.contract) == colours
    old = json.loads((CONTRACTS / "demo-xray-study.json").read_text())
    study_of_schema_1, data = {**old, "schema_version": 1}, old["data"]
    with pytest.raises(ValueError, match="channels: 3 came with schema 2"):
        Study.model_validate({**study_of_schema_1, "data": {**data, "image": {"size": 16, "channels": 3}}})


TAGS = {
    "BodyPartExamined": "Chest ", "ViewPosition": "PA", "Laterality": "L", "PresentationIntentType": "FOR PRESENTATION",
    "SeriesDescription": "Thorax p.a.", "StudyDate": "20190302", "AcquisitionDate": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        ({}, ""),
        ({"body_part": ("CHEST", "THORAX")}, ""),
        ({"body_part": ("KNEE",)}, "BodyPartExamined"),
        ({"view": ("PA", "AP")}, ""),
        ({"view": ("LL",)}, "ViewPosition"),
        ({"laterality": ("L",)}, ""),
        ({"laterality": ("R",)}, "Laterality"),
        ({"intent": "presentation"}, ""),
        ({"intent": "processing"}, "PresentationIntentType"),
        ({"description": ("thorax",)}, ""),
        ({"description": ("abdomen",)}, "SeriesDescription"),
        ({"since": "2019-03-02", "until": "2019-03-02"}, ""),
        ({"until": "2019-03-01"}, "date"),
    ],
)
def test_a_selection_takes_what_its_files_say_and_an_absent_tag_does_not_hold(
    tmp_path: Path, selection: dict[str, Any], reason: str
) -> None:
    wanted = Selection.model_validate(selection)
    header = read_header(write(tmp_path / "a", GREY[..., 0], **TAGS))
    if reason:
        with pytest.raises(Unusable, match=f"not selected: .*{reason}"):
            require_selected(header, wanted)
    else:
        require_selected(header, wanted)
    if selection:
        with pytest.raises(Unusable, match="not selected"):
            require_selected(
                read_header(write(tmp_path / "b", GREY[..., 0])), wanted.model_copy(update={"since": None})
            )


def reasons(records: ArrayDataset) -> dict[str, int]:
    return dict(records.report.set_aside.counts)


def test_study_and_asset_both_select(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    for number, (part, view) in enumerate([("CHEST", "PA"), ("CHEST", "LL"), ("KNEE", "PA")]):
        path = tmp_path / "dicom" / f"{number}"
        write(path, GREY[..., 0], BodyPartExamined=part, ViewPosition=view)
    (tmp_path / "labels.csv").write_text("patient,finding\np1,ill\n")
    spec = {"kind": "dicom", "path": "dicom", "table": "labels.csv", "select": {"body_part": ["CHEST"]}}
    records = load(DicomAsset.model_validate(spec).at(tmp_path), study(select={"view": ["PA"]}))
    assert len(records) == 1
    assert reasons(records) == {"not selected: ViewPosition": 1, "not selected: BodyPartExamined": 1}


def test_the_table_alone_says_whose_an_image_is_where_the_site_says_so(tmp_path: Path) -> None:
    """A research export: one constant PatientID in the files, the real people in the table."""
    (tmp_path / "dicom").mkdir()
    for number in range(4):
        write(tmp_path / "dicom" / f"{number}", GREY[..., 0] * (0.5 + number / 8), PatientID="ANONYMOUS")
    rows = "patient,finding,name\na,ill,0\na,ill,1\nb,well,2\n"
    (tmp_path / "labels.csv").write_text(rows)
    spec = {"kind": "dicom", "path": "dicom", "table": "labels.csv", "file": "name"}
    with pytest.raises(DataError, match="PatientID differs"):
        load(DicomAsset.model_validate(spec).at(tmp_path), study())
    records = load(DicomAsset.model_validate({**spec, "identity": "table"}).at(tmp_path), study())
    assert sorted(zip(records.patients.tolist(), records.labels[0].tolist(), strict=True)) == [(0, 1), (0, 1), (1, 0)]
    assert reasons(records) == {"no usable row in the label table": 1}
    with pytest.raises(ValueError, match="needs file, instance or series"):
        DicomAsset.model_validate({"kind": "dicom", "path": "a", "table": "b", "identity": "table"})


def test_a_table_may_have_a_row_for_each_series(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    for number in range(4):
        write(tmp_path / "dicom" / f"{number}", GREY[..., 0], SeriesInstanceUID=f"1.2.{number % 2}")
    (tmp_path / "labels.csv").write_text("patient,finding,uid\np1,ill,1.2.0\np1,well,1.2.1\n")
    asset = DicomAsset(kind="dicom", path=tmp_path / "dicom", table=tmp_path / "labels.csv", series="uid")
    records = load(asset, study())
    assert records.patient_count == 1
    assert sorted(records.labels[0].tolist()) == [0, 0, 1, 1]
