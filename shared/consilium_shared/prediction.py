"""Predictions of a finished model, as its task declares them: for bundles, the prediction service, FHIR and DICOM.

A model's graph gives ``logits`` and scores, numbers that stand for something. Which ones, what is said of them and
which quantity an explanation shares out is the task's to know; programs outside of its folder only carry it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    Scores = Callable[[torch.Tensor], torch.Tensor]
    """Logits ``[B, …]`` to scores float32 ``[B, m]``, by operators that ONNX has."""

Values = NDArray[np.float64]
Quantity = Callable[[Values], Values]
"""Logits ``[n, …]`` to a quantity float64 ``[n]``."""


class Outcome(NamedTuple):
    """One number of a prediction.

    Attributes:
        name: what it is of, such as a class.
        value: the number.
        unit: in UCUM's spelling; ``1`` for a number without one.
        probability: whether it is one, of the event or class that ``name`` names.
    """

    name: str
    value: float
    unit: str = "1"
    probability: bool = True

    def __str__(self) -> str:
        """The outcome in words, for people."""
        return f"Probability of {self.name}" if self.probability else self.name


class Predictions(ABC):
    """Predictions of one study's model. A task's folder has a subclass; no torch is imported until ``scores`` is.

    Attributes:
        label: column that is predicted.
        names: of the scores, in order.
        output: name of the graph's output that has the scores.
        gives: words before the names, in "it gives … of LABEL".
        thresholds: whether the hospital's threshold decides what is said.
    """

    output: ClassVar[str] = "probabilities"
    gives: ClassVar[str]

    def __init__(self, label: str, names: tuple[str, ...]) -> None:
        self.label, self.names = label, names

    @property
    def thresholds(self) -> bool:
        """True where the hospital's threshold decides what is said."""
        return False

    @abstractmethod
    def scores(self) -> Scores:
        """Function that ends the graph."""

    @abstractmethod
    def declared(self) -> dict[str, Any]:
        """Facts about the answers for programs of others, as JSON carries them."""

    @abstractmethod
    def said(self, scores: Values, threshold: float) -> dict[str, Any]:
        """Prediction on one record, as a client gets it.

        ``output`` maps each of ``names`` to its score.

        Args:
            scores: float64 ``[m]``, finite.
            threshold: probability from which on a class is said, where ``thresholds``.
        """

    @abstractmethod
    def sentence(self, prediction: dict[str, Any]) -> str:
        """Prediction of ``said`` in one sentence."""

    def recorded(self, prediction: dict[str, Any] | None) -> dict[str, Any]:
        """Part of a prediction that the record of predictions keeps; of None, where there is no prediction, as well."""
        found = prediction or {}
        probability = found.get("probability")
        return {
            "class": found.get("class"),
            "probability": None if probability is None else round(probability, 6),
        }

    def category(self, prediction: dict[str, Any]) -> tuple[str, str] | None:
        """Code and name of the category that was said; None where a task has none."""
        return None

    def outcomes(self, prediction: dict[str, Any]) -> list[Outcome]:
        """Numbers of a prediction, in the order of ``names``."""
        return [Outcome(name, prediction[self.output][name]) for name in self.names]

    @abstractmethod
    def explained(self, logits: Values) -> tuple[dict[str, str], Quantity]:
        """Quantity that an explanation of one record shares out among its parts, and the words that name it.

        Args:
            logits: of the record, float64 ``[…]``.
        """
