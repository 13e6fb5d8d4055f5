"""What a hostile coordinator may write into a graph: each is refused before torch makes anything."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from pydantic import ValidationError
from tests.support import graphs

from consilium_client.policy import SitePolicy, check_contract
from consilium_shared import limits
from consilium_shared.errors import PeerError, PolicyRefusal
from consilium_shared.graphs.graph import Graph
from consilium_shared.study import Study

ROW: dict[str, Any] = {
    "format": 1,
    "inputs": {"record": [12]},
    "nodes": [
        {"name": "hidden", "layer": "linear", "of": "record", "outputs": 4},
        {"name": "head", "layer": "linear", "of": "hidden", "outputs": 2},
    ],
}


def with_nodes(*nodes: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"format": 1, "inputs": inputs or {"record": [12]}, "nodes": list(nodes)}


def changed(**changes: Any) -> dict[str, Any]:
    graph = deepcopy(ROW)
    graph["nodes"][0] |= changes
    return graph


def layer(name: str, of: Any = "record", **options: Any) -> dict[str, Any]:
    return {"name": "a", "layer": name, "of": of, **options}


IMAGE = {"image": [1, 64, 64]}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a circle": (changed(of=["record", "head"]), "takes head, and neither"),
    "itself": (changed(of="hidden"), "takes hidden"),
    "nobody": (changed(of="nothing"), "takes nothing"),
    "nothing": (changed(of=[]), "at least 1 item"),
    "two of one name": (with_nodes(*ROW["nodes"], {**ROW["nodes"][1], "of": "head"}), "have the name head"),
    "an input's name": (changed(name="record"), "have the name record"),
    "a node that leads nowhere": (with_nodes({**ROW["nodes"][0], "name": "idle"}, *ROW["nodes"]), "idle leads to"),
    "an input that leads nowhere": ({**ROW, "inputs": {"record": [12], "more": [3]}}, "more leads to nothing"),
    "no node": (with_nodes(), "at least 1 item"),
    "a later format": ({**ROW, "format": 2}, "upgrade"),
    "format 0": ({**ROW, "format": 0}, "greater than or equal to 1"),
    "a key more": ({**ROW, "code": "import os"}, "Extra inputs"),
    "an option more": (changed(forward="lambda x: x"), "Extra inputs"),
    "an unknown layer": (changed(layer="batch_norm"), "does not match any of the expected tags"),
    "a class by its path": (changed(layer="torch.nn.Linear"), "does not match any of the expected tags"),
    "a layer that is no text": (changed(layer=["linear"]), "tag"),
    "a module's own name": (changed(name="forward"), "a name that a model has for itself"),
    "a dunder": (changed(name="__class__"), "lower-case letters"),
    "a dotted name": (changed(name="head.weight"), "lower-case letters"),
    "a name with an escape": (changed(name="a\x1b[31m"), "lower-case letters"),
    "a name with another script": (changed(name="héad"), "lower-case letters"),
    "a long name": (changed(name="a" * 64), "lower-case letters"),
    "an empty name": (changed(name=""), "lower-case letters"),
    "outputs of the wrong type": (changed(outputs="many"), "valid integer"),
    "outputs of a fraction": (changed(outputs=2.5), "valid integer"),
    "no outputs": (changed(outputs=0), "greater than or equal to 1"),
    "negative outputs": (changed(outputs=-4), "greater than or equal to 1"),
    "outputs without end": (changed(outputs=10**30), "less than or equal"),
    "outputs that are a list": (changed(outputs=[4]), "valid integer"),
    "outputs left out": (with_nodes({"name": "head", "layer": "linear", "of": "record"}), "Field required"),
    "NaN": (with_nodes(layer("affine", scale=float("nan"))), "finite number"),
    "an infinity": (with_nodes(layer("affine", shift=float("inf"))), "finite number"),
    "a large constant": (with_nodes(layer("affine", scale=1e300)), "less than or equal"),
    "a rate of one": (with_nodes(layer("dropout", rate=1.0)), "less than 1"),
    "a rate below zero": (with_nodes(layer("dropout", rate=-0.1)), "greater than or equal to 0"),
    "an eps of zero": (with_nodes(layer("layer_norm", eps=0.0)), "greater than or equal"),
    "a negative axis, which could be the batch": (with_nodes(layer("softmax", axis=-1)), "greater than or equal to 0"),
    "an axis that is not there": (with_nodes(layer("softmax", axis=1)), "not different axes of 12"),
    "an axis twice": (with_nodes(layer("mean", axes=[0, 0])), "not different axes"),
    "a batch that is taken apart": (with_nodes(layer("reshape", to=[24])), "cannot make 24 of 12"),
    "a side that is left open": (with_nodes(layer("reshape", to=[-1])), "greater than or equal to 1"),
    "an order with an axis less": (with_nodes(layer("permute", "image", order=[0, 1]), inputs=IMAGE), "axis once"),
    "a place beyond the end": (with_nodes(layer("select", axis=0, at=12)), "place 12 of an axis of 12"),
    "a place before the start": (with_nodes(layer("select", axis=0, at=-1)), "greater than or equal to 0"),
    "an empty slice": (with_nodes(layer("slice", axis=0, start=3, stop=3)), "places 3 to 3"),
    "a kernel too large": (with_nodes(layer("conv2d", "image", outputs=1, kernel=65), inputs=IMAGE), "window"),
    "a kernel of zero": (with_nodes(layer("conv2d", "image", outputs=1, kernel=0), inputs=IMAGE), "greater than"),
    "a stride of zero": (with_nodes(layer("max_pool2d", "image", kernel=2, stride=0), inputs=IMAGE), "greater than"),
    "a kernel of a volume": (with_nodes(layer("conv2d", "image", outputs=1, kernel=[3] * 3), inputs=IMAGE), "or 2"),
    "no kernel": (with_nodes(layer("conv2d", "image", outputs=1), inputs=IMAGE), "Field required"),
    "groups that do not divide": (with_nodes(layer("group_norm", "image", groups=3), inputs=IMAGE), "do not divide"),
    "a convolution of a row": (with_nodes(layer("conv2d", outputs=1, kernel=1)), "takes channels and 2 dimensions"),
    "a recurrence over a row": (with_nodes(layer("lstm", hidden=4)), "takes steps and a width"),
    "a product of rows": (with_nodes(layer("matmul", ["record", "record"])), "takes matrices"),
    "one input of two": (with_nodes(layer("add")), "takes 2 to 64 inputs"),
    "heads that do not divide": (with_nodes(layer("attention", "s", heads=5), inputs={"s": [4, 6]}), "do not divide"),
    "an output padding of its stride": (
        with_nodes(layer("conv_transpose2d", "image", outputs=1, kernel=2, output_padding=1), inputs=IMAGE),
        "of its stride or more",
    ),
    "weights without end": (
        with_nodes(
            {"name": "a", "layer": "linear", "of": "record", "outputs": 60_000},
            {"name": "b", "layer": "linear", "of": "a", "outputs": 60_000},
        ),
        "node b brings the graph to more than 50000000 parameters",
    ),
    "a picture that grows": (
        with_nodes(
            {"name": "u0", "layer": "upsample", "of": "image", "factor": 16},
            {"name": "u1", "layer": "upsample", "of": "u0", "factor": 16},
            {"name": "u2", "layer": "upsample", "of": "u1", "factor": 16},
            inputs=IMAGE,
        ),
        "node u1 brings the graph to more than .* intermediate numbers",
    ),
    "padding without end": (with_nodes(layer("pad", axis=0, before=2**24, after=2**24),
                                       {"name": "b", "layer": "pad", "of": "a", "axis": 0, "before": 2**24},
                                       *({"name": f"c{n}", "layer": "identity", "of": "b" if n == 0 else f"c{n - 1}"}
                                         for n in range(8))), "intermediate numbers"),
    "work without end": (
        with_nodes(
            *({"name": f"c{n}", "layer": "conv2d", "of": "image" if n == 0 else f"c{n - 1}", "outputs": 64,
               "kernel": 31, "padding": 15} for n in range(10)),
            inputs={"image": [64, 512, 512]},
        ),
        "products",
    ),
    "scores without end": (
        with_nodes(layer("attention", "s", heads=2), inputs={"s": [2**16, 2]}),
        "node a brings the graph to more than .* intermediate numbers",
    ),
    "a side without end": ({**ROW, "inputs": {"record": [2**40]}}, "less than or equal"),
    "an input without sides": ({**ROW, "inputs": {"record": []}}, "at least 1 item"),
    "an input of six axes": ({**ROW, "inputs": {"record": [2] * 6}}, "at most 5 items"),
    "inputs without end": ({**ROW, "inputs": {f"r{n}": [1] for n in range(17)}}, "at most 16 items"),
    "nodes without end": (
        with_nodes(*({"name": f"r{n}", "layer": "relu", "of": "record"} for n in range(limits.GRAPH_NODES + 1))),
        "at most 500 items",
    ),
    "names without end": (
        with_nodes(*(
            {"name": f"{'n' * 55}{n}", "layer": "add", "of": [f"{'n' * 55}{n - 1}" if n else "record"] * 64}
            for n in range(300)
        )),
        "more than 131072 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_graph_is_refused_for(what: str) -> None:
    graph, why = HOSTILE[what]
    with pytest.raises(ValidationError, match=why):
        Graph.model_validate(graph)


def test_a_graph_that_is_no_graph_is_refused() -> None:
    values: tuple[Any, ...] = ([], "graph", None, 3, {"nodes": {}}, {"format": 1, "inputs": [], "nodes": []})
    for value in values:
        with pytest.raises(ValidationError):
            Graph.model_validate(value)


def test_a_node_that_many_take_is_counted_once() -> None:
    """Else sums of sums would be counted without end: each of these takes all thirty before it."""
    names = ["record"]
    nodes = []
    for number in range(200):
        nodes.append({"name": f"s{number}", "layer": "add", "of": (names[-30:] * 2)[:30] if number else ["record"] * 2})
        names.append(f"s{number}")
    assert Graph.model_validate(with_nodes(*nodes)).numbers == 200 * 12


# -- in a contract


@pytest.fixture
def contract() -> dict[str, Any]:
    return graphs.for_task("tabular-classification").contract


def test_a_contract_is_digested_with_its_graph(contract: dict[str, Any]) -> None:
    study = Study.from_contract(contract)
    assert study.contract == contract
    other = deepcopy(contract)
    dropped = next(node for node in other["model"]["graph"]["nodes"] if node["layer"] == "dropout")
    dropped["rate"] = 0.5
    assert Study.from_contract(other).digest != study.digest


@pytest.mark.parametrize("written", [("outputs", "8"), ("outputs", True), ("bias", 1), ("of", "flat0")])
def test_a_value_that_is_not_written_as_it_is_read_is_refused(
    contract: dict[str, Any], written: tuple[str, Any]
) -> None:
    node = next(node for node in contract["model"]["graph"]["nodes"] if node["layer"] == "linear")
    node[written[0]] = written[1]
    with pytest.raises(PeerError):
        Study.from_contract(contract)


def test_a_key_that_a_reader_would_have_to_guess_is_refused(contract: dict[str, Any]) -> None:
    node = next(node for node in contract["model"]["graph"]["nodes"] if node["layer"] == "linear")
    del node["outputs"]
    with pytest.raises(PeerError):
        Study.from_contract(contract)


def test_an_older_schema_has_no_graphs(contract: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="schema_version: 1 has no model graph, which came with 2"):
        Study.model_validate({**contract, "schema_version": 1, "aggregation": {}})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda graph: graph["inputs"].update(record=[99]), "the study's data give"),
        (lambda graph: graph["inputs"].update(row=graph["inputs"].pop("record")), "takes record, and neither"),
        (lambda graph: graph["nodes"][-1].update(outputs=7), "gives 7 of a record"),
    ],
)
def test_a_graph_for_other_data_is_refused(contract: dict[str, Any], change: Any, why: str) -> None:
    change(contract["model"]["graph"])
    with pytest.raises(ValidationError, match=why):
        Study.model_validate(contract)


def test_a_head_that_is_trained_alone_must_be_there(contract: dict[str, Any]) -> None:
    model = contract["model"]
    Study.model_validate({**contract, "model": {**model, "trainable": "head"}})
    Study.model_validate({**contract, "model": {**model, "trainable": "lora", "lora_rank": 2}})
    model["graph"]["nodes"][-1]["name"] = "last"
    for trainable in ({"trainable": "head"}, {"trainable": "lora", "lora_rank": 2}):
        with pytest.raises(ValidationError, match="the graph has none"):
            Study.model_validate({**contract, "model": {**model, **trainable}})


def test_a_site_takes_no_graph_unless_its_policy_says_so(contract: dict[str, Any]) -> None:
    study = Study.from_contract(contract)
    policy = {"budgets": {study.data.asset: {"epsilon": 100.0, "delta": 1e-3}}, "maximum_epsilon": 50.0}
    with pytest.raises(PolicyRefusal, match="brings its model as a graph") as refusal:
        check_contract(SitePolicy.model_validate(policy), study)
    assert refusal.value.remedy == "policy.allow_graphs: true"
    check_contract(SitePolicy.model_validate({**policy, "allow_graphs": True}), study)
