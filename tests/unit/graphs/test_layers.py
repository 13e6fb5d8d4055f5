"""Every layer of a graph: its sizes are torch's, and its per-sample gradients are known."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.support import graphs
from torch import nn

from consilium_shared.graphs import graph as graph_module
from consilium_shared.graphs import network
from consilium_shared.graphs.node import RESERVED
from dpsgd.independence import check

IDS = [name for name, _ in graphs.ALL]
GRAPHS = [graph for _, graph in graphs.ALL]


def _inputs(graph: graph_module.Graph, count: int, seed: int = 0) -> list[torch.Tensor]:
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.normal(size=(count, *shape)).astype(np.float32)) for shape in graph.inputs.values()]


def test_every_layer_of_the_list_is_tested() -> None:
    kinds = get_args(get_args(graph_module.Layer)[0])
    named = [name for kind in kinds for name in get_args(kind.model_fields["layer"].annotation)]
    assert sorted(named) == sorted(graphs.LAYERS)
    assert set(network._MAKERS) == set(kinds)


@pytest.mark.parametrize("given", GRAPHS, ids=IDS)
def test_sizes_are_torchs(given: dict[str, Any]) -> None:
    graph = graphs.parsed(given)
    network.check(graph, list(graph.inputs))
    model = network.Network(graph, list(graph.inputs)).eval()
    seen: dict[str, tuple[int, ...]] = {}

    def keep(name: str) -> Any:
        return lambda _, __, found: seen.update({name: tuple((found[0] if isinstance(found, tuple) else found).shape)})

    for each in graph.sized:
        model._modules[each.node.name].register_forward_hook(keep(each.node.name))  # type: ignore[union-attr]
    model(*_inputs(graph, 3))
    assert seen == {each.node.name: (3, *each.shape) for each in graph.sized}


@pytest.mark.parametrize("given", GRAPHS, ids=IDS)
def test_no_record_moves_anothers_gradient(given: dict[str, Any]) -> None:
    graph = graphs.parsed(given)
    model = network.Network(graph, list(graph.inputs))
    targets = torch.tensor([0, 1, 1])
    check(model, nn.CrossEntropyLoss(reduction="none"), _inputs(graph, 3), [targets])


@pytest.mark.parametrize("given", GRAPHS, ids=IDS)
def test_the_same_graph_written_out_is_the_same_model(given: dict[str, Any]) -> None:
    graph = graphs.parsed(given)
    again = graphs.parsed(graph.model_dump(mode="json"))
    assert again == graph
    models = []
    for each in (graph, again):
        torch.manual_seed(1)
        models.append(network.Network(each, list(each.inputs)).eval())
    assert torch.equal(*(model(*_inputs(graph, 2)) for model in models))
    assert torch.equal(copy.deepcopy(models[0])(*_inputs(graph, 2)), models[0](*_inputs(graph, 2)))


def test_no_node_has_a_name_that_a_torch_module_has_for_itself() -> None:
    import re

    own = {name for name in dir(nn.Module()) if re.fullmatch(r"[a-z][a-z0-9_]*", name)}
    assert own == RESERVED


def test_a_sum_over_neighbours_is_known_and_is_each_molecules_own() -> None:
    """Graph convolution on a padded dense adjacency: A X W."""
    graph = graphs.parsed(
        {
            "format": 1,
            "inputs": {"adjacency": [5, 5], "atoms": [5, 3]},
            "nodes": [
                {"name": "first", "layer": "matmul", "of": ["adjacency", "atoms"]},
                {"name": "hidden", "layer": "linear", "of": "first", "outputs": 4},
                {"name": "bent", "layer": "relu", "of": "hidden"},
                {"name": "second", "layer": "matmul", "of": ["adjacency", "bent"]},
                {"name": "whole", "layer": "sum", "of": "second", "axes": 0},
                {"name": "head", "layer": "linear", "of": "whole", "outputs": 2},
            ],
        }
    )
    model: Any = network.Network(graph, ["adjacency", "atoms"])
    check(model, nn.CrossEntropyLoss(reduction="none"), _inputs(graph, 3), [torch.tensor([0, 1, 1])])
    adjacency, atoms = _inputs(graph, 2)
    by_hand = torch.stack([
        model.head((a @ torch.relu(model.hidden(a @ x))).sum(0)) for a, x in zip(adjacency, atoms, strict=True)
    ])  # fmt: skip
    assert torch.allclose(model(adjacency, atoms), by_hand, atol=1e-5)
