"""Predictions of a classifier: a probability of each class, and the class that is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from consilium_shared.prediction import Predictions, Quantity, Values

if TYPE_CHECKING:
    from consilium_shared.prediction import Scores


class ClassPredictions(Predictions):
    """Predictions of classes ``names``. Of two, the second is said from the hospital's threshold on; of more, the most
    probable one.

    >>> ClassPredictions("disease", ("no", "yes")).said(np.array([0.75, 0.25]), threshold=0.2)["class"]
    'yes'
    """

    gives = "a probability of each of the classes"

    @property
    def thresholds(self) -> bool:
        """True of two classes."""
        return len(self.names) == 2

    def scores(self) -> Scores:
        """Softmax of logits ``[B, C]``."""
        import torch

        return lambda logits: torch.softmax(logits, dim=1)

    def declared(self) -> dict[str, Any]:
        """Column, and its classes."""
        return {"label": self.label, "classes": list(self.names)}

    def said(self, scores: Values, threshold: float) -> dict[str, Any]:
        """Class and its probability; of two classes always the second one's probability."""
        chosen = int(scores[1] >= threshold) if self.thresholds else int(scores.argmax())
        of = 1 if self.thresholds else chosen
        return {
            "class": self.names[chosen],
            "probability": float(scores[of]),
            "of": self.names[of],
            "probabilities": dict(zip(self.names, map(float, scores), strict=True)),
        }

    def sentence(self, prediction: dict[str, Any]) -> str:
        """Class, and the probability by which it was chosen."""
        return f"{self.label}: {prediction['class']}; p({prediction['of']}) = {prediction['probability']:.3f}."

    def category(self, prediction: dict[str, Any]) -> tuple[str, str]:
        """Class that was said."""
        return f"class-{self.names.index(prediction['class'])}", prediction["class"]

    def explained(self, logits: Values) -> tuple[dict[str, str], Quantity]:
        """Logit of the most probable class, over the mean of the others'."""
        chosen = int(np.argmax(logits))

        def margin(found: Values) -> Values:
            return np.asarray(found[:, chosen] - np.delete(found, chosen, axis=1).mean(axis=1))

        return {"class": self.names[chosen]}, margin
