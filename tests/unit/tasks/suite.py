"""What must hold of every task: a test class of a task inherits this, names its task, and has nothing to write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from tests.support import assets, published

from consilium_client.agent.estimates import make_plan
from consilium_client.data import load
from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.report import NothingUsable
from consilium_client.training import invented
from consilium_client.training.canaries import audit
from consilium_client.training.evaluation import evaluate, measured, noised_counts
from consilium_client.training.neighbours import dependence
from consilium_client.training.trainer import check_independence, train
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_serve.dicom.report import structured_report
from consilium_serve.explain import explain, parts_of
from consilium_serve.fhir import Read, risk_assessment
from consilium_serve.model import Model, answer
from consilium_shared import grouped, study_file, task
from consilium_shared.errors import DataError
from consilium_shared.grouped import GroupedLayout
from consilium_shared.groups import Grouping
from consilium_shared.intervals import noised_metrics, noised_parts, variances
from consilium_shared.metrics import Layout, metrics
from consilium_shared.models import build, onnx_graph
from consilium_shared.models.vector import pack, to_vector, trained, with_trained
from consilium_shared.plausibility import contradiction
from consilium_shared.preparation.declared import invented as invented_record
from consilium_shared.preparation.record import prepare
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.protocol.bundle import open_bundle, zipped
from consilium_shared.study import Study
from consilium_shared.task import Task

CPU, SEED = torch.device("cpu"), bytes(range(32))
PATIENTS = 120


class TaskSuite:
    """Tests of one task, all on its sample study and on invented records."""

    name: ClassVar[str]

    @pytest.fixture
    def own(self) -> Task:
        return task.get(self.name)

    @pytest.fixture
    def study(self, own: Task) -> Study:
        return study_file.read(own.sample)

    @pytest.fixture(params=[True, False], ids=["with privacy", "without"])
    def layout(self, request: pytest.FixtureRequest, own: Task, study: Study) -> Layout:
        every = study.evaluation.model_copy(update={"metrics": own.metrics})
        asked = study.model_copy(update={"evaluation": every})
        return own.layout(asked, local=not request.param)

    def models(self, own: Task, study: Study) -> list[Study]:
        """The sample with each of the task's models."""
        contract = study.contract
        return [Study.model_validate({**contract, "model": {**contract["model"], "name": name}}) for name in own.models]

    def data(self, study: Study, seed: int = 0) -> ArrayDataset:
        """Patients with one to three records, some held back."""
        counts = [1 + number % 3 for number in range(PATIENTS)]
        found = invented.records(study, counts, seed)
        found.train[np.random.default_rng(1).random(PATIENTS) < 1 / 3] = False
        return found

    def measured(self, own: Task, study: Study, count: int, seed: int) -> tuple[NDArray[Any], Sequence[NDArray[Any]]]:
        """What a model of random weights makes of invented records."""
        draw = np.random.default_rng(seed)
        torch.manual_seed(seed)
        examples = own.invented(study, count, draw)
        model = build(study).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, float(draw.uniform(0.1, 5)))
            outputs = model(*(torch.from_numpy(each).double() for each in examples.inputs))
            found = own.measure(study)(outputs, *map(torch.from_numpy, examples.targets))
        return found.numpy(), examples.targets

    # -- the contract

    def test_the_sample_is_a_contract_that_stays_what_it_is(self, study: Study) -> None:
        assert study.task == self.name
        again = Study.from_contract(study.contract)
        assert again == study
        assert again.digest == study.digest

    def test_importing_the_task_imports_no_torch_and_no_pandas(self) -> None:
        code = f"import sys; from consilium_shared import task; task.get({self.name!r}); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert not {"torch", "pandas", "flwr"} & set(done.stdout.split())

    def test_a_contract_of_an_older_schema_than_the_task_is_refused(self, own: Task, study: Study) -> None:
        if own.since > 1:
            with pytest.raises(ValueError, match="came with"):
                Study.model_validate({**study.contract, "schema_version": own.since - 1})

    # -- records

    def test_invented_records_are_the_same_for_the_same_draw(self, own: Task, study: Study) -> None:
        first, again, other = (own.invented(study, 20, np.random.default_rng(seed)) for seed in (1, 1, 2))
        for a, b in zip((*first.inputs, *first.targets), (*again.inputs, *again.targets), strict=True):
            assert len(a) == 20
            assert np.array_equal(a, b)
        assert not all(np.array_equal(a, b) for a, b in zip(first.inputs, other.inputs, strict=True))
        assert own.shapes(study) == tuple(each.shape[1:] for each in first.inputs)

    def test_every_record_is_in_a_group(self, own: Task, study: Study) -> None:
        targets = own.invented(study, 50, np.random.default_rng(0)).targets
        groups = own.groups(study, targets)
        assert all(members.any() for members in groups.values())
        assert np.any(list(groups.values()), axis=0).all()

    # -- assets

    def test_a_sites_asset_becomes_records_in_the_shape_of_invented_ones(
        self, own: Task, study: Study, tmp_path: Path
    ) -> None:
        found = load(assets.write(study, tmp_path), study)
        assert found.patient_count == len(found) == 60
        assert 0 < found.train.sum() < 60
        assert found.shapes == own.shapes(study)
        taken, invented_ones = found.take(np.arange(7)), own.invented(study, 7, np.random.default_rng(0))
        for side, other in zip(taken, invented_ones, strict=True):
            for a, b in zip(side, other, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert np.isfinite(a).all()
        assert all(members.any() for members in own.groups(study, found.targets(np.arange(60))).values())

    def test_records_train_and_count_as_invented_ones_do(self, study: Study, tmp_path: Path) -> None:
        found = load(assets.write(study, tmp_path, patients=120), study)
        plan, start = make_plan(study, 90), pack(to_vector(build(study)), study)
        assert isinstance(plan, PrivacyPlan)
        train(start, study, found, plan, round=1, site="a", device=CPU, seed=SEED)
        noised_counts(start, study, found, CPU, noise_multiplier=2.0, seed=SEED)

    def test_rows_that_cannot_be_used_are_counted_and_the_others_stay(self, study: Study, tmp_path: Path) -> None:
        asset, reading = assets.write(study, tmp_path), task.reads(study)
        table = assets.tables(asset)[0]
        rows = pd.read_csv(table, dtype=str)
        for row, column in enumerate(reading.columns):
            rows.loc[row, column] = "neither this nor that"
            rows.loc[row + 10, column] = None
        rows.loc[30, "patient"] = None
        rows.to_csv(table, index=False)
        found, lost = load(asset, study), 2 * len(reading.columns) - len(reading.optional) + 1
        assert len(found) == 60 - lost
        reasons = found.report.set_aside.counts
        assert sum(count for reason, count in reasons.items() if reason.startswith("label table: ")) >= lost

    @pytest.mark.parametrize("content", [b"", b"patient\n", b"\xff\xfe\x00garbage", b"a,b\n1,2\n", None])
    def test_a_table_that_is_none_is_an_error_that_names_it_and_no_patient(
        self, study: Study, tmp_path: Path, content: bytes | None
    ) -> None:
        asset = assets.write(study, tmp_path)
        for table in assets.tables(asset):
            whole = table.read_bytes()
            table.unlink()
            if content is not None:
                table.write_bytes(content)
            with pytest.raises(DataError, match=re.escape(table.name)) as error:
                load(asset, study)
            assert "P00" not in str(error.value)
            table.write_bytes(whole)

    def test_an_asset_of_which_nothing_can_be_used_is_an_error_with_counts(self, study: Study, tmp_path: Path) -> None:
        asset = assets.write(study, tmp_path)
        table = assets.tables(asset)[0]
        rows = pd.read_csv(table, dtype=str)
        for column in task.reads(study).columns:
            rows[column] = "neither this nor that"
        rows.to_csv(table, index=False)
        with pytest.raises(NothingUsable, match="60 ×"):
            load(asset, study)

    # -- counts

    def test_one_patient_moves_no_block_by_more_than_it_declares(self, own: Task, study: Study, layout: Layout) -> None:
        most = dict.fromkeys(layout.sizes, 0.0)
        for seed in range(60):
            found, targets = self.measured(own, study, 8, seed)
            for row in range(len(found)):
                one = own.count(layout, found[row : row + 1], [each[row : row + 1] for each in targets])
                for name, numbers in layout.parts(one).items():
                    most[name] = max(most[name], float(np.linalg.norm(numbers)))
        for block in layout.blocks:
            assert 0 < most[block.name] <= block.moved + 1e-9, block.name

    def test_a_record_without_finite_numbers_moves_no_block_by_more_either(
        self, own: Task, study: Study, layout: Layout
    ) -> None:
        targets = own.invented(study, 1, np.random.default_rng(0)).targets
        one = own.count(layout, own.unknown(study)[None], targets)
        for block in layout.blocks:
            assert np.linalg.norm(layout.parts(one)[block.name]) <= block.moved + 1e-9

    def test_counts_of_two_sites_are_those_of_both(self, own: Task, study: Study, layout: Layout) -> None:
        found, targets = self.measured(own, study, 90, 3)
        whole = own.count(layout, found, targets)
        parts = [
            own.count(layout, found[some], [each[some] for each in targets]) for some in (slice(0, 31), slice(31, 90))
        ]
        assert whole.shape == (layout.width,)
        assert np.array_equal(parts[0] + parts[1], whole)
        assert metrics(whole, layout)["n"] == 90

    def test_counts_by_group_move_by_what_their_blocks_say_and_tell_of_all_what_those_without_groups_tell(
        self, own: Task, study: Study, layout: Layout
    ) -> None:
        """One patient is in one group by sex and in one by age, and moves the counts of those two alone."""
        by = GroupedLayout(layout, (Grouping(column="sex", groups=("f", "m")), Grouping(column="age", borders=(50.0,))))
        found, targets = self.measured(own, study, 90, 3)
        groups = np.random.default_rng(4).integers(0, 3, (90, 2))
        most = dict.fromkeys(by.sizes, 0.0)
        for row in range(30):
            of_one = [each[row : row + 1] for each in targets]
            one = grouped.count(own, by, found[row : row + 1], of_one, groups[row : row + 1])
            for name, numbers in by.parts(one).items():
                most[name] = max(most[name], float(np.linalg.norm(numbers)))
        for block in by.blocks:
            assert 0 < most[block.name] <= block.moved + 1e-9, block.name
        counts = grouped.count(own, by, found, targets, groups)
        assert contradiction(counts, by, None) is None
        plain = own.count(layout, found, targets)
        assert np.array_equal(by.all_of(counts), plain)
        assert metrics(counts, by) == pytest.approx(metrics(plain, layout), rel=1e-3)
        parts = {(part.kind, part.name): values for part, values, _ in noised_parts(counts, by, None)}
        assert parts.keys() >= {(f"by {each.column}", name) for each in by.groupings for name in each.names}
        for column, grouping in enumerate(by.groupings):
            for number, name in enumerate(grouping.names):
                some = groups[:, column] == number
                alone = metrics(own.count(layout, found[some], [each[some] for each in targets]), layout)
                assert parts[f"by {grouping.column}", name] == pytest.approx(
                    {"share": some.mean(), **{key: value for key, value in alone.items() if key != "n"}}
                )

    def test_what_honest_sites_count_is_never_refused_and_its_metrics_lie_in_their_range(
        self, own: Task, study: Study, layout: Layout
    ) -> None:
        for seed in range(20):
            counts = own.count(layout, *self.measured(own, study, 40 + seed, seed))
            assert contradiction(counts, layout, None) is None
            for name, value in metrics(counts, layout).items():
                if name != "n" and value is not None:
                    assert layout.least(name) <= value <= layout.most(name), name

    def test_noise_leaves_the_true_metric_within_its_interval(self, own: Task, study: Study) -> None:
        every = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"metrics": own.metrics})})
        layout, draw = own.layout(every), np.random.default_rng(9)
        exact = own.count(layout, *self.measured(own, study, 1500, 5))
        variance, inside, asked = variances(layout, 2.0, 1), 0, 0
        truth = metrics(exact, layout)
        for _ in range(100):
            noised = exact + np.rint(draw.normal(0, np.sqrt(variance))).astype(np.int64)
            for name, (low, high) in noised_metrics(noised, layout, variance)[1].items():
                true = truth[name]
                assert true is not None
                inside, asked = inside + (low <= true <= high), asked + 1
        assert asked > 50
        assert inside / asked > 0.9

    # -- predictions

    @pytest.fixture
    def model(self, own: Task, study: Study, tmp_path: Path) -> Model:
        """The sample's model with weights that nobody trained, as a hospital has it from the signed bundle."""
        assert own.predictions(study) is not None
        coordinator = published.coordinator(tmp_path)
        data = zipped(published.files(coordinator, study))
        (tmp_path / "model.zip").write_bytes(data)
        return Model(open_bundle(tmp_path / "model.zip", coordinator.coordinator().public.fingerprint))

    def test_the_graph_of_every_model_answers_as_torch_does(self, own: Task, study: Study) -> None:
        for each in self.models(own, study):
            if "resnet" in each.model.name:
                continue  # tests/unit/server/test_export.py has it
            weights = published.weights(each)
            assert onnx_graph.check(onnx_graph.to_onnx(weights, each), weights, each) <= 1e-5

    def test_a_published_model_predicts_what_torch_does_and_says_it_in_every_form(
        self, study: Study, model: Model, tmp_path: Path
    ) -> None:
        """From a record as a client sends it to the answer, its explanation, FHIR and DICOM."""
        raw, prepared = invented_record(study)
        own = model.predictions
        scores = model.scores([prepare(study, raw)])[0]
        expected = onnx_graph.answers(published.weights(study), study, {n: v[None] for n, v in prepared.inputs.items()})
        np.testing.assert_allclose(scores, expected[own.output][0], atol=1e-5)
        told = answer(model, prepared, scores, 0.5)
        assert list(told["prediction"][own.output]) == list(own.names)
        assert list(told["prediction"][own.output].values()) == pytest.approx(scores)
        assert json.loads(json.dumps(told)) == told
        assert [each.value for each in own.outcomes(told["prediction"])] == pytest.approx(scores)
        read = Read(record=raw, patient="p", basis=[], notes=[])
        assessment = risk_assessment(told, own, read, datetime(2026, 1, 1, tzinfo=UTC))
        assert len(assessment["prediction"]) == len(own.names)
        write_radiograph(tmp_path / "image.dcm", np.zeros((8, 8)), "P", "I", Scanner())
        report = structured_report(pydicom.dcmread(tmp_path / "image.dcm"), told, model, "0")
        words = str(report)
        assert all(name[:20] in words for name in own.names)
        assert set(own.recorded(told["prediction"])) == set(own.recorded(None))
        assert not any(own.recorded(None).values())

    def test_an_explanation_of_a_published_model_adds_up(self, study: Study, model: Model) -> None:
        _, prepared = invented_record(study)
        own, told = model.predictions, explain(model, prepared)
        _, nothing = parts_of(study, prepared.inputs)
        both = model.run({name: np.stack([values, nothing[name]]) for name, values in prepared.inputs.items()})
        logits = np.asarray(both["logits"], dtype=np.float64)
        with_all, without = own.explained(logits[0])[1](logits)
        shared = np.sum(told["tiles"]) if "tiles" in told else sum(told["parts"].values())
        assert shared == pytest.approx(with_all - without, abs=1e-4)
        assert shared != 0

    # -- training

    def test_no_records_gradient_depends_on_others(self, own: Task, study: Study) -> None:
        for each in self.models(own, study):
            check_independence(each)

    def test_no_record_depends_on_its_neighbours_bit_by_bit(self, own: Task, study: Study) -> None:
        for each in self.models(own, study):
            if "resnet" not in each.model.name:  # the same layers, and too large for a quick test
                assert dependence(each, CPU, "book-keeping", 32) == ""

    def test_what_is_measured_of_a_record_is_the_same_bits_beside_anybody(self, study: Study) -> None:
        data, model, draw = self.data(study), pack(to_vector(build(study)), study), np.random.default_rng(0)
        whole = measured(model, study, data, CPU)
        for count in (*[1] * 20, *range(2, 12)):
            some = draw.permutation(len(data))[:count]
            assert np.array_equal(measured(model, study, data, CPU, some), whole[some], equal_nan=True)

    def test_two_rounds_in_one_process_and_their_counts(self, study: Study) -> None:
        data, plan = self.data(study), make_plan(study, 80)
        assert isinstance(plan, PrivacyPlan)
        assert plan.evaluation_noise is not None
        vector = to_vector(build(study))
        for number in (1, 2):
            result = train(
                pack(vector, study), study, data, plan, round=number, site="a", device=CPU, seed=SEED, attempt=number
            )
            assert result.steps == plan.steps_per_round
            assert np.abs(result.update).max() > 0
            vector = with_trained(vector, trained(vector, study) + result.update, study)
        layout, sigma = Layout.of(study), plan.evaluation_noise
        counts = noised_counts(pack(vector, study), study, data, CPU, noise_multiplier=sigma, seed=SEED)
        assert contradiction(counts, layout, variances(layout, sigma, 1)) is None
        local = task.of(study).layout(study, local=True)
        exact = metrics(evaluate(pack(vector, study), study, data, CPU, local), local)
        assert all(value is not None for value in exact.values())

    def test_the_same_seed_gives_the_same_round(self, study: Study) -> None:
        data, plan = self.data(study), make_plan(study, 80)
        start = pack(to_vector(build(study)), study)
        one, again = (train(start, study, data, plan, round=1, site="a", device=CPU, seed=SEED) for _ in range(2))
        assert np.array_equal(one.update, again.update)

    def test_canaries_do_not_contradict_the_plan(self, study: Study) -> None:
        plan = make_plan(study, 80)
        assert isinstance(plan, PrivacyPlan)
        outcome = audit(study, plan, CPU, canaries=60, seed=SEED)
        assert 0 <= outcome.correct <= outcome.guesses <= 60
