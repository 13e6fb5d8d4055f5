from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import graphs
from tests.unit.tasks.suite import CPU, TaskSuite

from consilium_client.agent.estimates import make_plan
from consilium_client.data.dataset import ArrayDataset
from consilium_client.policy import SitePolicy, check_contract
from consilium_client.training import invented
from consilium_client.training.trainer import train
from consilium_shared import task
from consilium_shared.answer import Answer
from consilium_shared.errors import ConfigurationError, PolicyRefusal
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.private_sums import Grid
from consilium_shared.study import Study
from consilium_shared.task import Task
from dpsgd.lattice import Lattice


def exact(inputs: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.float64]:
    """Table ``[classes, rows]`` of records, counted without the model."""
    age, sex = inputs[:, 0], inputs[:, 1:].argmax(axis=1)
    rows = np.stack([np.zeros(len(age), int), 1 + np.searchsorted([0.25, 0.5, 0.75], age, side="right"), 5 + sex])
    found = np.zeros((3, 7))
    for each in rows:
        np.add.at(found, (classes, each), 1)
    return found


class TestCrossTable(TaskSuite):
    name = "cross-table"

    def test_the_graph_of_every_model_answers_as_torch_does(self, own: Task, study: Study) -> None:
        """The table as a model is linear in the cells, and a record is in one of each feature."""
        model = build(study)
        inputs, classes = own.invented(study, 300, np.random.default_rng(3))
        rows = model.rows(torch.from_numpy(inputs[0])).numpy()  # type: ignore[operator]
        assert set(np.unique(rows)) == {0.0, 1.0}
        assert (rows.sum(axis=1) == 3).all()
        counted = np.stack([rows[classes[0] == each].sum(axis=0) for each in range(3)])
        assert np.array_equal(counted, exact(inputs[0], classes[0]))

    def test_a_published_model_predicts_what_torch_does_and_says_it_in_every_form(self, study: Study) -> None:  # type: ignore[override]
        """It predicts nothing."""
        with pytest.raises(ConfigurationError, match="does not leave as a bundle"):
            task.predictions(study)

    def test_an_explanation_of_a_published_model_adds_up(self, own: Task, study: Study) -> None:  # type: ignore[override]
        assert own.predictions(study) is None

    def test_two_rounds_in_one_process_and_their_counts(self, study: Study) -> None:
        """The one round counts every patient once, however many records somebody has, with the noise that is stated."""
        data, wrong = invented.records(study, [1] * 400, 0), []
        data.train[np.random.default_rng(1).random(400) < 1 / 4] = False
        kept = data.take(np.flatnonzero(data.train))
        truth = exact(kept.inputs[0], kept.targets[0])
        for number in range(12):
            found = self.answer(study, data, number)
            wrong.append(np.concatenate([each.counts for each in found.tables]).T - truth)
            plan = make_plan(study, 300)
            assert isinstance(plan, PrivacyPlan)
            assert found.noise == pytest.approx(plan.noise_multiplier * 1.75)
        measured = float(np.std(wrong)) / found.noise
        assert 0.85 < measured < 1.15  # 252 draws: three deviations
        assert abs(np.mean(wrong)) < 4 * found.noise / math.sqrt(np.size(wrong))

    def test_a_patient_of_many_records_counts_once(self, study: Study) -> None:
        data = invented.records(study, [200] + [1] * 9, 0)
        data.train[:] = True
        everybody = self.answer(study, data, 0).tables[0].counts.sum()
        assert everybody < 10 + 6 * math.sqrt(3) * self.answer(study, data, 0).noise < 209

    def answer(self, study: Study, data: ArrayDataset, number: int) -> Answer:
        """The answer of one site's round."""
        plan, start = make_plan(study, 80), to_vector(build(study))
        assert isinstance(plan, PrivacyPlan)
        seed = bytes([number]) * 32
        done = train(pack(start, study), study, data, plan, round=1, site="a", device=CPU, seed=seed)
        assert done.integers is not None
        update = np.zeros(len(start), np.float32)
        Grid.of(study, len(start)).update(done.integers[: len(start)], update)
        found = task.of(study).answer(study, start + update, 1)
        assert found is not None
        return found

    def test_no_patient_is_clipped_or_moves_the_table_by_more_than_is_charged(self, own: Task, study: Study) -> None:
        """The gradient of a record is the cells that it is in, shorter than the clipping bound less all rounding."""
        examples, model = own.invented(study, 40, np.random.default_rng(5)), build(study)
        losses = own.loss(study, CPU)
        lattice = Lattice.on_grid(Grid.of(study, 21).step, 1.75, 21, 400)
        for row in range(40):
            model.zero_grad()
            one = torch.from_numpy(examples.inputs[0][row : row + 1])
            losses(model(one), torch.from_numpy(examples.targets[0][row : row + 1])).sum().backward()
            (weights,) = model.parameters()
            assert weights.grad is not None
            norm = float(weights.grad.norm())
            assert norm == pytest.approx(math.sqrt(3))
            assert norm < lattice.row_bound

    @pytest.mark.parametrize(
        ("part", "key", "value", "why"),
        [
            ("privacy", "sums", None, "exact counts"),
            ("privacy", "sums", {"sampling_rate": 0.5}, "sampling_rate"),
            ("privacy", "clipping_norm", 1.7, "no count may be clipped"),
            ("training", "rounds", 2, "rounds: 1"),
            ("training", "optimizer", {"lr": 2.0}, "lr: 1"),
            ("evaluation", "epsilon", 1.0, "no model to evaluate"),
            ("aggregation", "optimizer", {"name": "fedadam"}, "fedavg"),
            ("data", "missing", "center", "in no bin"),
            ("data", "edges", {}, "edges has"),
            ("data", "edges", {"age": [2.0, 1.0]}, "grow"),
        ],
    )
    def test_a_question_that_would_count_wrongly_or_exactly_is_refused(
        self, study: Study, part: str, key: str, value: object, why: str
    ) -> None:
        contract = study.contract
        with pytest.raises(ValueError, match=why):
            Study.model_validate({**contract, part: {**contract[part], key: value}})

    def test_a_question_under_another_name_or_with_other_bins_is_another_study_with_its_own_charge(
        self, study: Study
    ) -> None:
        contract = study.contract
        renamed = Study.model_validate({**contract, "study": "asked-again"})
        data = {**contract["data"], "edges": {name: [*ends, 9.0] for name, ends in contract["data"]["edges"].items()}}
        others = [renamed, Study.model_validate({**contract, "data": data})]
        assert len({each.digest for each in (study, *others)}) == 3
        seeds = [self.answer(each, invented.records(each, [1] * 200, 0), 0).noise for each in (study, renamed)]
        assert seeds[0] == seeds[1] > 0, "asked again, it costs as much again"

    def test_a_question_brings_no_graph(self) -> None:
        """Another model than the table would make of one patient whatever its wiring makes of them."""
        with pytest.raises(ValueError, match="model is"):
            graphs.for_task("cross-table")

    def test_exact_counts_are_no_question(self, study: Study) -> None:
        with pytest.raises(ValueError, match="exact counts would show"):
            Study.model_validate({**study.contract, "privacy": {"mode": "none"}})

    def test_no_policy_permits_it_unless_it_names_it(self, study: Study) -> None:
        policy = SitePolicy.model_validate({"budgets": {"table": {"epsilon": 10.0, "delta": 1e-3}}})
        with pytest.raises(PolicyRefusal, match="no studies of the kind cross-table"):
            check_contract(policy, study)
        check_contract(policy.model_copy(update={"tasks": ("cross-table",)}), study)
