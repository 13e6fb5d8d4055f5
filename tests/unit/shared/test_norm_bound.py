"""The norm bound that a study file does not name follows from its plan, holds no honest update, and is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.records import dataset
from tests.support.site import CONTRACT

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training.trainer import train
from consilium_shared import study_file, task
from consilium_shared.config import read_yaml
from consilium_shared.models import build
from consilium_shared.models.vector import pack, study_of, to_vector
from consilium_shared.norm_bound import UNRULED, derived_norm_bound
from consilium_shared.privacy.plan import plan_of
from consilium_shared.study import Study

CPU = torch.device("cpu")
SAMPLE = task.studies()["demo-xray"] / "study.yaml"


def study(privacy: dict[str, Any] | None = None, **training: Any) -> Study:
    return Study.model_validate(
        {
            **CONTRACT,
            "model": {"name": "mlp", "hidden": 16},
            "training": {**CONTRACT["training"], "steps_per_round": 6, **training},
            "privacy": CONTRACT["privacy"] if privacy is None else privacy,
            "evaluation": {},
        }
    )


def records(patients: int, size: float) -> ArrayDataset:
    """All of one class, far from what the model says: gradients that point the same way."""
    draw = np.random.default_rng(patients)
    return dataset(
        inputs=(size * draw.random((patients, 2))).astype(np.float32),
        statics=None,
        labels=np.ones(patients, dtype=np.int64),
        patients=np.arange(patients),
        patient_count=patients,
        train=np.ones(patients, dtype=bool),
    )


def longest(given: Study, patients: int, size: float) -> float:
    start, plan = pack(to_vector(build(given)), given), plan_of(given, patients)
    norms = [
        np.linalg.norm(
            train(
                start, given, records(patients, size), plan, round=1, site="north", device=CPU, seed=bytes([run] * 32)
            ).update
        )
        for run in range(4)
    ]
    return float(max(norms))


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": {"lr": 0.5}},
        {"optimizer": {"lr": 0.5, "momentum": 0.9}},
        {"optimizer": {"name": "adam", "lr": 0.01}},
        {"optimizer": {"lr": 0.2, "weight_decay": 0.1}},
        {"optimizer": {"lr": 0.5}, "adaptive_clipping": {"quantile": 0.5, "rate": 0.2}},
        {"optimizer": {"lr": 0.5}, "proximal": 0.5},
    ],
)
@pytest.mark.parametrize("patients", [16, 60, 400])
def test_no_honest_private_update_is_scaled_down(training: dict[str, Any], patients: int) -> None:
    """Whatever the records and their number, the smallest site's included, whose noise is the largest."""
    given = study(**training)
    bound = derived_norm_bound(given)
    found = max(longest(given, patients, size) for size in (0.1, 100.0))
    assert found <= bound
    if patients == 16:
        assert bound < 40 * found, "it would hold nothing"


def test_more_noise_more_steps_or_a_higher_rate_give_a_larger_bound() -> None:
    plain = derived_norm_bound(study())
    assert derived_norm_bound(study({**CONTRACT["privacy"], "epsilon": 0.5})) > plain
    assert derived_norm_bound(study(steps_per_round=24)) > plain
    assert derived_norm_bound(study(optimizer={"lr": 0.4})) == pytest.approx(4 * plain, rel=0.1)
    assert derived_norm_bound(study({**CONTRACT["privacy"], "clipping_norm": 3.0})) == pytest.approx(3 * plain, rel=0.1)


def test_without_privacy_it_is_what_long_gradients_give_and_never_above_what_it_was() -> None:
    none = {"mode": "none"}
    assert derived_norm_bound(study(none, optimizer={"lr": 0.1}, steps_per_round=20)) == 6.0
    assert derived_norm_bound(study(none, optimizer={"lr": 10.0}, steps_per_round=100)) == UNRULED


def test_a_file_without_a_bound_gives_a_contract_with_the_derived_one(tmp_path: Path) -> None:
    given = study_file.read(SAMPLE)
    assert given.contract["aggregation"]["norm_bound"] == derived_norm_bound(given) != UNRULED
    named = tmp_path / "study.yaml"
    named.write_text(SAMPLE.read_text().replace("momentum: 0.5}", "momentum: 0.5}, norm_bound: 7.5"))
    assert study_file.read(named).aggregation.norm_bound == 7.5


@pytest.mark.parametrize("older", [{"schema_version": 1}, {}, {"norm_bound": 88.0}])
def test_the_file_of_a_study_that_another_release_started_is_still_that_study(
    tmp_path: Path, older: dict[str, Any]
) -> None:
    """Where it is run again, and where its model is tested."""
    sample = tmp_path / "sample.yaml"  # without the key that older releases have not
    sample.write_text(SAMPLE.read_text().replace(" split_label: demo-xray,", ""))
    content = read_yaml(sample)
    bound = older.pop("norm_bound", UNRULED)
    rules = {**content["aggregation"], "norm_bound": bound}
    before = Study.model_validate({**content, **older, "aggregation": rules})
    model = pack(to_vector(build(before)), before)
    assert study_of(model) == before.digest
    assert study_file.read_as(sample, study_of(model), bound).contract == before.contract
    changed = tmp_path / "study.yaml"
    changed.write_text(sample.read_text().replace("rounds: 6", "rounds: 7"))
    assert study_file.read_as(changed, before.digest, bound).digest == study_file.read(changed).digest != before.digest


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"null"]
)
def test_bytes_that_are_no_model_name_no_study(content: bytes) -> None:
    assert study_of(content) is None
