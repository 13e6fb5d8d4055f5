"""The trial of a real study: variants under names of their own, and means that are of all sites or of none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from consilium_deploy import trial
from consilium_shared import task
from consilium_shared.config import load_yaml
from consilium_shared.study import Study

HEART = task.studies()["heart-disease"]


def test_every_seed_and_epsilon_is_a_valid_study_under_a_name_of_its_own(tmp_path: Path) -> None:
    files = trial._variants(HEART / "study-dp.yaml", tmp_path, 2, [1.0, 0.5])
    studies = [load_yaml(file, Study) for file in files]
    assert len({study.study for study in studies}) == len({study.digest for study in studies}) == 4
    assert sorted({study.privacy.epsilon for study in studies if study.privacy.epsilon}) == [0.5, 1.0]
    assert {study.model.seed for study in studies} == {0, 1}


def test_a_mean_over_sites_is_of_all_sites_or_of_none() -> None:
    value = {"auroc": 0.8, "accuracy": 0.5, "f1": None}
    found = {"a": value, "b": {**value, "auroc": 0.6}, "pooled": value}
    means = trial._by_site(found, ["a", "b"])["mean_of_sites"]
    assert means == {"auroc": pytest.approx(0.7), "accuracy": 0.5, "f1": None}


def test_a_folder_that_is_no_old_trial_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "federation.yaml"
    kept.write_text("mine")
    assert trial.main(["heart-disease", "--data", str(tmp_path), "--work", str(tmp_path)]) == 2
    assert kept.read_text() == "mine"


def test_a_sites_file_points_at_its_own_folder(tmp_path: Path) -> None:
    template = yaml.safe_load((HEART / "site.yaml").read_text())
    placed = yaml.safe_load(trial._site(template, "va", tmp_path))
    assert placed["site"] == "va"
    assert placed["assets"]["heart-disease"]["path"] == str(tmp_path / "patients.csv")
