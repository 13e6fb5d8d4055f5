"""Published sets, where ``CONSILIUM_DATA`` names their folder: the readers agree with what is known about them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydantic import TypeAdapter
from pydicom.uid import ExplicitVRBigEndian, JPEGExtended12Bit
from tests.support.datasets import load

from consilium_client.data import AssetSpec
from consilium_client.data.dataset import ArrayDataset
from consilium_deploy.real_data import main
from consilium_shared import task
from consilium_shared.config import load_yaml
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, read_header
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.pixels import stored_values
from consilium_shared.preparation.selection import require_wanted
from consilium_shared.study import Study
from consilium_tasks.classification.schema import Data

SOURCE = os.environ.get("CONSILIUM_DATA")
STUDIES = task.studies()
pytestmark = pytest.mark.skipif(not SOURCE, reason="CONSILIUM_DATA does not name the folder of published sets")

ASSETS: dict[str, dict[str, Any]] = {
    "heart-disease": {"kind": "table", "path": "patients.csv"},
    "physionet2012": {"kind": "timeseries", "series": "vitals.csv", "table": "outcomes.csv", "time": "minutes"},
    "mitbih": {"kind": "timeseries", "series": "samples.parquet", "table": "beats.csv", "layout": "wide",
               "record": "beat", "time": "seconds", "time_unit": "seconds"},
    "pneumoniamnist": {"kind": "dicom", "path": "dicom", "table": "labels.csv"},
}  # fmt: skip


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(Path(str(SOURCE)) / name) as archive:
        archive.extractall(folder, filter="data")
    return folder


def sites(name: str, folder: Path, only: str = "*") -> tuple[Study, dict[str, ArrayDataset]]:
    assert main([name, "--source", str(SOURCE), "--out", str(folder)]) == 0
    study = load_yaml(STUDIES[name] / "study.yaml", Study)
    asset: AssetSpec = TypeAdapter(AssetSpec).validate_python(ASSETS[name])
    return study, {path.name: load(asset.at(path), study) for path in sorted(folder.glob(only))}


def halves(records: ArrayDataset) -> tuple[int, int]:
    return len(records.select(held_back=False)), len(records.select(held_back=True))


ANY = Image(size=32, channels=3, modality=(), frames="middle")


@pytest.fixture(scope="module")
def dicom_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield unpacked("dicom_dev.tar.xz", tmp_path_factory.mktemp("dicom")) / "dicom"


def test_every_foreign_dicom_file_decodes_to_the_known_pixels_or_is_set_aside(dicom_files: Path) -> None:
    expected = json.loads((dicom_files / "expected.json").read_text(encoding="utf-8"))
    outcomes: dict[str, int] = {"same": 0, "set aside": 0}
    different, shown = [], 0
    for name, known in expected.items():
        path = dicom_files / name
        if not path.is_file():
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = pydicom.dcmread(path, force=True)
                pixels = stored_values(dataset)
        except Unusable:
            outcomes["set aside"] += 1
            if "sha256" in known:
                different.append(name)
            continue
        if "YBR" in dataset.PhotometricInterpretation or int(dataset.get("NumberOfFrames") or 1) > 1:
            shown += 1  # colours come as RGB, and of a run one frame: not what is stored
            continue
        if dataset.file_meta.TransferSyntaxUID == JPEGExtended12Bit:
            continue  # lossy: decoders differ by a grey value, and the known one is another than DCMTK's and ours
        outcomes["same"] += 1
        if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
            pixels = pixels.astype(pixels.dtype.newbyteorder(">"))
        if hashlib.sha256(pixels.tobytes()).hexdigest() != known.get("sha256"):
            different.append(name)
    assert different == []
    assert outcomes["same"] > 90
    assert shown > 20
    assert outcomes["set aside"] > 50


def test_no_foreign_dicom_file_gets_another_exception_or_a_value_outside_0_and_1(dicom_files: Path) -> None:
    images = refused = 0
    for path in sorted(dicom_files.rglob("*")):
        if not path.is_file():
            continue
        try:
            require_wanted(read_header(path), ANY)
            image = read_picture(path, ANY)
        except Unusable:
            refused += 1
        else:
            images += 1
            assert image.shape == (3, 32, 32)
            assert 0 <= image.min() <= image.max() <= 1
    assert images > 50
    assert refused > 50


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_anywhere_is_read_or_set_aside(dicom_files: Path, tmp_path: Path, kept: float) -> None:
    cut = tmp_path / "cut.dcm"
    for path in sorted(dicom_files.rglob("*.dcm"))[::5]:
        data = path.read_bytes()
        cut.write_bytes(data[: int(len(data) * kept)])
        try:
            require_wanted(read_header(cut), ANY)
            read_picture(cut, ANY)
        except Unusable:
            continue


def test_a_ct_series_is_read_with_its_window_and_spacing(tmp_path: Path) -> None:
    files = sorted(unpacked("dicom_series_ct_ge.tar.xz", tmp_path).rglob("*.dcm"))
    table = tmp_path / "labels.csv"
    patient = str(pydicom.dcmread(files[0], stop_before_pixels=True).PatientID)
    table.write_text(f"patient,finding\n{patient},normal\n", encoding="utf-8")
    study = load_yaml(STUDIES["pneumoniamnist"] / "study.yaml", Study)
    study = Study.model_validate(
        {
            **study.contract,
            "data": {**study.contract["data"], "image": {"size": 64, "modality": ["CT"]}},
            "evaluation": {"split": 0.5},
        }
    )
    spec = {"kind": "dicom", "path": files[0].parent, "table": table}
    records = load(TypeAdapter(AssetSpec).validate_python(spec), study)
    assert records.inputs[0].shape == (28, 1, 64, 64)
    assert records.patient_count == 1
    assert not records.report.set_aside.counts
    assert all(image.std() > 0.05 for image in records.inputs[0])


def test_heart_disease_has_flambys_rows_columns_and_split(tmp_path: Path) -> None:
    _, records = sites("heart-disease", tmp_path)
    assert {name: halves(each) for name, each in records.items()} == {
        "cleveland": (199, 104),
        "hungarian": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
        "pooled": (486, 254),
    }
    assert all(each.inputs[0].shape[1] == 15 and not each.report.set_aside.counts for each in records.values())


def test_physionet_2012_gives_a_series_for_every_stay_that_has_one(tmp_path: Path) -> None:
    study, records = sites("physionet2012", tmp_path)
    assert {name: len(each) for name, each in records.items()} == {
        "ccu": 577, "csru": 874, "micu": 1478, "sicu": 1068, "pooled": 3997,
    }  # fmt: skip
    assert records["micu"].report.set_aside.counts == {"no sample in the series table": 3}
    assert isinstance(study.data, Data) and study.data.series is not None
    assert records["pooled"].inputs[0].shape == (3997, 48, 3 * len(study.data.series.variables))
    assert int(records["pooled"].labels[0].sum()) == 554
    held_back = {name: halves(each)[1] for name, each in records.items()}
    assert held_back.pop("pooled") == sum(held_back.values())


def test_mitbih_tests_on_patients_who_were_never_trained_on(tmp_path: Path) -> None:
    _, records = sites("mitbih", tmp_path)
    assert [each.patient_count for each in records.values()] == [22, 6, 6, 5, 5]
    assert [int((~each.train).sum()) for each in records.values()] == [4, 1, 1, 1, 1]
    assert sum(len(each) for each in records.values()) == 2 * 50_992
    masks = records["site-a"].inputs[0][:, :, 1]
    assert masks.all()


def test_pneumoniamnist_survives_the_way_through_dicom(tmp_path: Path) -> None:
    _, records = sites("pneumoniamnist", tmp_path, only="pooled")
    pooled = records["pooled"]
    assert halves(pooled) == (4708, 524)
    of_sites = [len(path.read_text(encoding="utf-8").splitlines()) - 1 for path in tmp_path.glob("site-*/labels.csv")]
    assert (len(of_sites), sum(of_sites)) == (4, 5232)
    with np.load(io.BytesIO((Path(str(SOURCE)) / "pneumoniamnist_trainval.npz").read_bytes())) as data:
        first = data["train_images"][0]
    np.testing.assert_allclose(pooled.inputs[0][0, 0] * 255, first, atol=1e-3)
