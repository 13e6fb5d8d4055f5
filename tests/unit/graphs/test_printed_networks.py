"""Networks as textbooks print them are files, and train with privacy through their task's own path."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import studies
from tests.support.graphs import LAYERS

import dpsgd
from consilium_client.agent.estimates import make_plan
from consilium_client.training import invented
from consilium_client.training.trainer import train
from consilium_shared import study_file
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import network
from consilium_shared.graphs.graph import Graph
from consilium_shared.models import build, onnx_graph
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

FOLDER = Path(__file__).parents[3] / "examples" / "graphs"
CLASSES = {"two-convolutions-28": 2, "lesion-256": 2, "table-10": 2, "lenet-32": 10, "three-convolutions-224": 5}
PARAMETERS = {
    "two-convolutions-28": 1_199_882 - 128 * 10 - 10 + 128 * 2 + 2,
    "lesion-256": 31_509_697,
    "table-10": 231,
    "lenet-32": 62_006,
    "three-convolutions-224": 11_169_605,
}
GREY = ("two-convolutions-28", "table-10")
"""Those whose inputs a study's data can give."""
SMALLER = {"lesion-256": 32, "three-convolutions-224": 32}
"""Edge at which the large ones train here: the same layers."""


def graph_of(name: str, edge: int | None = None) -> Graph:
    graph = load_yaml(FOLDER / f"{name}.yaml", Graph)
    if edge is None:
        return graph
    content = graph.model_dump(mode="json")
    return Graph.model_validate({**content, "inputs": {"image": [content["inputs"]["image"][0], edge, edge]}})


def study_of(name: str) -> Study:
    graph = graph_of(name, SMALLER.get(name))
    (shape,) = graph.inputs.values()
    image = {"image": {"size": shape[-1], "channels": shape[0]}}
    data = image if len(shape) == 3 else {"features": [{"name": f"f{n}"} for n in range(shape[0])]}
    classes = {"column": "y", "classes": [f"class {n}" for n in range(CLASSES[name])]}
    return studies.study(
        {"name": "graph", "graph": graph.model_dump(mode="json")},
        {**data, "label": classes},
        training={"rounds": 1, "steps_per_round": 2, "expected_batch": 8},
        privacy={"epsilon": 3.0, "delta": 1e-3, "clipping_norm": 1.0},
    )


def test_there_is_a_file_for_each() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*CLASSES, "study"}


@pytest.mark.parametrize("name", CLASSES)
def test_it_has_the_sizes_that_were_printed(name: str) -> None:
    graph = graph_of(name)
    network.check(graph, list(graph.inputs))
    assert graph.output == (CLASSES[name],)
    assert graph.parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", GREY)
def test_it_trains_two_private_steps_and_leaves_as_onnx(name: str) -> None:
    study = study_of(name)
    data, plan = invented.records(study, [1] * 60), make_plan(study, 60)
    assert isinstance(plan, PrivacyPlan)
    start = pack(to_vector(build(study)), study)
    result = train(start, study, data, plan, round=1, site="a", device=torch.device("cpu"), seed=bytes(range(32)))
    assert result.steps == 2
    assert np.abs(result.update).max() > 0
    graph = onnx_graph.to_onnx(start, study)
    assert onnx_graph.check(graph, start, study) <= onnx_graph.TOLERANCE


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - GREY))
def test_colour_ones_train_two_private_steps_in_the_engine(name: str) -> None:
    graph = graph_of(name, 32)
    model = network.Network(graph, ["image"])
    pictures, classes = torch.rand(24, 3, 32, 32), torch.arange(24) % CLASSES[name]
    before = torch.cat([each.detach().flatten().clone() for each in model.parameters()])
    training = dpsgd.PrivateTraining(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.nn.CrossEntropyLoss(reduction="none"),
        records=24,
        expected_batch=8,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        example=(pictures[:3], classes[:3]),
    )
    for _ in range(2):
        training.step(lambda drawn: (pictures[drawn], classes[drawn]))
    after = torch.cat([each.detach().flatten() for each in model.parameters()])
    assert bool(torch.isfinite(after).all())
    assert float((after - before).abs().max()) > 0


def test_one_number_and_a_zero_are_a_sigmoid() -> None:
    graph = graph_of("table-10")
    model: Any = network.Network(graph, ["record"])
    rows = torch.randn(5, 10)
    logits = model(rows)
    z = model.head(torch.relu(model.hidden2(torch.relu(model.hidden1(rows)))))
    assert torch.allclose(torch.softmax(logits, 1)[:, 1:], torch.sigmoid(z), atol=1e-6)


# -- a graph as a file of its own


def test_a_study_names_its_graph_as_a_file_beside_it(tmp_path: Path) -> None:
    study = study_file.read(FOLDER / "study.yaml")
    inline = {**study.contract, "model": {**study.contract["model"]}}
    assert isinstance(inline["model"]["graph"], dict)
    assert Study.from_contract(study.contract).digest == study.digest
    (tmp_path / "study.yaml").write_text((FOLDER / "study.yaml").read_text())
    with pytest.raises(ConfigurationError, match=r"cannot read .*table-10\.yaml"):
        study_file.read(tmp_path / "study.yaml")
    text = (FOLDER / "table-10.yaml").read_text()
    (tmp_path / "table-10.yaml").write_text(text.replace("layer: relu, of: hidden1", "layer: relux, of: hidden1"))
    with pytest.raises(ConfigurationError, match=r"table-10\.yaml:\d+: nodes.1: .*relux"):
        study_file.read(tmp_path / "study.yaml")
    (tmp_path / "table-10.yaml").write_text(text)
    assert study_file.read(tmp_path / "study.yaml").digest == study.digest
    assert study_file.read_as(tmp_path / "study.yaml", study.digest).digest == study.digest


def test_every_layer_leaves_as_onnx() -> None:
    """All in one graph: each takes a part of the row."""
    nodes: list[dict[str, Any]] = []
    ends, start = [], 0
    for number, (layer, shapes, options) in enumerate(
        (layer, shapes, options) for layer, each in LAYERS.items() for shapes, options in each
    ):
        of = []
        for part, shape in enumerate(shapes if isinstance(shapes[0], list) else [shapes]):
            size = math.prod(shape)
            cut, formed = f"cut{number}_{part}", f"formed{number}_{part}"
            nodes.append(
                {"name": cut, "layer": "slice", "of": "record", "axis": 0, "start": start, "stop": start + size}
            )
            nodes.append({"name": formed, "layer": "reshape", "of": cut, "to": shape})
            of.append(formed)
            start += size
        nodes.append({"name": f"tested{number}", "layer": layer, "of": of, **options})
        nodes.append({"name": f"flat{number}", "layer": "flatten", "of": f"tested{number}"})
        ends.append(f"flat{number}")
    for half, some in enumerate((ends[:40], ends[40:])):
        nodes.append({"name": f"joined{half}", "layer": "concat", "of": some})
    nodes.append({"name": "joined", "layer": "concat", "of": ["joined0", "joined1"]})
    nodes.append({"name": "head", "layer": "linear", "of": "joined", "outputs": 2})
    study = studies.study(
        {"name": "graph", "graph": {"format": 1, "inputs": {"record": [start]}, "nodes": nodes}},
        {"features": _numbers(start)},
    )
    weights = pack(to_vector(build(study)), study)
    assert onnx_graph.check(onnx_graph.to_onnx(weights, study), weights, study) <= onnx_graph.TOLERANCE


def _numbers(count: int) -> list[dict[str, Any]]:
    """Features that give a row so many numbers: columns of five hundred categories, and of single numbers."""
    many, rest = divmod(count, 500)
    categories = [f"c{n}" for n in range(500)]
    return [
        *({"name": f"k{n}", "categories": categories} for n in range(many)),
        *({"name": f"f{n}"} for n in range(rest)),
    ]
