"""Predictions of findings: a probability of each, and those that are said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from consilium_shared.prediction import Predictions, Quantity, Values

if TYPE_CHECKING:
    from consilium_shared.prediction import Scores


class FindingPredictions(Predictions):
    """Predictions of findings ``names``, each present or not whatever the others are.

    >>> FindingPredictions(("mass", "effusion")).said(np.array([0.1, 0.75]), threshold=0.5)["present"]
    ['effusion']
    """

    gives = "the probabilities of"

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__("findings", names)

    @property
    def thresholds(self) -> bool:
        """True: a finding is said from the hospital's threshold on."""
        return True

    def scores(self) -> Scores:
        """Probabilities of logits ``[B, L]``."""
        import torch

        return torch.sigmoid

    def declared(self) -> dict[str, Any]:
        """Names of the findings."""
        return {"label": self.label, "findings": list(self.names)}

    def said(self, scores: Values, threshold: float) -> dict[str, Any]:
        """Findings at or above the threshold; the most probable one, present or not, stands for all of them."""
        first = int(scores.argmax())
        return {
            "present": [name for name, score in zip(self.names, scores, strict=True) if score >= threshold],
            "probability": float(scores[first]),
            "of": self.names[first],
            "probabilities": dict(zip(self.names, map(float, scores), strict=True)),
        }

    def sentence(self, prediction: dict[str, Any]) -> str:
        """Findings that are said, with their probabilities."""
        found = [f"{name} {prediction['probabilities'][name]:.3f}" for name in prediction["present"]]
        return f"{self.label}: {', '.join(found) or 'none at or above the threshold'}."

    def recorded(self, prediction: dict[str, Any] | None) -> dict[str, Any]:
        """Findings that were said, in one text, and the largest probability."""
        kept = super().recorded(prediction)
        return kept | {"class": ", ".join(prediction["present"]) if prediction else None}

    def explained(self, logits: Values) -> tuple[dict[str, str], Quantity]:
        """Logit of the most probable finding."""
        chosen = int(np.argmax(logits))
        return {"of": self.names[chosen]}, lambda found: np.asarray(found[:, chosen])
