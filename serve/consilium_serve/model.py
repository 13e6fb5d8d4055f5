"""A verified model that answers: prepared records in, probabilities out, by onnxruntime on this machine's CPU."""

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
from consilium_shared.study import Study

Probabilities = npt.NDArray[np.float64]

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
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        """Loads the graph, and holds its answer to the bundle's example against the one that was signed.

        Raises:
            PeerError: the contract in the card is none that this release reads.
            IntegrityError: the graph cannot be loaded, or answers otherwise on this machine.
        """
        self.study = Study.from_contract(bundle.card["contract"])
        self.sha256 = bundle.manifest.model
        self.version = self.sha256[:12]
        self.card = bundle.card
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

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return forms.classes(self.study)

    def run(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
        """Outputs of prepared inputs ``[B, …]``, by name."""
        names = list(forms.OUTPUTS)
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def probabilities(self, prepared: Sequence[Prepared]) -> Probabilities:
        """Probabilities ``[B, C]``; a record's do not depend on the others' being there but for rounding."""
        if not prepared:
            return np.zeros((0, len(self.classes)))
        inputs = {name: np.stack([each.inputs[name] for each in prepared]) for name in forms.inputs(self.study)}
        return np.asarray(self.run(inputs)["probabilities"], dtype=np.float64)

    def _check(self, example: Mapping[str, Any]) -> None:
        inputs = {name: np.asarray(values, dtype=np.float32) for name, values in example["inputs"].items()}
        found = self.run(inputs)["probabilities"]
        expected = np.asarray(example["probabilities"])
        if found.shape != expected.shape or not np.abs(found - expected).max() <= float(example["tolerance"]):
            raise IntegrityError(
                f"{self.study.study} {self.version} answers on this machine otherwise than the trained model did; "
                "it is not used. Tell the coordinator this machine's processor and onnxruntime's version"
            )


def answer(model: Model, prepared: Prepared, probabilities: Probabilities | None, threshold: float) -> dict[str, Any]:
    """Answer for one record, as a client gets it.

    Args:
        model: which answered.
        prepared: the record; where it has reasons to abstain, nothing of ``probabilities`` is told.
        probabilities: ``[C]``, or None where the model was not asked.
        threshold: probability of the second class from which it is the one that is said; of more than two classes the
            most probable one is.
    """
    abstained = list(prepared.abstain)
    if probabilities is not None and not np.isfinite(probabilities).all():
        abstained.append("the model gives no probability for this record")
    told: dict[str, Any] = {
        "model": {"study": model.study.study, "version": model.version, "sha256": model.sha256},
        "label": task.reads(model.study).columns[0],
        "prediction": None,
        "threshold": threshold if len(model.classes) == 2 else None,
        "abstained": abstained,
        "notes": list(prepared.notes),
        "calibrated": False,
        "notice": NOTICE,
    }
    if not abstained and probabilities is not None:
        two = len(model.classes) == 2
        chosen = int(probabilities[1] >= threshold) if two else int(probabilities.argmax())
        told["prediction"] = {
            "class": model.classes[chosen],
            "probability": float(probabilities[1 if two else chosen]),
            "of": model.classes[1 if two else chosen],
            "probabilities": dict(zip(model.classes, map(float, probabilities), strict=True)),
        }
    return told
