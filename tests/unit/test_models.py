"""The models: shapes, names, repeatable weights, and exact gradients of the recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from consilium_shared import limits
from consilium_shared.errors import PeerError
from consilium_shared.models import build, shape
from consilium_shared.models.sequences import GRU, LSTM
from consilium_shared.models.vector import check, pack, to_vector
from consilium_shared.study import Study

IMAGE = {"image": {"size": 28}}
SERIES = {
    "series": {
        "variables": [{"name": "hr"}, {"name": "sbp"}],
        "bins": 6,
        "step_minutes": 60,
        "statics": [{"name": "age"}, {"name": "sex", "categories": ["f", "m"]}],
    }
}
TABLE = {"features": [{"name": "age"}, {"name": "pain", "categories": ["a", "b", "c"]}]}
TASKS = {"image": "image-classification", "series": "sequence-classification", "features": "tabular-classification"}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("small-cnn", IMAGE),
    ("resnet18-gn", IMAGE),
    ("lstm", SERIES),
    ("gru", SERIES),
    ("logistic", TABLE),
    ("mlp", TABLE),
]


def study(model: str, data: dict[str, Any], **changes: Any) -> Study:
    return Study.model_validate(
        {
            "study": "test",
            "task": TASKS[next(iter(data))],
            "model": {"name": model, **changes},
            "data": {"asset": "a", "label": {"column": "y", "classes": ["0", "1", "2"]}, **data},
            "training": {"rounds": 1, "steps_per_round": 1, "expected_batch": 4, "optimizer": {"lr": 0.1}},
            "privacy": {"mode": "none"},
        }
    )


def example(given: Study, count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    size, series = shape.image_size(given), given.data.series
    if size:
        return (torch.rand((count, 1, size, size), generator=generator),)
    if series is not None:
        inputs = torch.randn((count, series.bins, shape.series_inputs(given)), generator=generator)
        return inputs, torch.randn((count, shape.statics_width(given)), generator=generator)
    return (torch.randn((count, shape.tabular_width(given)), generator=generator),)


@pytest.mark.parametrize(("name", "data"), MODELS)
def test_gives_one_row_of_logits_for_each_record(name: str, data: dict[str, Any]) -> None:
    given = study(name, data)
    logits = build(given)(*example(given, 5))
    assert logits.shape == (5, 3)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("name", "data"), MODELS)
def test_initial_weights_depend_on_the_seed_alone_and_leave_torchs_generator(name: str, data: dict[str, Any]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = to_vector(build(study(name, data, seed=3)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert np.array_equal(to_vector(build(study(name, data, seed=3))), first)
    if name != "logistic":  # starts at zero
        assert not np.array_equal(to_vector(build(study(name, data, seed=4))), first)


@pytest.mark.parametrize(("name", "data"), MODELS)
def test_has_no_buffers_and_no_in_place_activation(name: str, data: dict[str, Any]) -> None:
    model = build(study(name, data))
    assert list(model.buffers()) == []
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize("size", [8, 28, 65, 224])
def test_the_small_cnn_has_the_same_parameters_for_every_image_size(size: int) -> None:
    given = study("small-cnn", {"image": {"size": size}})
    model = build(given)
    assert model(*example(given, 2)).shape == (2, 3)
    assert 50_000 < to_vector(model).size < 100_000


@pytest.mark.parametrize("size", [28, 64])
def test_resnet18_has_eleven_million_parameters(size: int) -> None:
    given = study("resnet18-gn", {"image": {"size": size}})
    assert 11.1e6 < to_vector(build(given)).size < 11.3e6


@pytest.mark.parametrize(("name", "data"), [m for m in MODELS if m[0] not in ("logistic", "resnet18-gn")])
def test_more_layers_are_more_parameters(name: str, data: dict[str, Any]) -> None:
    assert to_vector(build(study(name, data, layers=2))).size > to_vector(build(study(name, data, layers=1))).size


def torch_twin(layer: GRU | LSTM) -> tuple[nn.Module, torch.Tensor]:
    """torch's own layer with the same weights, and the order of our gates in it."""
    width, inputs = layer.state.in_features, layer.inputs.in_features
    gates = list(range(3)) if isinstance(layer, GRU) else [0, 1, 3, 2]  # torch: i, f, g, o; ours: i, f, o, g
    order = torch.cat([torch.arange(g * width, (g + 1) * width) for g in gates])
    twin: nn.Module = (nn.GRU if isinstance(layer, GRU) else nn.LSTM)(inputs, width, batch_first=True).double()
    with torch.no_grad():
        twin.weight_ih_l0.copy_(layer.inputs.weight[order])
        twin.bias_ih_l0.copy_(layer.inputs.bias[order])
        twin.weight_hh_l0.copy_(layer.state.weight[order])
        twin.bias_hh_l0.copy_(torch.zeros(len(order)) if layer.state.bias is None else layer.state.bias[order])
    return twin, order


@pytest.mark.parametrize("kind", [GRU, LSTM])
def test_recurrent_layers_equal_torchs_in_value_and_gradient(kind: type[GRU | LSTM]) -> None:
    torch.manual_seed(0)
    layer = kind(5, 7).double()
    twin, order = torch_twin(layer)
    ours = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weight = torch.randn(3, 6, 7, dtype=torch.float64)
    a, (b, _) = layer(ours), twin(theirs)
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    for mine, other in ((layer.inputs.weight, twin.weight_ih_l0), (layer.state.weight, twin.weight_hh_l0)):
        assert torch.allclose(mine.grad[order], other.grad, rtol=0, atol=1e-12)
    if kind is GRU:
        assert torch.allclose(layer.state.bias.grad[order], twin.bias_hh_l0.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_two_recurrent_layers_pass_the_numerical_gradient_check(name: str) -> None:
    given = study(name, SERIES, hidden=3, layers=2)
    model = build(given).double()
    inputs = tuple(t.double().requires_grad_() for t in example(given, 2))
    assert torch.autograd.gradcheck(model, inputs)


def test_importing_the_package_and_its_shapes_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, consilium_shared.models.shape, consilium_shared.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_of_more_parameters_than_anybody_carries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = study("mlp", TABLE)
    vector = to_vector(build(given))
    monkeypatch.setattr(limits, "PARAMETERS", len(vector))
    check(pack(vector, given), given)
    monkeypatch.setattr(limits, "PARAMETERS", len(vector) - 1)
    with pytest.raises(PeerError, match="parameters"):
        check(pack(vector, given), given)
