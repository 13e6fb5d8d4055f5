"""NIfTI files become the volumes that the same scan gives as a DICOM series; a damaged or doubtful one is set aside."""

from __future__ import annotations

import gzip
import resource
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import PicturesAsset
from consilium_client.data.head import look
from consilium_client.data.nifti_files import read_nifti, read_voxels
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable
from consilium_shared.study import Study

BODY = np.random.default_rng(5).integers(-900, 900, (6, 8, 10)).astype(np.int16)
"""Hounsfield units ``[to the head, to the back, to the left]``, 2 mm apart, in each slice 1 mm."""
LOW, HIGH = -1000.0, 1000.0
IMAGE = Image(size=10, depth=6, modality=("CT",), intensity="window", window=(LOW, HIGH))
EXPECTED = np.pad((BODY - LOW) / (HIGH - LOW), [(0, 0), (1, 1), (0, 0)])
RAS = BODY.transpose(2, 1, 0)[::-1, ::-1]
"""The body as NIfTI counts: to the right, to the front, to the head."""
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def write(path: Path, values: NDArray[Any] = RAS, affine: NDArray[np.float64] = AFFINE, two: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = (nibabel.Nifti2Image if two else nibabel.Nifti1Image)(values, affine)
    made.header.set_xyzt_units("mm")
    nibabel.save(made, path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL", "IRP"])
def test_any_order_and_direction_of_the_axes_gives_the_same_volume(tmp_path: Path, codes: str) -> None:
    turned = nibabel.Nifti1Image(RAS, AFFINE).as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
        )
    )
    path = write(tmp_path / "a.nii", np.asarray(turned.dataobj), turned.affine)
    np.testing.assert_allclose(read_nifti(path, IMAGE)[0], EXPECTED, atol=1e-5)
    found = read_voxels(path)
    assert found.spacing == (2.0, 1.0, 1.0)
    # Any voxel lies where the file says that it lies.
    place = np.array([4, 3, 2, 1])
    same = np.argwhere(np.asarray(turned.dataobj) == found.values[4, 3, 2])
    ends = {tuple(np.round(turned.affine @ [*each, 1], 6)) for each in same}
    assert tuple(np.round(found.affine @ place, 6)) in ends


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("two", [False, True])
def test_both_versions_packed_or_not(tmp_path: Path, name: str, two: bool) -> None:
    plain = write(tmp_path / name.lower(), two=two)
    np.testing.assert_allclose(read_nifti(plain.rename(tmp_path / name), IMAGE)[0], EXPECTED, atol=1e-5)


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    made = nibabel.Nifti1Image(((RAS + 1000) / 4).astype(np.float32), AFFINE)
    made.header.set_data_dtype(np.float32)
    nibabel.save(made, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([4, -1000], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii", IMAGE)[0], EXPECTED, atol=1e-4)
    with pytest.raises(Unusable, match="slope"):
        read_voxels(tmp_path / "a.nii", scaled=False)


def edited(path: Path, start: int, value: NDArray[Any]) -> Path:
    """The file with other bytes from ``start`` on."""
    content = bytearray(path.read_bytes())
    content[start : start + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    return path


DAMAGE: dict[str, tuple[int, Any, str]] = {
    "no orientation": (252, np.array([0, 0], "<i2"), "orientation"),
    "several volumes": (40, np.array([4, 10, 8, 3, 2], "<i2"), "one volume"),
    "a plane": (40, np.array([2, 10, 8], "<i2"), "one volume"),
    "too many voxels": (40, np.array([3, 30000, 30000, 30000], "<i2"), "voxels"),
    "more than the file holds": (40, np.array([3, 10, 8, 7], "<i2"), "cut off"),
    "colours": (70, np.array([128, 24], "<i2"), "single numbers"),
    "an unknown type": (70, np.array([999, 16], "<i2"), "NIfTI"),
    "voxels far away": (108, np.array([2.0**40], "<f4"), "place"),
    "voxels in the header": (108, np.array([0], "<f4"), "place"),
    "an affine of zeros": (280, np.zeros(12, "<f4"), "orientation"),
    "a spacing in metres": (123, np.array([1], "u1"), "unit"),
    "of two pieces": (344, np.frombuffer(b"ni1\0", "u1"), "one piece"),
    "another length of the header": (0, np.array([77], "<i4"), "NIfTI"),
}


@pytest.mark.parametrize(("start", "value", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_doubtful_or_damaged_file_is_set_aside_with_the_reason(
    tmp_path: Path, start: int, value: NDArray[Any], reason: str
) -> None:
    with pytest.raises(Unusable, match=reason):
        read_nifti(edited(write(tmp_path / "a.nii"), start, value), IMAGE)


def test_voxels_that_are_no_numbers_are_set_aside(tmp_path: Path) -> None:
    values = RAS.astype(np.float32)
    values[0, 0, 0] = np.nan
    with pytest.raises(Unusable, match="no numbers"):
        read_nifti(write(tmp_path / "a.nii", values), IMAGE)


def test_of_a_packed_file_no_more_is_unpacked_than_its_header_announces(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(whole) + gzip.compress(bytes(2**28)) * 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.testing.assert_allclose(read_nifti(tmp_path / "b.nii.gz", IMAGE)[0], EXPECTED, atol=1e-5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def study() -> Study:
    image = {"size": 10, "depth": 6, "modality": ["CT"], "intensity": "window", "window": [LOW, HIGH]}
    label = {"column": "finding", "classes": ["well", "ill"]}
    return studies.study("small-cnn", {"asset": "a", "label": label, "image": image})


def test_a_study_of_volumes_takes_them_by_their_paths_or_by_a_table(tmp_path: Path) -> None:
    for name in ("well/p1_a.nii.gz", "well/p1_b.nii", "ill/p2_a.nii.gz"):
        write(tmp_path / "v" / name)
    (tmp_path / "v/ill/p3_a.nii").write_bytes(b"nothing")
    (tmp_path / "v/ill/p4_a.png").write_bytes(b"not looked at")
    base: dict[str, Any] = {"kind": "pictures", "path": "v", "modality": "CT"}
    by_path = PicturesAsset.model_validate({**base, "layout": "{label}/{patient}_*"}).at(tmp_path)
    records = load(by_path, study())
    assert (len(records), records.patient_count) == (3, 2)
    assert records.report.set_aside.counts["not a NIfTI file, or a damaged one"] == 1
    assert "ill/p3_a.nii" in records.report.set_aside.first["label table: row without a usable image"]
    np.testing.assert_allclose(records.inputs[0][0, 0], EXPECTED, atol=1e-5)
    (tmp_path / "t.csv").write_text("patient,finding,file\np9,ill,well/p1_b.nii\n")
    by_table = PicturesAsset.model_validate({**base, "table": "t.csv"}).at(tmp_path)
    assert look(by_table) == 1
    assert load(by_table, study()).labels[0].tolist() == [1]


def test_a_study_of_pictures_finds_none_among_volumes(tmp_path: Path) -> None:
    write(tmp_path / "v" / "p1.nii")
    asset = PicturesAsset.model_validate({"kind": "pictures", "path": "v", "layout": "{patient}.nii"}).at(tmp_path)
    flat = studies.study("small-cnn", {"image": {"size": 16, "modality": []}})
    with pytest.raises(DataError, match="holds no file"):
        load(asset, flat)
