"""A trained model as an ONNX graph, which runs without torch, and the check that it answers as torch does.

The graph takes prepared inputs of any number of records, and gives their logits and scores, named as ``models.forms``
says: a classifier's are ``logits`` and ``probabilities``, both ``[B, C]``. Numbers in and out are float32.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from consilium_shared import task
from consilium_shared.errors import IntegrityError
from consilium_shared.models import build, forms
from consilium_shared.models.vector import load
from consilium_shared.recalibration import Recalibration
from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_shared.prediction import Scores

Arrays = Mapping[str, npt.NDArray[np.float32]]

OPSET = 17
"""Operators of ONNX 1.12 (2022), which every runtime in use has."""

TOLERANCE = 1e-5
"""Largest difference of a score or logit, for each unit of the largest one where that is above 1."""


class _WithScores(nn.Module):
    def __init__(self, model: nn.Module, scores: Scores, recalibration: Recalibration | None) -> None:
        super().__init__()
        self.model, self.scores, self.recalibration = model, scores, recalibration

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(*inputs)
        if self.recalibration is not None:
            shift = torch.tensor([0.0, self.recalibration.intercept])
            logits = logits * self.recalibration.slope + shift
        return logits, self.scores(logits)


def to_onnx(model_bytes: bytes, study: Study, recalibration: Recalibration | None = None) -> bytes:
    """The ONNX graph of the study's model with these weights.

    Args:
        model_bytes: safetensors, as ``vector.pack`` wrote them.
        study: whose model it is.
        recalibration: of its logits and probabilities; None leaves them as they were trained.

    Raises:
        PeerError: the bytes are not of this study.
    """
    model, inputs, outputs = _loaded(model_bytes, study, recalibration), forms.inputs(study), forms.outputs(study)
    example = tuple(torch.zeros((2, *form)) for form in inputs.values())
    out = io.BytesIO()
    with warnings.catch_warnings():
        # torch.export's converter makes the same numbers, needs three packages more and takes 4 s in place of 0.2.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            example,
            out,  # type: ignore[arg-type]  # this converter writes into any file
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: {0: "records"} for name in (*inputs, *outputs)},
        )
    return out.getvalue()


def answers(
    model_bytes: bytes, study: Study, inputs: Arrays, recalibration: Recalibration | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """Logits and scores that torch gives for prepared inputs, by output's name; raises as ``to_onnx``."""
    model = _loaded(model_bytes, study, recalibration)
    with torch.inference_mode():
        found = model(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in forms.inputs(study)))
    return {name: each.numpy() for name, each in zip(forms.outputs(study), found, strict=True)}


def check(
    graph: bytes, model_bytes: bytes, study: Study, records: int = 7, recalibration: Recalibration | None = None
) -> float:
    """The largest difference between the graph under onnxruntime and the model under torch.

    Compared on invented records: all at once, and one alone.

    Raises:
        IntegrityError: they differ by more than ``TOLERANCE``.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    draw, worst, outputs = np.random.default_rng(0), 0.0, list(forms.outputs(study))
    for number in (records, 1):
        inputs = {
            name: draw.normal(size=(number, *form)).astype(np.float32) for name, form in forms.inputs(study).items()
        }
        expected = answers(model_bytes, study, inputs, recalibration)
        for name, values in zip(outputs, session.run(outputs, dict(inputs)), strict=True):
            worst = max(worst, difference(values, expected[name]))
    if not worst <= TOLERANCE:
        raise IntegrityError(
            f"the ONNX graph of {study.study} differs from the trained model by {worst:.1e}, more than {TOLERANCE:g}; "
            "nothing was exported"
        )
    return worst


def difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest absolute difference, over the largest absolute number where that is above 1; NaN where one is NaN."""
    return float(np.max(np.abs(found - expected), initial=0.0) / max(1.0, float(np.max(np.abs(expected), initial=0.0))))


def _loaded(model_bytes: bytes, study: Study, recalibration: Recalibration | None) -> nn.Module:
    model = build(study)
    load(model_bytes, model, study)
    return _WithScores(model, task.predictions(study).scores(), recalibration).eval()
