"""Part of the contract about evaluation: who is held back, what is counted on them, and when."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from consilium_shared import limits
from consilium_shared.config import Strict
from consilium_shared.fields import Column, Name, Positive
from consilium_shared.groups import MOST_GROUPS, Grouping
from consilium_shared.schema import Since

Metric = Annotated[str, Field(min_length=1, max_length=64)]


class Evaluation(Strict):
    """Counts on patients held back at each site."""

    every: Annotated[int, Field(ge=1, le=limits.ROUNDS)] = 1
    metrics: tuple[Metric, ...] = ("auroc", "accuracy")
    epsilon: Positive | None = None
    """Largest ε of all evaluations together, within ``privacy.epsilon``: counts carry noise and are charged. With
    privacy and without this, no counts leave a site."""
    split: Annotated[float, Field(gt=0, lt=1)] | None = 0.2
    """Fraction of patients held back, chosen by a hash of ``split_label`` and patient."""
    split_label: Annotated[Name | None, Since(2, fresh="patients")] = None
    """Key of that hash: under one label the same patients are held back in every study, and nobody who came before
    moves when others come. None, in older contracts, means the study's name."""
    split_column: Column | None = None
    """Or a column of the label table that says ``train`` or ``test`` for each patient."""
    validation_fraction: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Since(2)] = None
    """Fraction of the patients who are not for test that is held back for validation (``split.part_of``): to choose
    between rounds, while test stays unseen. None: nobody."""
    recalibrate: Annotated[bool, Since(2)] = False
    """Recalibration of the finished model's log odds by the last counts alone; it costs no ε of its own."""
    by: Annotated[tuple[Grouping, ...], Field(max_length=6), Since(2)] = ()
    """Groups of patients of whom everything is also counted apart, in the same release: by sex, age, scanner."""

    @model_validator(mode="after")
    def _one_split(self) -> Evaluation:
        if (self.split is None) == (self.split_column is None):
            raise ValueError("give either split (a fraction) or split_column (with split: null)")
        return self

    @model_validator(mode="after")
    def _few_groups(self) -> Evaluation:
        if len({each.column for each in self.by}) < len(self.by):
            raise ValueError("by has each column once")
        if sum(len(each.names) for each in self.by) > MOST_GROUPS:
            raise ValueError(f"by has more than {MOST_GROUPS} groups, those not given among them")
        return self
