"""Part of the contract about evaluation: who is held back, what is counted on them, and when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilium_shared import limits
from consilium_shared.config import Strict
from consilium_shared.fields import Column, Name, Positive
from consilium_shared.groups import MOST_GROUPS, Grouping
from consilium_shared.schema import Since

Metric = Annotated[str, Field(min_length=1, max_length=64)]


class Keep(Strict):
    """Choice of the round whose model is published, by a metric on the patients for validation."""

    metric: Metric
    best: Literal["highest", "lowest"]
    """Value that is the best one: ``lowest`` of a loss or an error."""
    patience: Annotated[int, Field(ge=1, le=limits.ROUNDS)] | None = None
    """Evaluations in a row without a better value after which training ends early; None: all rounds are run."""


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
    keep: Annotated[Keep | None, Since(2)] = None
    """Publish the round that is best on the patients for validation, whom the counts of all rounds but the last are
    then of; the last counts are of that model, on those for test. None: the last round's model, and all counts on
    those for test."""
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
    def _keepable(self) -> Evaluation:
        if self.keep is None:
            return self
        if self.validation_fraction is None:
            raise ValueError("keep chooses by patients for validation: give validation_fraction")
        if self.keep.metric not in self.metrics:
            raise ValueError(f"keep.metric: {self.keep.metric} is none of evaluation.metrics")
        return self

    @model_validator(mode="after")
    def _few_groups(self) -> Evaluation:
        if len({each.column for each in self.by}) < len(self.by):
            raise ValueError("by has each column once")
        if sum(len(each.names) for each in self.by) > MOST_GROUPS:
            raise ValueError(f"by has more than {MOST_GROUPS} groups, those not given among them")
        return self
