"""A study may train a part of its model: what is frozen never changes, and only the rest is sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import studies
from tests.support.records import dataset
from torch import nn

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training.trainer import check_independence, train
from consilium_server.study.optimizer import ServerOptimizer
from consilium_shared import limits
from consilium_shared.errors import PeerError
from consilium_shared.models import build
from consilium_shared.models.adaptation import LowRank
from consilium_shared.models.vector import check, fingerprint, pack, to_vector, trained, width, with_trained
from consilium_shared.privacy.plan import NonPrivatePlan, PrivacyPlan
from consilium_shared.protocol.summand import bound, fixed_point, read, segments
from consilium_shared.secagg.ring import DTYPES
from consilium_shared.study import Study

CPU = torch.device("cpu")
PRIVATE = {"epsilon": 3.0, "delta": 1e-3, "clipping_norm": 0.5}
PLAN = PrivacyPlan(
    sampling_rate=0.3, clipping_norm=0.5, noise_multiplier=1.0, steps_per_round=3, rounds=2, delta=1e-3, epsilon=3.0
)
DATA: dict[str, dict[str, Any]] = {
    "mlp": {"features": [{"name": n} for n in "abcd"]},
    "logistic": {"features": [{"name": n} for n in "abcd"]},
    "small-cnn": {"image": {"size": 12}},
    "resnet18-gn": {"image": {"size": 8}},
    "gru": {"series": {"variables": [{"name": "hr"}], "bins": 4, "step_minutes": 60}},
}
LORA: dict[str, Any] = {"trainable": "lora", "lora_rank": 2}
HEAD: dict[str, Any] = {"trainable": "head"}
PARTS = [("mlp", HEAD), ("small-cnn", HEAD), ("gru", HEAD), ("mlp", LORA), ("small-cnn", LORA)]


def study(name: str, privacy: dict[str, Any] | None = None, optimizer: str = "sgd", **model: Any) -> Study:
    local: dict[str, Any] = {"name": optimizer, "lr": 0.2, "weight_decay": 0.1}
    return studies.study(
        {"name": name, "hidden": 8, **model},
        DATA[name],
        training={"rounds": 2, "steps_per_round": 3, "expected_batch": 8, "optimizer": local, "proximal": 0.1},
        privacy=privacy or {"mode": "none"},
        aggregation={"optimizer": {"name": "fedadam", "lr": 0.1}, "weighting": "equal"},
    )


def records(name: str, patients: int = 30) -> ArrayDataset:
    shape = {"mlp": (4,), "small-cnn": (1, 12, 12), "gru": (4, 3)}[name]
    inputs = np.random.default_rng(0).random((patients, *shape), dtype=np.float32)
    return dataset(
        inputs=inputs,
        statics=None,
        labels=(inputs.reshape(patients, -1)[:, 0] > 0.5).astype(np.int64),
        patients=np.arange(patients),
        patient_count=patients,
        train=np.ones(patients, dtype=bool),
    )


def updates(given: Study, start: np.ndarray, sites: int = 2) -> list[np.ndarray]:
    plan = NonPrivatePlan(steps_per_round=3, rounds=2) if given.privacy.mode == "none" else PLAN
    about: dict[str, Any] = {"round": 1, "device": CPU}
    data, model = records(given.model.name), pack(start, given)
    return [train(model, given, data, plan, site=str(i), seed=bytes([i] * 32), **about).update for i in range(sites)]


def stepped(given: Study, start: np.ndarray) -> np.ndarray:
    """The model after a round as sites, sum and server compute it, without masks."""
    (segment, *_) = segments(given, "training", 1, width(given))
    found = updates(given, start)
    encoding, total = fixed_point(given, len(found)), np.zeros(segment.length, dtype=DTYPES[segment.bits])
    encoded = np.empty_like(total)
    for update in found:
        bound(update, given)
        encoding.encode(update, encoded, 1.0)
        total += encoded
    opened = read(given, "training", 2, 2, {"update": total, "weight": np.asarray([2], dtype=np.uint64)})
    assert opened.implausible is None
    server = ServerOptimizer.from_study(given.aggregation.optimizer)
    part = server.step(trained(start, given), opened.mean)
    assert all(state.shape == (width(given),) for state in server.state().values())
    return with_trained(start, part, given)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_round_changes_every_trained_parameter_and_no_bit_of_a_frozen_one(
    name: str, part: dict[str, Any], privacy: dict[str, Any] | None, optimizer: str
) -> None:
    given = study(name, privacy, optimizer, **part)
    before = to_vector(build(given))
    after, start = stepped(given, before), 0
    for key, parameter in build(given).named_parameters():
        place = slice(start, start + parameter.numel())
        if parameter.requires_grad:
            assert after[place].tobytes() != before[place].tobytes(), key
        else:
            assert after[place].tobytes() == before[place].tobytes(), key
        start = place.stop


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_an_update_has_the_trained_parameters_alone(name: str, part: dict[str, Any]) -> None:
    given = study(name, PRIVATE, **part)
    start = to_vector(build(given))
    assert {update.shape for update in updates(given, start)} == {(width(given),)}
    assert width(given) < start.size


@pytest.mark.parametrize("name", sorted(DATA))
def test_the_head_is_the_last_linear_layer_of_every_model(name: str) -> None:
    model = build(study(name, **HEAD))
    names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == ["head.weight", "head.bias"]
    assert width(study(name, **HEAD)) == sum(p.numel() for p in model.get_submodule("head").parameters())


@pytest.mark.parametrize(("name", "rank"), [("mlp", 3), ("small-cnn", 1), ("small-cnn", 4), ("resnet18-gn", 2)])
def test_a_low_rank_study_sends_rank_times_inputs_and_outputs_of_each_weight_and_the_head(name: str, rank: int) -> None:
    plain = build(study(name))
    head = plain.get_submodule("head")
    expected: int = sum(p.numel() for p in head.parameters())
    for key, module in plain.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and key != "head":
            outputs, inputs = module.weight.flatten(1).shape
            expected += min(rank, outputs, inputs) * (outputs + inputs)
    assert width(study(name, trainable="lora", lora_rank=rank)) == expected


def test_a_resnet_sends_a_fortieth_with_rank_four_and_a_ten_thousandth_with_its_head() -> None:
    whole = width(study("resnet18-gn"))
    assert width(study("resnet18-gn", trainable="lora", lora_rank=4)) < whole / 40
    assert width(study("resnet18-gn", **HEAD)) < whole / 10_000


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet18-gn"])
def test_additions_of_low_rank_change_nothing_at_first(name: str) -> None:
    inputs = torch.rand((3, *{"mlp": (4,), "small-cnn": (1, 12, 12), "resnet18-gn": (1, 8, 8)}[name]))
    with torch.no_grad():
        assert torch.equal(build(study(name))(inputs), build(study(name, **LORA))(inputs))


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)], ids=str)
def test_an_addition_of_low_rank_is_a_weight_of_that_rank(layer: nn.Linear | nn.Conv2d) -> None:
    adapted = LowRank(layer, 2).double()
    nn.init.normal_(adapted.up.weight)
    down, up = (adapted.get_submodule(part).get_parameter("weight") for part in ("down", "up"))
    addition = up.flatten(1) @ down.flatten(1)
    assert torch.linalg.matrix_rank(addition) == 2
    inputs = torch.rand((4, 5) if isinstance(layer, nn.Linear) else (4, 3, 9, 9), dtype=torch.float64)
    expected = adapted(inputs)
    with torch.no_grad():
        layer.weight += addition.view_as(layer.weight)
        assert torch.allclose(layer(inputs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "part"), [*PARTS, ("resnet18-gn", LORA), ("resnet18-gn", HEAD)])
def test_clipping_bounds_a_patient_in_a_model_that_is_trained_in_part(name: str, part: dict[str, Any]) -> None:
    check_independence(study(name, PRIVATE, **part))


def test_removing_one_patient_moves_an_update_without_noise_by_at_most_the_bound() -> None:
    given = study("small-cnn", PRIVATE, **LORA)
    quiet = dataclasses.replace(PLAN, sampling_rate=1.0, noise_multiplier=1e-9, steps_per_round=1)
    data, model = records("small-cnn", 10), pack(to_vector(build(given)), given)
    keep = np.arange(len(data.labels[0])) != 4
    fewer = dataclasses.replace(
        data,
        inputs=(data.inputs[0][keep],),
        labels=(data.labels[0][keep],),
        patients=np.arange(9),
        patient_count=9,
        train=np.ones(9, dtype=bool),
    )
    found = [
        train(model, given, each, quiet, round=1, site="a", device=CPU, seed=bytes(32)).update for each in (data, fewer)
    ]
    rate = given.training.optimizer.lr / given.training.expected_batch
    moved = float(np.linalg.norm((found[0] - found[1]).astype(np.float64)))
    assert 0 < moved <= rate * quiet.clipping_norm * (1 + 1e-4)


@pytest.mark.parametrize("name", ["gru", "logistic"])
def test_a_model_without_other_layers_of_the_kind_takes_no_low_rank(name: str) -> None:
    with pytest.raises(ValidationError, match="take head"):
        study(name, **LORA)


@pytest.mark.parametrize(
    "model", [{"trainable": "lora"}, {"lora_rank": 4}, {"trainable": "lora", "lora_rank": 65}, {"trainable": "tail"}]
)
def test_a_contract_with_half_of_what_low_rank_takes_is_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        study("mlp", **model)


def test_the_bound_on_parameters_is_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given = study("mlp", **HEAD)
    data = pack(to_vector(build(given)), given)
    monkeypatch.setattr(limits, "PARAMETERS", width(given))
    with pytest.raises(PeerError, match="parameters"):
        check(data, given)


def test_the_fingerprint_is_of_names_shapes_and_numbers_and_not_of_the_study() -> None:
    given = study("mlp", seed=1)
    vector = to_vector(build(given))
    assert fingerprint(vector, given) == fingerprint(vector, study("mlp", PRIVATE, **HEAD))
    assert fingerprint(vector, given) != fingerprint(-vector, given)
