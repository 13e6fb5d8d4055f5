"""Cross tables: how many patients of each class are in each category or bin of each feature, by one private sum.

A question is a study of one round with ``privacy.sums`` and a sampling rate of 1. Its model is the table, and one
record's gradient is minus 1 in the cells that the record is in, so that the opened sum counts all patients that are not
held back, with the noise that the ledgers are charged for. A patient with several records counts as one of them, drawn
at random, or as the mean of several. One patient is in one row of each feature and in the row of everybody:
√(1 + features) in L2 norm, whatever the number of cells.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from consilium_shared.answer import Answer, Table
from consilium_shared.inputs import Categorical, Feature, width
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.study import Study
from consilium_shared.task import ModelKind, Reading
from consilium_tasks.classification.schema import ModelSpec
from consilium_tasks.classification.task import Classification, data_of
from consilium_tasks.cross_table.schema import TableData, cells

if TYPE_CHECKING:
    import torch

    from consilium_shared.task import Loss

ROOM = 1.01
"""Clipping norm over the most that a patient moves: rounding takes up to a hundredth, and no count is clipped."""


class CrossTable(Classification):
    """Counts of classes by features' values."""

    name = "cross-table"
    since = 2
    answers = True
    data = TableData
    part = "features"
    models = {  # noqa: RUF012
        "table": ModelKind(ModelSpec, "consilium_tasks.cross_table.models:table", low_rank=False)
    }

    def check(self, study: Study) -> None:
        """One private step in which everybody is, clips nobody, and is the published model."""
        super().check(study)
        training, privacy, rules, model = study.training, study.privacy, study.aggregation, study.model
        norm, least = privacy.clipping_norm or 0.0, ROOM * math.sqrt(1 + len(features_of(study)))
        wrong = (
            (privacy.sums is None, "a question takes privacy.sums: exact counts would show who is in a small cell"),
            (privacy.sums is not None and privacy.sums.sampling_rate != 1, "privacy.sums.sampling_rate is 1"),
            (training.rounds != 1 or training.optimizer.lr != 1, "training is rounds: 1 and optimizer: {lr: 1}"),
            (
                norm < least,
                f"privacy.clipping_norm: {math.ceil(least * 1000) / 1000} or more: so far one patient moves the table, "
                "and no count may be clipped",
            ),
            (training.class_weights or training.focal, "training.class_weights and focal have no place in counts"),
            (rules.optimizer.name != "fedavg" or rules.optimizer.lr != 1, "aggregation.optimizer: {name: fedavg}"),
            (rules.weight_average, "aggregation.weight_average has no place in a single round"),
            (rules.coordinate_bound < 2, "aggregation.coordinate_bound is 2 or more, beyond any count"),
            (study.evaluation.epsilon, "evaluation.epsilon has no place: a question has no model to evaluate"),
            (study.evaluation.recalibrate, "evaluation.recalibrate has no place: a question has no model"),
            (
                model.name != "table" or model.start or model.trainable != "all",
                "model is {name: table}, which starts at 0 and is trained whole",
            ),
            (data_of(study).label.prior, "data.label.prior has no place in counts"),
        )
        for found, why in wrong:
            if found:
                raise ValueError(why)

    def reads(self, study: Study) -> Reading:
        """A table with features and label."""
        return Reading("table", (data_of(study).label,), features=features_of(study))

    def inputs(
        self, study: Study, count: int, draw: np.random.Generator, *, small: bool = False
    ) -> tuple[NDArray[np.float32], ...]:
        """Rows float32 ``[count, F]``: one category of each feature, numbers on both sides of all edges."""
        assert isinstance(study.data, TableData)  # noqa: S101  (the contract's validation made it)
        made = np.zeros((count, width(features_of(study))), dtype=np.float32)
        place = 0
        for each in features_of(study):
            size = len(each.categories) if isinstance(each, Categorical) else 1
            if isinstance(each, Categorical):
                made[np.arange(count), place + draw.integers(0, size, count)] = 1
            else:
                edges = study.data.edges[each.name]
                made[:, place] = draw.uniform(edges[0] - 1, edges[-1] + 1, count)
            place += size
        return (made,)

    def loss(self, study: Study, device: torch.device) -> Loss:
        """Minus the weights of the cells that a record is in."""
        from consilium_tasks.cross_table.loss import counting

        return counting

    def predictions(self, study: Study) -> None:
        """A table of counts predicts nothing."""

    def answer(self, study: Study, weights: NDArray[np.float32], sites: int) -> Answer:
        """Counts by feature, with the noise of a sum of so many sites."""
        assert isinstance(study.data, TableData)  # noqa: S101  (the contract's validation made it)
        plan = plan_of(study, 0)
        assert isinstance(plan, PrivacyPlan)  # noqa: S101  (``check`` asks for privacy)
        noise = plan.own_noise_multiplier * plan.clipping_norm * math.sqrt(sites)
        classes = study.data.label.classes
        counts = weights.astype(np.float64).reshape(len(classes), -1).T * study.training.expected_batch
        tables, place = [Table("everybody", ("patients",), classes, counts[:1])], 1
        for name, rows in cells(study.data).items():
            edges = study.data.edges.get(name, ())
            tables.append(Table(name, rows, classes, counts[place : place + len(rows)], edges))
            place += len(rows)
        return Answer(study.study, study.data.label.column, tuple(tables), noise, sites, plan.epsilon, plan.delta)


def features_of(study: Study) -> tuple[Feature, ...]:
    """The question's features."""
    return data_of(study).features or ()


TASK = CrossTable()
