"""The models: shapes, names, repeatable weights; recurrent layers are torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support import studies
from torch import nn

from consilium_shared import limits, task
from consilium_shared.errors import PeerError
from consilium_shared.models import build
from consilium_shared.models.vector import check, pack, to_vector
from consilium_shared.study import Study
from consilium_tasks.sequence_classification.models import open_forget_gates

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
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("small-cnn", IMAGE),
    ("resnet18-gn", IMAGE),
    ("lstm", SERIES),
    ("gru", SERIES),
    ("logistic", TABLE),
    ("mlp", TABLE),
]


def study(model: str, data: dict[str, Any], **changes: Any) -> Study:
    return studies.study({"name": model, **changes}, {"label": {"column": "y", "classes": ["0", "1", "2"]}, **data})


def example(given: Study, count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand((count, *form), generator=generator) for form in task.of(given).shapes(given))


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


@pytest.mark.parametrize(("name", "plain"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_a_recurrent_models_weights_load_into_the_plain_layer_that_gives_the_same(
    name: str, plain: type[nn.LSTM | nn.GRU]
) -> None:
    given = study(name, SERIES, hidden=7, layers=2)
    model, (series, _) = build(given), example(given, 3)
    prefix = "recurrent."
    weights = {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}
    twin = plain(task.of(given).shapes(given)[0][1], 7, 2, batch_first=True)
    twin.load_state_dict(weights, strict=True)
    assert type(model.recurrent) is plain
    assert torch.equal(twin(series)[0], model.recurrent(series)[0])


def test_every_forget_gate_of_a_fresh_lstm_has_bias_one_and_no_other_gate_has() -> None:
    layer = build(study("lstm", SERIES, hidden=7, layers=2)).recurrent
    assert isinstance(layer, nn.LSTM)
    for index in range(2):
        bias = getattr(layer, f"bias_ih_l{index}") + getattr(layer, f"bias_hh_l{index}")
        i, f, g, o = bias.detach().chunk(4)
        assert torch.equal(f, torch.ones(7))
        assert torch.cat([i, g, o]).abs().max() < 2 * 7**-0.5


def test_an_lstm_with_its_forget_gates_open_keeps_in_its_cell_what_it_saw_first() -> None:
    """torch's order of gates is i, f, g, o: of another gate's bias, the cell would not stay."""
    layer = nn.LSTM(2, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    open_forget_gates(layer)
    _, (_, cell) = layer(torch.zeros(4, 1, 2), (torch.zeros(1, 1, 3), torch.ones(1, 1, 3)))
    assert torch.allclose(cell, torch.sigmoid(torch.tensor(1.0)).pow(4).expand(1, 1, 3))


def test_importing_every_task_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from consilium_shared import models, task; "
        "[task.get(name) for name in task.names()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_of_more_parameters_than_anybody_carries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = study("mlp", TABLE)
    vector = to_vector(build(given))
    monkeypatch.setattr(limits, "PARAMETERS", len(vector))
    check(pack(vector, given), given)
    monkeypatch.setattr(limits, "PARAMETERS", len(vector) - 1)
    with pytest.raises(PeerError, match="parameters"):
        check(pack(vector, given), given)
