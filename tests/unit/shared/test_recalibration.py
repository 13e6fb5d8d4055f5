"""A recalibrated model says probabilities that happen, ranks as before, and is left alone where counts do not tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tests.support import published
from tests.support.published import TABLE
from tests.support.site import CONTRACT
from tests.support.studies import study

from consilium_serve.model import Model
from consilium_server.export.bundle import contents
from consilium_server.study.figures import Figures
from consilium_shared.errors import PeerError
from consilium_shared.models import forms, onnx_graph
from consilium_shared.protocol.bundle import open_bundle, zipped
from consilium_shared.protocol.summand import Opened
from consilium_shared.recalibration import Recalibration
from consilium_shared.study import Study
from consilium_tasks.classification.counts import ClassLayout, count

ASKED = ["auroc", "calibration-intercept", "calibration-slope"]
SITES = 4


def figures(**evaluation: Any) -> Figures:
    contract = json.loads(json.dumps(CONTRACT))
    contract["evaluation"] |= {"metrics": ASKED, "recalibrate": True, "epsilon": 1.5, "every": 3, **evaluation}
    return Figures(Study.model_validate(contract))


def counted(of: Figures, records: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sites' counts with each one's noise, of a model that is far too low and too sure; outcomes and log odds."""
    draw, layout = np.random.default_rng(seed), of.layout
    assert isinstance(layout, ClassLayout)
    truth = draw.normal(-1.5, 1.2, records)
    labels, logits = (draw.random(records) < 1 / (1 + np.exp(-truth))).astype(np.int64), (truth - 1.0) / 0.6
    scores = 1 / (1 + np.exp(-logits))
    counts = count(labels, np.stack([1 - scores, scores], 1), layout)
    if of.noise is not None:
        each = np.concatenate([np.full(layout.sizes[p], d) for p, d in layout.deviations(of.noise).items()])
        counts = counts + sum(np.rint(draw.normal(0, each)).astype(np.int64) for _ in range(SITES))
    return counts, labels, logits


def recalibration(of: Figures, counts: np.ndarray) -> Recalibration | None:
    found, why = of.of(Opened(np.zeros(0, np.float32), 0, SITES, counts, None))
    assert why is None
    return Recalibration.read(found)


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_come_true_after_it_though_the_counts_have_noise(seed: int) -> None:
    of = figures()
    counts, labels, logits = counted(of, 6000, seed)
    found = recalibration(of, counts)
    assert found is not None
    assert found.intercept == pytest.approx(1.0, abs=0.45)  # noise draws the slope towards 0
    assert found.slope == pytest.approx(0.6, abs=0.2)
    after = found.intercept + found.slope * logits
    before, mean = (1 / (1 + np.exp(-each)) for each in (logits, after))
    assert abs(before.mean() - labels.mean()) > 0.07
    assert abs(mean.mean() - labels.mean()) < 0.03
    assert np.array_equal(np.argsort(after, kind="stable"), np.argsort(logits, kind="stable"))


def test_where_the_noise_drowns_the_counts_the_model_is_left_as_it_is() -> None:
    of = figures(epsilon=0.05)
    assert recalibration(of, counted(of, 60)[0]) is None


def test_a_study_that_does_not_ask_for_it_has_none() -> None:
    of = figures(recalibrate=False)
    assert recalibration(of, counted(of, 6000)[0]) is None


def test_bundle_and_service_answer_with_recalibrated_probabilities(tmp_path: Path) -> None:
    home, given = published.coordinator(tmp_path / "coordinator"), published.study("logistic", TABLE)
    said = Recalibration(0.75, 0.5)
    model = published.publish(home, given, recalibration=said._asdict())
    files = contents(model, home.coordinator())
    draw = np.random.default_rng(3)
    inputs = {name: draw.normal(size=(5, *form)).astype(np.float32) for name, form in forms.inputs(given).items()}
    plain = onnx_graph.answers(published.weights(given), given, inputs)["logits"].astype(np.float64)
    expected = 1 / (1 + np.exp(-(0.75 + 0.5 * (plain[:, 1] - plain[:, 0]))))
    graph = onnxruntime.InferenceSession(files["model.onnx"]).run(["probabilities"], inputs)[0]
    assert graph[:, 1] == pytest.approx(expected, abs=1e-5)
    assert b"recalibrated" in files["model.html"]
    (tmp_path / "bundle.zip").write_bytes(zipped(files))
    served = Model(open_bundle(tmp_path / "bundle.zip", home.coordinator().public.fingerprint))
    assert served.recalibrated
    assert served.run(inputs)["probabilities"][:, 1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"intercept": 1.0}, {"intercept": math.nan, "slope": 1.0}, {"intercept": 0.0, "slope": -1.0}, 3, "x"]
)
def test_a_card_with_anything_else_in_its_place_is_refused(wrong: Any) -> None:
    with pytest.raises(PeerError, match="recalibration"):
        Recalibration.read({"recalibration": wrong})


def test_a_study_without_the_table_or_with_three_classes_cannot_ask_for_it() -> None:
    for classes, asked in ((["0", "1"], ["auroc"]), (["0", "1", "2"], ASKED)):
        with pytest.raises(ValueError, match=r"evaluation\.recalibrate"):
            study(
                data={"features": [{"name": "a"}], "label": {"column": "y", "classes": classes}},
                evaluation={"metrics": asked, "recalibrate": True},
            )
