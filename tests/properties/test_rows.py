"""What is computed of one patient is the same to the last bit wherever it stands and whoever is beside it.

Also for models made to show it: weights of a million that cancel, so that what is left of a logit is rounding alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support import studies
from tests.support.records import dataset

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training import evaluation, steps, trainer
from consilium_client.training.evaluation import noised_counts
from consilium_client.training.microbatches import Batch
from consilium_shared import task
from consilium_shared.metrics import Layout
from consilium_shared.models import build
from consilium_shared.models.vector import load_vector, pack, to_vector
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.device import exact_arithmetic
from dpsgd.isolation import ROWS
from dpsgd.noise import Noise
from dpsgd.patches import Geometry
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import ERROR, Tape

CPU = torch.device("cpu")
BOUND = 1.0
Vector = npt.NDArray[np.floating[Any]]
VARIABLES = [{"name": f"v{i}"} for i in range(3)]
DATA: dict[str, dict[str, Any]] = {
    "tabular": {"features": [{"name": f"f{i}"} for i in range(30)]},
    "image": {"image": {"size": 21}},
    "sequence": {"series": {"variables": VARIABLES, "bins": 12, "step_minutes": 60, "statics": [{"name": "age"}]}},
}
SHAPES = {"tabular": (30,), "image": (1, 21, 21), "sequence": (12, 9)}
MODELS = {"logistic": "tabular", "mlp": "tabular", "gru": "sequence", "lstm": "sequence", "small-cnn": "image"}
WIDTHS = (13, 64)  # of one no vector loop ends evenly but for the rows; the other is the usual


def a_study(name: str, width: int = 64, **training: Any) -> Study:
    plain = {"rounds": 1, "steps_per_round": 1, "expected_batch": 16, "optimizer": {"lr": 1.0}}
    return studies.study(
        {"name": name, "hidden": width},
        DATA[MODELS[name]],
        training={**plain, **training},
        privacy={"epsilon": 2.0, "delta": 1e-4, "clipping_norm": BOUND},
        evaluation={"epsilon": 1.0, "metrics": ["auroc", "accuracy", "loss"]},
    )


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def crafted(study: Study, near: Vector, draw: np.random.Generator) -> Vector:
    """Weights with which the logits of records close to ``near`` are rounding alone.

    The last layer is a million times what it was, and its bias takes away what ``near`` gives.
    """
    model = build(study)
    head = model.head
    assert isinstance(head, torch.nn.Linear)
    scale = 1e6 if study.model.name == "logistic" else 1e7
    vector = to_vector(model)
    if study.model.name == "mlp":
        vector = vector * 1e3
    load_vector(model, vector)
    found: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(draw.standard_normal(tuple(head.weight.shape)) * scale))
        inputs = [torch.from_numpy(near[None])]
        if MODELS[study.model.name] == "sequence":
            inputs.append(torch.zeros(1, 1))
        model(*inputs)
        head.bias.copy_(-(found[0].double() @ head.weight.double().t())[0])
    hook.remove()
    return to_vector(model)


def records(study: Study, counts: list[int], draw: np.random.Generator, alike: bool = False) -> ArrayDataset:
    """So many records of each patient; ``alike``: all the same but for the class."""
    shape, total = SHAPES[MODELS[study.model.name]], sum(counts)
    inputs = draw.random((1 if alike else total, *shape), dtype=np.float32)
    return dataset(
        inputs=np.repeat(inputs, total, axis=0) if alike else inputs,
        statics=np.zeros((total, 1), dtype=np.float32) if MODELS[study.model.name] == "sequence" else None,
        labels=np.arange(total) % 2 if alike else draw.integers(0, 2, total),
        patients=np.repeat(np.arange(len(counts)), counts),
        patient_count=len(counts),
        train=np.zeros(len(counts), dtype=bool),
    )


def chosen(data: ArrayDataset, patients: list[int]) -> Draw:
    parts = [np.flatnonzero(data.patients == patient) for patient in patients]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Draw(np.concatenate([np.zeros(0, dtype=np.int64), *parts]), owners)


class Seen(Tape):
    """Keeps what each row leaves, before the rows of a patient are put together."""

    def open(self, owners: RowOwners, seeds: torch.Tensor | None = None) -> None:
        self.parts: list[torch.Tensor] = []
        super().open(owners, seeds)

    def record_gradients(self, parameter: torch.Tensor, gradients: torch.Tensor) -> None:
        self.parts.append(gradients.clone())
        super().record_gradients(parameter, gradients)

    def record_outer_product(
        self, weights: tuple[torch.Tensor, ...], inputs: torch.Tensor, deltas: torch.Tensor
    ) -> None:
        self.parts += [inputs.clone(), deltas.clone(), torch.bmm(deltas.transpose(1, 2), inputs)]
        super().record_outer_product(weights, inputs, deltas)

    def record_factors(self, weights: tuple[torch.Tensor, ...], inputs: torch.Tensor, deltas: torch.Tensor) -> None:
        self.parts += [inputs.clone(), deltas.clone()]
        super().record_factors(weights, inputs, deltas)

    def record_convolution(
        self, weight: torch.Tensor, geometry: Geometry, inputs: torch.Tensor, deltas: torch.Tensor
    ) -> None:
        self.parts += [inputs.clone(), deltas.clone()]
        super().record_convolution(weight, geometry, inputs, deltas)


class Kept(PrivateOptimizer):
    """Keeps the sum before noise, in steps of the lattice."""

    def finish(self) -> None:
        self.kept = self._sum.round().cpu().numpy()
        super().finish()


class Step:
    """A private step of a model, again and again from the same weights."""

    def __init__(self, study: Study, weights: Vector, size: int = ROWS, where: torch.device = CPU) -> None:
        self.study, self.size, self.where, self.model = study, size, where, build(study).to(where)
        load_vector(self.model, weights)
        self.parameters, self.tape = list(self.model.parameters()), Seen()
        self.wrapped = engines.BookKeeping(self.model.train(), self.tape)
        self.optimizer = Kept(
            torch.optim.SGD(self.parameters, 0.0),
            self.tape,
            clipping_norm=BOUND,
            noise_multiplier=0.0,
            expected_batch=1,
            noise=Noise(bytes(32)),
        )

    def __call__(self, data: ArrayDataset, patients: list[int]) -> tuple[dict[int, bytes], Vector]:
        """By record, the gradient that was clipped; and the sum before noise."""
        seen: dict[int, bytes] = {}

        def see(indices: npt.NDArray[np.int64]) -> None:
            for number, i in enumerate(indices.tolist()):
                seen[i] = b"".join(part[number].contiguous().cpu().numpy().tobytes() for part in self.tape.parts)

        batch = Batch(self.study, data, chosen(data, patients), self.where, np.random.default_rng(0))
        loss, pieces = task.of(self.study).loss(self.study, self.where), batch.padded_microbatches(self.size)
        with exact_arithmetic():
            steps.accumulate(self.wrapped, self.optimizer, loss, pieces, see)
            self.optimizer.finish()
        return seen, self.optimizer.kept

    def is_rounding_alone(self, moved: Vector, patients: int) -> bool:
        """At most what the lattice allows for so many patients in the sum."""
        allowed = patients * ERROR * BOUND / self.optimizer.lattice.step
        return float(np.linalg.norm(moved)) <= allowed + 2 * np.sqrt(len(moved))

    def within_the_bound(self, moved: Vector) -> bool:
        """Of whole numbers, so exactly."""
        return sum(int(number) ** 2 for number in moved) <= int(BOUND / self.optimizer.lattice.step) ** 2


CASES = [(name, width) for name in MODELS for width in WIDTHS if name != "logistic" or width == 64]


@pytest.mark.parametrize(("name", "width"), CASES)
def test_a_records_gradient_depends_on_neither_its_place_nor_its_neighbours(
    name: str, width: int, three_threads: None
) -> None:
    check_gradients(name, width, CPU)


def check_gradients(name: str, width: int, where: torch.device) -> None:
    """That a record's gradient is the same bits wherever it stands and whoever is beside it."""
    draw = np.random.default_rng(0)
    study = a_study(name, width)
    data = records(study, [1, 2, 40, 3, 1] + [1] * 35, draw)
    data.inputs[0][7] = np.nan
    data.inputs[0][50] *= np.float32(1e30)
    for weights in (to_vector(build(study)), crafted(study, data.inputs[0][0], draw)):
        step, everyone = Step(study, weights, where=where), list(range(data.patient_count))
        seen, total = step(data, everyone)
        assert len(seen) == len(data)
        for size in (1, 16, data.patient_count - 1):
            some = draw.permutation(data.patient_count)[:size].tolist()
            found, part = step(data, some)
            assert all(seen[record] == gradient for record, gradient in found.items())
            others, rest = step(data, [p for p in draw.permutation(everyone).tolist() if p not in some])
            assert all(seen[record] == gradient for record, gradient in others.items())
            assert step.is_rounding_alone(part + rest - total, len(data))


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in MODELS for size in (1, ROWS, 2 * ROWS)])
def test_where_all_logits_are_rounding_alone_one_patient_still_moves_the_sum_by_at_most_the_bound(
    name: str, size: int
) -> None:
    draw, study = np.random.default_rng(1), a_study(name)
    data, sizes = records(study, [1] * 34, draw, alike=True), (1, 7, 15, 31, 32, 33)
    for _ in range(2):
        step = Step(study, crafted(study, data.inputs[0][0], draw), size)
        loud = False
        for count in sizes:
            without, one_more = (step(data, list(range(n)))[1] for n in (count, count + 1))
            moved = one_more - without
            assert step.within_the_bound(moved)
            loud |= not step.within_the_bound(moved * 2)
        assert loud  # of the two classes one is always wrong: clipping was at work


@pytest.mark.parametrize("name", MODELS)
def test_where_all_logits_are_rounding_alone_one_patient_still_moves_the_counts_by_at_most_one_unit(name: str) -> None:
    draw, study = np.random.default_rng(2), a_study(name)
    layout, data = Layout.of(study), records(study, [1] * 65, draw, alike=True)
    units = np.concatenate([np.full(layout.sizes[part], unit) for part, unit in layout.deviations(1.0).items()])
    for _ in range(3):
        model = pack(crafted(study, data.inputs[0][0], draw), study)
        counts = {}
        for count in (1, 7, 15, 31, 32, 64):
            for number in (count, count + 1):
                some = dataclasses.replace(data, train=np.arange(65) >= number)
                counts[number] = noised_counts(model, study, some, CPU, noise_multiplier=1e-9, seed=bytes(32))
            moved = (counts[count + 1] - counts[count]) / units
            assert 0 < np.sum(moved**2) <= 1 + 1e-9


@pytest.mark.parametrize(("name", "width"), CASES)
def test_a_records_probabilities_depend_on_neither_its_place_nor_its_neighbours(
    name: str, width: int, three_threads: None
) -> None:
    draw, study = np.random.default_rng(3), a_study(name, width)
    data = records(study, [1] * 70, draw)
    model = pack(crafted(study, data.inputs[0][0], draw), study)
    whole = evaluation.measured(model, study, data, CPU)
    for size in (1, 3, 15, 16, 33, 69, 70):
        some = draw.permutation(70)[:size]
        inputs, labels = data.take(some)
        part = dataclasses.replace(data, inputs=inputs, labels=labels, patients=data.patients[some])
        assert np.array_equal(evaluation.measured(model, study, part, CPU), whole[some])


def test_a_kernel_that_goes_by_the_number_of_rows_is_seen_unless_pieces_are_of_one_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = a_study("logistic")
    draw = np.random.default_rng(4)
    data = records(study, [1] * 16, draw, alike=True)
    step = Step(study, crafted(study, data.inputs[0][0], draw))

    def another_path(_: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (given[0] * (1 + 2**-20 if len(given[0]) >= 16 else 1 - 2**-20),)

    step.model.register_forward_pre_hook(another_path)

    def moved() -> Vector:
        return step(data, list(range(16)))[1] - step(data, list(range(15)))[1]

    assert step.within_the_bound(moved())
    monkeypatch.setattr(Batch, "padded_microbatches", Batch.microbatches)
    assert not step.within_the_bound(moved())


class Always:
    """The same turn and shift for every image."""

    def uniform(self, low: float, high: float, size: Any) -> Any:
        return np.full(size, low + 0.3 * (high - low))


@pytest.mark.parametrize("edge", [12, 21, 64])
def test_an_image_is_turned_the_same_whoever_is_beside_it(edge: int) -> None:
    study, draw = a_study("small-cnn", augment="light"), np.random.default_rng(5)
    images = draw.random((40, 1, edge, edge), dtype=np.float32)
    data = dataclasses.replace(records(study, [1] * 40, draw), inputs=(images,))

    def turned(patients: list[int]) -> npt.NDArray[np.float32]:
        batch = Batch(study, data, chosen(data, patients), CPU, Always())  # type: ignore[arg-type]
        return np.concatenate([p.inputs[0][: len(p.owners)].numpy() for p in batch.padded_microbatches(ROWS)])

    whole = turned(list(range(40)))
    assert not np.array_equal(whole, images)
    for size in (1, 15, 16, 39):
        some = draw.permutation(40)[:size].tolist()
        assert np.array_equal(turned(some), whole[some])


def test_the_shape_of_a_piece_comes_from_no_more_than_one_patient() -> None:
    study, draw = a_study("mlp"), np.random.default_rng(6)
    counts = [1, 33, 5, 32, 64, 65, 1, 1]
    data = records(study, counts, draw)
    for size, expected in ((ROWS, [32, 64, 32, 32, 64, 128, 32]), (1, [1, 64, 8, 32, 64, 128, 1, 1])):
        batch = Batch(study, data, chosen(data, list(range(8))), CPU, draw)
        pieces = list(batch.padded_microbatches(size))
        assert [len(p.targets[0]) for p in pieces] == [len(p.inputs[0]) for p in pieces] == expected
        assert sum(len(p.owners) for p in pieces) == sum(counts)
        assert all(not p.inputs[0][len(p.owners) :].any() for p in pieces)


def test_a_model_too_large_for_a_piece_of_several_patients_takes_each_alone() -> None:
    study, data = a_study("mlp"), records(a_study("mlp"), [1], np.random.default_rng(7))
    assert trainer.private_rows(study, data) == ROWS
    wide = dataclasses.replace(data, inputs=(np.broadcast_to(data.inputs[0][:, :1], (1, 2**17)),))
    assert trainer.private_rows(study, wide) == 1


def test_a_large_batch_of_series_is_computed_in_larger_pieces_whatever_is_drawn() -> None:
    study, draw = a_study("gru", expected_batch=4 * ROWS), np.random.default_rng(8)
    assert {trainer.private_rows(study, records(study, [1] * n, draw)) for n in (1, 70, 300)} == {2 * ROWS}
