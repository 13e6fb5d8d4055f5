"""What the sample studies reach on published sets, with the arithmetic of site and server but without their processes.

The same studies through real processes: ``python -m consilium_deploy.trial``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from consilium_client.commands.baseline import train_alone
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import DpSgdEvent
from heart_disease_dp import Bench, flamby_noise
from one_process import contract, federated, hospitals, plans, records, values

SOURCE = Path(os.environ.get("CONSILIUM_DATA", ""))
pytestmark = pytest.mark.skipif(
    "CONSILIUM_DATA" not in os.environ, reason="CONSILIUM_DATA does not name the folder of published sets"
)


@pytest.mark.parametrize(
    ("file", "privacy"),
    [
        ("study.yaml", {}),
        ("study-dp.yaml", {"epsilon": 1.0}),
        ("study-dp.yaml", {"epsilon": 3.0}),
    ],
)
def test_heart_disease_over_five_seeds(tmp_path: Path, file: str, privacy: dict[str, float]) -> None:
    bench = Bench(SOURCE, tmp_path, seeds=5)
    assert len(bench.sites) == 4
    found = bench.accuracy(file, **privacy)
    assert found["mean_of_centres"][0] >= 0.72  # below, federating would not be worth its while:
    assert found["pooled"][0] >= 0.77  # FLamby's best is .731 / .779


@pytest.mark.parametrize("patients", [199, 172, 30, 85])
def test_the_noise_that_flamby_takes_holds_for_the_steps_it_counts_and_not_for_those_it_runs(patients: int) -> None:
    rate, sigma = flamby_noise(1.0, 1e-3, patients)
    assert epsilon([DpSgdEvent(rate, sigma, round(15 / rate))], 1e-3) <= 1.0
    assert epsilon([DpSgdEvent(rate, sigma, 1500)], 1e-3) > 1.2


def test_a_delta_that_is_no_promise_for_a_hospital_gives_no_figure_but_the_reason(tmp_path: Path) -> None:
    found = Bench(SOURCE, tmp_path, seeds=1).private(1.0, 0.1)
    assert "publishing one whole record at random would satisfy it" in found["refused"]


def test_physionet_2012_gains_from_federating(tmp_path: Path) -> None:
    """All held-back patients of the four units, by the federated model and by each unit's own."""
    study = contract("physionet2012", "study.yaml")
    data = records("physionet2012", study, SOURCE, tmp_path)
    sites, everybody = hospitals(data), {"pooled": data["pooled"]}
    model = federated(study, sites, plans("physionet2012", study, sites))
    together = values(study, model, everybody, "auroc")["pooled"]
    alone = [values(study, train_alone(study, part, "cpu"), everybody, "auroc")["pooled"] for part in sites.values()]
    assert len(alone) == 4
    assert together >= np.mean(alone) + 0.02
