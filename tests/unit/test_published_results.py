"""What the sample studies reach on published sets, with the arithmetic of site and server but without their processes.

The same studies through real processes: ``python -m consilium_deploy.trial``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from consilium_client.baseline import test as metrics_of
from consilium_client.baseline import train_alone
from consilium_client.data import AssetSpec, Records, load
from consilium_client.desk import make_plan
from consilium_client.training.trainer import train
from consilium_deploy.real_data import main
from consilium_server.aggregation import UpdateSum
from consilium_server.optimizer import ServerOptimizer
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import Study

SOURCE = os.environ.get("CONSILIUM_DATA")
STUDIES = Path(__file__).parents[2] / "deploy" / "studies"
pytestmark = pytest.mark.skipif(not SOURCE, reason="CONSILIUM_DATA does not name the folder of published sets")
CPU = torch.device("cpu")


def contract(name: str, file: str, seed: int = 0, **privacy: float) -> Study:
    content = yaml.safe_load((STUDIES / name / file).read_text())
    content["model"]["seed"] = seed
    content["privacy"].update(privacy)
    if content["privacy"].get("mode") == "none":
        content["training"]["seed"] = seed
    return Study.model_validate(content)


def records(name: str, study: Study, folder: Path) -> dict[str, Records]:
    """Each site's records, and ``pooled``: those of all."""
    if not any(folder.iterdir()):
        assert main([name, "--source", str(SOURCE), "--out", str(folder)]) == 0
    template = yaml.safe_load((STUDIES / name / "site.yaml").read_text())["assets"][study.data.asset]
    asset: AssetSpec = TypeAdapter(AssetSpec).validate_python(template)
    return {path.name: load(asset.at(path), study) for path in sorted(folder.iterdir())}


def federated(study: Study, sites: Mapping[str, Records]) -> bytes:
    """The rounds of a study as sites and server compute them."""
    vector = to_vector(build(study))
    server = ServerOptimizer.from_study(study.aggregation.optimizer)
    plans = {site: make_plan(study, int(data.train.sum())) for site, data in sites.items()}
    for number in range(1, study.training.rounds + 1):
        model, total = pack(vector, study), UpdateSum(vector.size)
        for site, data in sites.items():
            result = train(model, study, data, plans[site], round=number, site=site, device=CPU)
            weight = float(result.patients) if study.aggregation.weighting == "patients" else 1.0
            total.fold(site, np.append(result.update.astype(np.float64) * weight, weight).astype("<f4").tobytes())
        vector = server.step(vector, total.mean())
    return pack(vector, study)


def values(study: Study, model: bytes, sites: Mapping[str, Records], metric: str) -> dict[str, Any]:
    return {site: metrics_of(study, model, data, "cpu")[metric] for site, data in sites.items()}


@pytest.mark.parametrize(
    ("file", "privacy", "mean", "pooled"),
    [
        ("study.yaml", {}, 0.72, 0.77),  # below, federating would not be worth its while: FLamby's best is .731 / .779
        ("study-dp.yaml", {"epsilon": 1.0}, 0.72, 0.77),
        ("study-dp.yaml", {"epsilon": 3.0}, 0.72, 0.77),
    ],
)
def test_heart_disease_over_five_seeds(
    tmp_path: Path, file: str, privacy: dict[str, float], mean: float, pooled: float
) -> None:
    found = []
    for seed in range(5):
        study = contract("heart-disease", file, seed, **privacy)
        data = records("heart-disease", study, tmp_path)
        sites = {site: part for site, part in data.items() if site != "pooled"}
        assert len(sites) == 4
        found.append(values(study, federated(study, sites), data, "accuracy"))
    assert np.mean([[run[site] for site in run if site != "pooled"] for run in found]) >= mean
    assert np.mean([run["pooled"] for run in found]) >= pooled


def test_physionet_2012_gains_from_federating(tmp_path: Path) -> None:
    """All held-back patients of the four units, by the federated model and by each unit's own."""
    study = contract("physionet2012", "study.yaml")
    data = records("physionet2012", study, tmp_path)
    sites = {site: part for site, part in data.items() if site != "pooled"}
    everybody = {"pooled": data["pooled"]}
    together = values(study, federated(study, sites), everybody, "auroc")["pooled"]
    alone = [values(study, train_alone(study, part, "cpu"), everybody, "auroc")["pooled"] for part in sites.values()]
    assert len(alone) == 4
    assert together >= np.mean(alone) + 0.02
