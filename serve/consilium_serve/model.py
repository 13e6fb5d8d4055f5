"""A verified model that answers: prepared records in, scores out, by onnxruntime on this machine's CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from consilium_shared import task
from consilium_shared.errors import IntegrityError
from consilium_shared.models import forms
from consilium_shared.preparation.record import Prepared
from consilium_shared.protocol.bundle import EXAMPLE, GRAPH, PAGE, Bundle
from consilium_shared.recalibration import Recalibration
from consilium_shared.study import Study

Scores = npt.NDArray[np.float64]

_NO_FOLDER = "/dev/null/none"
"""Folder in which a graph's further files would lie; without it onnxruntime takes them from the working folder."""

NOTICE = (
    "Output of a statistical model, to support people who are trained to decide. It is no diagnosis, and no ground to "
    "start, change or leave out a treatment by itself."
)


class Model:
    """One version of a study's model, ready to answer. Safe to use from several threads.

    Attributes:
        study: its contract.
        version: first 12 digits of the model's SHA-256.
        sha256: all of them.
        page: its page, HTML.
        card: body of its signed card.
        predictions: what its scores mean.
        recalibrated: True where its graph has the card's recalibration in it.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """Loads the graph, and holds its answer to the bundle's example against the one that was signed.

        Raises:
            PeerError: the contract in the card is none that this release reads.
            IntegrityError: the graph cannot be loaded, or answers otherwise on this machine.
        """
        self.study = Study.from_contract(bundle.card["contract"])
        self.predictions = task.predictions(self.study)
        self.sha256 = bundle.manifest.model
        self.version = self.sha256[:12]
        self.card = bundle.card
        self.recalibrated = Recalibration.read(bundle.card.get("metrics")) is not None
        self.page = bundle.files.get(PAGE, b"")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # its words would go to the screen
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
        try:
            # The very bytes that were verified; further files that a graph names are not read.
            self._session = onnxruntime.InferenceSession(
                bundle.files[GRAPH], options, providers=["CPUExecutionProvider"]
            )
            self._check(json.loads(bundle.files[EXAMPLE]))
        except IntegrityError:
            raise
        except Exception as error:
            raise IntegrityError(f"the graph of {self.study.study} {self.version} cannot be used here") from error

    def run(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
        """Outputs of prepared inputs ``[B, …]``, by name."""
        names = list(forms.outputs(self.study))
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def scores(self, prepared: Sequence[Prepared]) -> Scores:
        """Scores ``[B, m]``; a record's do not depend on the others' being there but for rounding."""
        if not prepared:
            return np.zeros((0, len(self.predictions.names)))
        inputs = {name: np.stack([each.inputs[name] for each in prepared]) for name in forms.inputs(self.study)}
        return np.asarray(self.run(inputs)[self.predictions.output], dtype=np.float64)

    def _check(self, example: Mapping[str, Any]) -> None:
        inputs = {name: np.asarray(values, dtype=np.float32) for name, values in example["inputs"].items()}
        found = self.run(inputs)[self.predictions.output]
        expected = np.asarray(example[self.predictions.output])
        if found.shape != expected.shape or not np.abs(found - expected).max() <= float(example["tolerance"]):
            raise IntegrityError(
                f"{self.study.study} {self.version} answers on this machine otherwise than the trained model did; "
                "it is not used. Tell the coordinator this machine's processor and onnxruntime's version"
            )


def answer(model: Model, prepared: Prepared, scores: Scores | None, threshold: float) -> dict[str, Any]:
    """Answer for one record, as a client gets it.

    Args:
        model: which answered.
        prepared: the record; where it has reasons to abstain, nothing of ``scores`` is told.
        scores: ``[m]``, or None where the model was not asked.
        threshold: probability from which on a class is said, where the task has such (``Predictions.thresholds``).
    """
    abstained = list(prepared.abstain)
    if scores is not None and not np.isfinite(scores).all():
        abstained.append("the model gives no number for this record")
    told: dict[str, Any] = {
        "model": {"study": model.study.study, "version": model.version, "sha256": model.sha256},
        "label": model.predictions.label,
        "prediction": None,
        "threshold": threshold if model.predictions.thresholds else None,
        "abstained": abstained,
        "notes": list(prepared.notes),
        "calibrated": model.recalibrated,
        "notice": NOTICE,
    }
    if not abstained and scores is not None:
        told["prediction"] = model.predictions.said(scores, threshold)
    return told
