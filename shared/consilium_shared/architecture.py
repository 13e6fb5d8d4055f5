"""Architecture of a study's model: the part of the contract that every model of every task has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from consilium_shared.config import Strict
from consilium_shared.origin import UNKNOWN, Origin
from consilium_shared.schema import Since

if TYPE_CHECKING:
    from consilium_shared.study import Study

SEED_LIMIT = 2**53 - 1  # the largest integer that canonical JSON carries


class Start(Strict):
    """Weights that the study begins with in place of the seed's. They are public, as the seed is."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of every parameter's name, shape and numbers (``models.vector.fingerprint``): a site trains in round 1
    from no other model."""
    card: Annotated[Origin | None, Since(2)] = None
    """Card of whose data made them; None says nothing of it."""

    def said(self) -> str:
        """Sentence on where the study began, for an auditor."""
        card = UNKNOWN if self.card is None else "; ".join(self.card.lines())
        return f"the study starts from weights {self.sha256[:12]}; the contract says, and nobody has checked: {card}"


class Architecture(Strict):
    """Architecture by name, of those that the study's task has; a task's own class adds options.

    Its input and output sizes follow from ``data``.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    seed: Annotated[int, Field(ge=0, le=SEED_LIMIT)] = 0
    """Seed of the initial global weights, which are public."""
    start: Start | None = None
    trainable: Literal["all", "head", "lora"] = "all"
    """Parameters that training changes and sites send: every weight; the last linear layer; or that and an addition of
    low rank to the weight of every other linear and convolutional layer (``models.adaptation``)."""
    lora_rank: Annotated[int, Field(ge=1, le=64)] | None = None
    """Rank of those additions."""

    @model_validator(mode="after")
    def _adaptable(self) -> Architecture:
        if (self.trainable == "lora") != (self.lora_rank is not None):
            raise ValueError("lora_rank goes with trainable: lora, and trainable: lora with a lora_rank")
        return self

    def check(self, study: Study) -> None:
        """Check of the model against the rest of the contract; raises ValueError with what to change in its file."""
