"""The sample studies are valid, and the demonstration's generated data serves its two studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydantic import TypeAdapter
from tests.support.datasets import load

from consilium_client.data import AssetSpec
from consilium_client.data.dataset import ArrayDataset
from consilium_deploy.synthetic import HOSPITALS, POOLED, generate
from consilium_shared import task
from consilium_shared.config import load_yaml
from consilium_shared.study import Study

STUDIES = task.studies()
ASSETS: dict[str, dict[str, Any]] = {
    "demo-xray": {"kind": "dicom", "path": "synthetic-radiographs", "table": "synthetic-labels.csv"},
    "demo-vitals": {"kind": "timeseries", "series": "synthetic-vitals.csv", "table": "synthetic-outcomes.csv",
                    "time": "minutes"},
}  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted(folder / "study.yaml" for folder in STUDIES.values()), ids=lambda path: path.parent.name
)
def test_every_sample_study_is_valid_and_named_after_its_folder(path: Path) -> None:
    assert load_yaml(path, Study).study == path.parent.name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder)
    return folder


def records(data: Path, study: str, site: str) -> ArrayDataset:
    asset: AssetSpec = TypeAdapter(AssetSpec).validate_python(ASSETS[study])
    return load(asset.at(data / site), load_yaml(STUDIES[study] / "study.yaml", Study))


@pytest.mark.parametrize("study", sorted(ASSETS))
def test_all_hospitals_serve_the_study_and_the_pooled_copy_holds_them_all(data: Path, study: str) -> None:
    each = [records(data, study, hospital.folder) for hospital in HOSPITALS]
    assert all(0.2 < site.labels[0].mean() < 0.6 and site.patient_count > 150 for site in each)
    pooled = records(data, study, POOLED)
    assert len(pooled) == sum(len(site) for site in each)
    assert int((~pooled.train).sum()) == sum(int((~site.train).sum()) for site in each)


def test_every_hospital_has_files_that_must_be_set_aside(data: Path) -> None:
    for hospital in HOSPITALS:
        aside = records(data, "demo-xray", hospital.folder).report.set_aside.counts
        assert {"not a DICOM file", "modality CT", "pixel data missing, damaged or in an unknown encoding"} <= set(
            aside
        )


def test_everything_generated_says_that_it_is_synthetic(data: Path) -> None:
    for path in data.rglob("*"):
        assert path.is_dir() or "synthetic" in path.relative_to(data).as_posix().lower()
    for path in list(data.rglob("SYNTHETIC-*.dcm"))[::50]:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert str(header.PatientID).startswith("SYNTHETIC-")
        assert "Synthetic" in header.InstitutionName
        assert "SYNTHETIC" in header.ImageComments
    for path in data.rglob("*.csv"):
        assert pd.read_csv(path)["patient"].str.startswith("SYNTHETIC-").all()


def test_the_same_seed_gives_the_same_data(data: Path, tmp_path: Path) -> None:
    generate(tmp_path)
    np.testing.assert_array_equal(
        records(data, "demo-xray", "hospital-b").inputs[0], records(tmp_path, "demo-xray", "hospital-b").inputs[0]
    )
