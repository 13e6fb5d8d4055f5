"""Series become volumes: ordered by where their slices lie, in the modality's unit; an incomplete one is set aside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.sequence import Sequence as Items
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data import made, sources
from consilium_client.data.asset import DicomAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.dicom import PIXEL_BYTES
from consilium_client.prepared.recipe import Source
from consilium_client.training.neighbours import dependence
from consilium_client.training.trainer import check_independence
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.inputs import Image
from consilium_shared.models import build
from consilium_shared.preparation import volume
from consilium_shared.preparation.foreign import Unusable, read_whole
from consilium_shared.preparation.volume import read_volume
from consilium_shared.study import Study

BODY = np.random.default_rng(5).integers(-900, 900, (6, 8, 10)).astype(np.int16)
"""Hounsfield units of a body ``[to the head, to the back, to the left]``, 2 mm apart, in each slice 1 mm."""
LOW, HIGH = -1000.0, 1000.0
IMAGE = Image(size=10, depth=6, modality=("CT",), intensity="window", window=(LOW, HIGH))
EXPECTED = np.pad((BODY - LOW) / (HIGH - LOW), [(0, 0), (1, 1), (0, 0)])
AXIAL = ([1, 0, 0], [0, 1, 0])


def write(path: Path, values: NDArray[np.int16], position: Sequence[float], **tags: Any) -> Path:
    """One slice in Hounsfield units."""
    write_radiograph(path, np.zeros(values.shape), tags.pop("PatientID", "p1"), path.name, Scanner(12))
    dataset = pydicom.dcmread(path)
    dataset.Modality, dataset.SeriesInstanceUID = "CT", "1.2.3"
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = (values + 1024).astype("<u2").tobytes()
    dataset.ImagePositionPatient = [float(each) for each in position]
    dataset.ImageOrientationPatient = [*AXIAL[0], *AXIAL[1]]
    dataset.PixelSpacing = [1, 1]
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def series(folder: Path, **tags: Any) -> list[Path]:
    """An axial series whose files' names and instance numbers say nothing about where slices lie."""
    folder.mkdir(parents=True, exist_ok=True)
    order = [3, 0, 5, 1, 4, 2]
    return [
        write(folder / f"{name}.dcm", BODY[place], (0, 0, 2.0 * place - 40), InstanceNumber=name, **tags)
        for name, place in enumerate(order)
    ]


def test_slices_are_ordered_by_where_they_lie_and_their_values_are_the_modalitys(tmp_path: Path) -> None:
    volume = read_volume(series(tmp_path), IMAGE)
    assert volume.shape == IMAGE.shape
    np.testing.assert_allclose(volume[0], EXPECTED, atol=1e-5)
    np.testing.assert_array_equal(read_volume(series(tmp_path)[::-1], IMAGE), volume)


def test_other_planes_and_directions_give_the_same_volume(tmp_path: Path) -> None:
    """Coronal slices from front to back, from the head down; then axial ones from the head down, mirrored."""
    upright = read_volume(series(tmp_path / "axial"), IMAGE)
    (tmp_path / "c").mkdir()
    coronal = [
        write(
            tmp_path / "c" / f"{place}", BODY[::-1, place], (0, place, 10),
            ImageOrientationPatient=[1, 0, 0, 0, 0, -1], PixelSpacing=[2, 1],
        )
        for place in range(8)
    ]  # fmt: skip
    np.testing.assert_allclose(read_volume(coronal, IMAGE), upright, atol=1e-6)
    (tmp_path / "m").mkdir()
    mirrored = [
        write(
            tmp_path / "m" / f"{place}",
            BODY[place, :, ::-1],
            (9, 0, 2 * place),
            ImageOrientationPatient=[-1, 0, 0, 0, 1, 0],
        )
        for place in range(6)
    ]
    np.testing.assert_allclose(read_volume(mirrored, IMAGE), upright, atol=1e-6)


def test_frames_of_an_enhanced_file_are_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "a", BODY[0], (0, 0, 0))
    dataset = pydicom.dcmread(path)
    order = [4, 1, 0, 5, 3, 2]
    dataset.PixelData = (BODY[order] + 1024).astype("<u2").tobytes()
    dataset.NumberOfFrames = 6
    shared, item = pydicom.Dataset(), pydicom.Dataset
    orientation, measures, rescale = item(), item(), item()
    orientation.ImageOrientationPatient, measures.PixelSpacing = [*AXIAL[0], *AXIAL[1]], [1, 1]
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([orientation]), Items([measures])
    shared.PixelValueTransformationSequence = Items([rescale])
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    groups = []
    for place in order:
        group, position = item(), item()
        position.ImagePositionPatient = [0, 0, 2 * place]
        group.PlanePositionSequence = Items([position])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Items(groups)
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(dataset, keyword)
    dataset.save_as(path)
    np.testing.assert_allclose(read_volume([path], IMAGE)[0], EXPECTED, atol=1e-5)


def test_percentiles_take_away_a_scale_that_means_nothing(tmp_path: Path) -> None:
    own = IMAGE.model_copy(update={"intensity": "percentiles", "window": None})
    plain = read_volume(series(tmp_path / "a"), own)
    scaled = read_volume(series(tmp_path / "b", RescaleSlope=700, RescaleIntercept=5), own)
    np.testing.assert_allclose(plain, scaled, atol=1e-4)


def without(paths: list[Path], place: int) -> list[Path]:
    return [path for path in paths if pydicom.dcmread(path).ImagePositionPatient[2] != 2.0 * place - 40]


def change(paths: list[Path], **tags: Any) -> list[Path]:
    dataset = pydicom.dcmread(paths[2])
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.save_as(paths[2])
    return paths


INCOMPLETE: dict[str, Any] = {
    "distances between slices differ": lambda paths: without(paths, 2),
    "several slices at one place": lambda paths: change(paths, ImagePositionPatient=[0, 0, -40]),
    "several orientations": lambda paths: change(paths, ImageOrientationPatient=[0, 1, 0, 0, 0, 1]),
    "orientations or spacings": lambda paths: change(paths, PixelSpacing=[2, 2]),
    "no ImagePositionPatient": lambda paths: change(paths, ImagePositionPatient=None),
    "a series of one slice": lambda paths: paths[:1],
    "RescaleSlope is 0": lambda paths: change(paths, RescaleSlope=0),
}


@pytest.mark.parametrize(("reason", "damage"), INCOMPLETE.items(), ids=INCOMPLETE)
def test_a_series_that_is_no_whole_volume_is_set_aside(tmp_path: Path, reason: str, damage: Any) -> None:
    with pytest.raises(Unusable, match=reason):
        read_volume(damage(series(tmp_path)), IMAGE)


def study(model: str = "small-cnn", **image: Any) -> Study:
    given = {"size": 16, "depth": 8, "modality": ["CT"], "intensity": "window", "window": [LOW, HIGH], **image}
    return studies.study(
        model,
        {"asset": "a", "label": {"column": "finding", "classes": ["well", "ill"]}, "image": given},
        name="volumes",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
    )


def reasons(records: ArrayDataset) -> dict[str, int]:
    return dict(records.report.set_aside.counts)


@pytest.mark.parametrize(
    ("bound", "most", "reason", "read"),
    [
        ("VOXELS", 3 * BODY[0].size, "more than 240 voxels", 4),
        ("SERIES_BYTES", 2**20, "a series of more than 1 MiB", 2),
        ("SLICES", 4, "more than 4 slices", 5),
    ],
)
def test_a_series_without_end_is_refused_before_the_rest_of_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int, reason: str, read: int
) -> None:
    paths = series(tmp_path, **({"ImageComments": "x" * 2**19} if bound == "SERIES_BYTES" else {}))
    opened: list[Path] = []

    def counted(path: Path) -> pydicom.Dataset:
        opened.append(path)
        return read_whole(path)

    monkeypatch.setattr(volume, "read_whole", counted)
    monkeypatch.setattr(volume, bound, most)
    with pytest.raises(Unusable, match=reason):
        read_volume(paths, IMAGE)
    assert len(opened) == read


def test_each_series_of_a_patient_is_a_record(tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    series(folder / "x", SeriesInstanceUID="1.1", GantryDetectorTilt=12)
    series(folder / "y", SeriesInstanceUID="1.2")
    series(folder / "z", SeriesInstanceUID="1.3", PatientID="p2")[0].unlink()
    write(folder / "scout", BODY[0], (0, 0, 0), SeriesInstanceUID="1.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            dataset = pydicom.dcmread(path)
            dataset.SOPInstanceUID = f"9.{number}"
            dataset.save_as(path)
    (tmp_path / "labels.csv").write_text("patient,finding\np1,ill\np2,well\n")
    records = load(DicomAsset(kind="dicom", path=folder, table=tmp_path / "labels.csv"), study())
    assert records.inputs[0].shape == (2, 1, 8, 16, 16)
    assert records.patient_count == 1
    assert reasons(records) == {
        "a localizer, where the study takes volumes": 1,
        "distances between slices differ: some are missing, or the scan has several thicknesses": 1,
        "label table: row without a usable image": 1,
    }
    assert records.report.notes.counts == {
        "series of a tilted gantry: its slices are shifted against each other": 1,
    }


def test_what_preparing_a_series_takes_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Source] = []

    def make_all(recipe: Any, of: list[Source], *others: Any) -> Any:
        told.extend(of)
        return made.make_all(recipe, of, *others)

    monkeypatch.setattr(sources, "make_all", make_all)
    series(tmp_path / "dicom")
    for number, path in enumerate((tmp_path / "dicom").iterdir()):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = f"9.{number}"
        dataset.save_as(path)
    (tmp_path / "labels.csv").write_text("patient,finding\np1,ill\n")
    load(DicomAsset(kind="dicom", path=tmp_path / "dicom", table=tmp_path / "labels.csv"), study())
    files = sum(path.stat().st_size for path in (tmp_path / "dicom").iterdir())
    assert [source.memory for source in told] == [files + PIXEL_BYTES * BODY.size]


def test_a_model_of_three_dimensions_can_be_trained_with_privacy() -> None:
    found = study()
    assert build(found)(torch.zeros(2, 1, 8, 16, 16)).shape == (2, 2)
    check_independence(found)
    assert dependence(found, torch.device("cpu"), "book-keeping", 4) == ""


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ({"intensity": "file", "window": None}, "share one scale"),
        ({"channels": 3}, "one channel"),
        ({"window": [3, 3]}, "shown black"),
        ({"window": None}, "window goes with"),
    ],
)
def test_a_volume_that_makes_no_sense_is_refused_in_the_contract(image: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        study(**image)
    with pytest.raises(ValueError, match="depth takes the model small-cnn"):
        study("resnet18-gn")


RAMP = np.arange(9, dtype=np.int16)[:, None, None] * 100 + np.zeros((1, 8, 10), np.int16)
"""Slices whose values grow with their place: what lies between two is known."""


def at(folder: Path, places: list[int]) -> list[Path]:
    """Slices of the ramp at these places, 2 mm a place."""
    folder.mkdir()
    return [write(folder / f"{place}", RAMP[place], (0, 0, 2.0 * place)) for place in places]


@pytest.mark.parametrize("places", [[0, 1, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 6, 8], [0, 1, 2, 3, 6, 7, 8]])
def test_slices_between_are_made_of_their_neighbours_where_the_study_says_so(tmp_path: Path, places: list[int]) -> None:
    image = IMAGE.model_copy(update={"depth": 9, "gaps": "interpolate"})
    whole = read_volume(at(tmp_path / "whole", list(range(9))), image)
    np.testing.assert_allclose(read_volume(at(tmp_path / "gap", places), image), whole, atol=1e-5)
    with pytest.raises(Unusable, match="distances"):
        read_volume(at(tmp_path / "again", places), IMAGE)


def test_a_gap_too_wide_to_be_filled_is_set_aside(tmp_path: Path) -> None:
    image = IMAGE.model_copy(update={"gaps": "interpolate"})
    with pytest.raises(Unusable, match="invented"):
        read_volume(at(tmp_path / "gap", [0, 1, 2, 3, 8]), image)


def test_gaps_go_with_volumes_alone() -> None:
    with pytest.raises(ValueError, match="goes with depth"):
        Image(size=16, gaps="interpolate")
