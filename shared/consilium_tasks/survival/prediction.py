"""Predictions of a survival model: the probability of the event until the end of each interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from consilium_shared.prediction import Predictions, Quantity, Values

if TYPE_CHECKING:
    from consilium_shared.prediction import Scores
    from consilium_tasks.survival.schema import SurvivalData


class RiskPredictions(Predictions):
    """Predictions of risks until each of the study's edges, which never fall from one to the next."""

    gives = "the probabilities"

    def __init__(self, data: SurvivalData, names: tuple[str, ...]) -> None:
        super().__init__(data.event.column, names)
        self._event, self._edges = data.event.classes[1], data.edges

    def scores(self) -> Scores:
        """Risks ``[B, J]`` of the logits of hazards ``[B, J]``, to some 1e-7: ONNX has no expm1."""
        import torch

        return lambda logits: 1.0 - torch.nn.functional.logsigmoid(-logits).cumsum(1).exp()

    def declared(self) -> dict[str, Any]:
        """Column and value of the event, and the ends of the intervals."""
        return {"label": self.label, "event": self._event, "until": list(self._edges)}

    def said(self, scores: Values, threshold: float) -> dict[str, Any]:
        """Risk until the last edge, and until each."""
        return {
            "probability": float(scores[-1]),
            "of": self.names[-1],
            "probabilities": dict(zip(self.names, map(float, scores), strict=True)),
        }

    def sentence(self, prediction: dict[str, Any]) -> str:
        """Risk until each edge."""
        risks = (f"{name} {value:.3f}" for name, value in prediction["probabilities"].items())
        return f"{self.label}, probability of {self._event}: {'; '.join(risks)}."

    def explained(self, logits: Values) -> tuple[dict[str, str], Quantity]:
        """Logit of the risk until the last edge."""

        def risk(found: Values) -> Values:
            hazard = np.logaddexp(0.0, found).sum(axis=1)  # -log of the probability of no event
            return np.asarray(hazard + np.log(-np.expm1(-hazard)))

        return {"of": self.names[-1]}, risk
