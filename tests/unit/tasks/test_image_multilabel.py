from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tests.support import assets
from tests.unit.tasks.suite import TaskSuite

from consilium_client.data import load
from consilium_shared import study_file, task
from consilium_shared.metrics import metrics
from consilium_tasks.image_multilabel.counts import FindingsLayout, count
from consilium_tasks.image_multilabel.loss import known_cross_entropy

CPU = torch.device("cpu")


class TestImageMultilabel(TaskSuite):
    name = "image-multilabel"


def test_a_finding_that_is_unknown_teaches_nothing() -> None:
    logits = torch.zeros(3, 2, requires_grad=True)
    losses = known_cross_entropy(None, CPU)(logits, torch.tensor([1, -1, -1]), torch.tensor([0, 0, -1]))
    assert torch.allclose(losses / np.log(2), torch.tensor([1.0, 1.0, 0.0]))
    losses.sum().backward()
    assert torch.equal(logits.grad.sign(), torch.tensor([[-1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))  # type: ignore[union-attr]


def test_a_weight_counts_where_its_finding_is_present() -> None:
    loss = known_cross_entropy((3.0, 1.0), CPU)
    found = loss(torch.zeros(2, 2), torch.tensor([1, 0]), torch.tensor([-1, -1]))
    assert torch.allclose(found / np.log(2), torch.tensor([3.0, 1.0]))


def test_an_unknown_finding_is_counted_in_no_score_of_its_label_and_the_image_stays() -> None:
    layout = FindingsLayout(("a", "b"), frozenset({"auroc", "prevalence"}), noised=False)
    found = count(np.array([[1, 1], [0, 0], [-1, 0]]), np.array([[0.9, 0.9], [0.1, 0.1], [0.99, 0.95]]), layout)
    values = metrics(found, layout)
    assert (values["n"], values["auroc"]) == (3, (1.0 + 0.5) / 2)
    assert values["prevalence"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_an_image_of_which_no_finding_is_known_is_set_aside(tmp_path: Path) -> None:
    study = study_file.read(task.get("image-multilabel").sample)
    asset = assets.write(study, tmp_path)
    table = assets.tables(asset)[0]
    rows = pd.read_csv(table, dtype=str)
    rows.loc[3, ["effusion", "nodule"]] = None
    rows.loc[5, ["effusion", "nodule", "cardiomegaly"]] = None
    rows.to_csv(table, index=False)
    found = load(asset, study)
    assert len(found) == 59
    assert found.report.set_aside.counts["label table: none of the study's targets"] == 1
    assert sum(int(each[0] == -1) for each in (found.targets(np.array([3]))[:2])) == 2
