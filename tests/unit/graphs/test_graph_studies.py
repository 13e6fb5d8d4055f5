"""A graph in place of a task's own model: every rule that holds for those holds for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support import graphs
from tests.support.site import CONTRACT

from consilium_client.agent.estimates import make_plan
from consilium_client.commands import cli
from consilium_client.training import invented
from consilium_client.training.canaries import audit
from consilium_client.training.fit import fitting
from consilium_client.training.neighbours import dependence
from consilium_client.training.trainer import check_independence, train
from consilium_shared import task
from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import network
from consilium_shared.models import build
from consilium_shared.models.vector import check, pack, to_vector, trained, with_trained
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.protocol.messages import Refusal, Update
from consilium_shared.study import Study

CPU, SEED = torch.device("cpu"), bytes(range(32))
NAMES = [name for name in task.names() if not task.get(name).answers]
"""Tasks that train a model: a question's table is none."""


@pytest.fixture(params=NAMES)
def study(request: pytest.FixtureRequest) -> Study:
    return graphs.for_task(request.param)


def plan_of(study: Study) -> PrivacyPlan:
    plan = make_plan(study, 80)
    assert isinstance(plan, PrivacyPlan)
    return plan


def test_no_record_depends_on_another_as_for_built_in_models(study: Study) -> None:
    check_independence(study)
    assert dependence(study, CPU, "book-keeping", 32) == ""
    assert fitting(study, plan_of(study), "cpu", "book-keeping").rows == 32


def test_it_trains_two_rounds_and_a_round_that_begins_again_gives_the_same_bits(study: Study) -> None:
    data, plan, vector = (
        invented.records(study, [1 + n % 2 for n in range(80)]),
        plan_of(study),
        to_vector(build(study)),
    )
    for number in (1, 2):
        check(pack(vector, study), study, first=number == 1)
        first, again = (
            train(pack(vector, study), study, data, plan, round=number, site="a", device=CPU, seed=SEED)
            for _ in range(2)
        )
        assert np.array_equal(first.update, again.update)
        assert np.abs(first.update).max() > 0
        vector = with_trained(vector, trained(vector, study) + first.update, study)


def test_canaries_do_not_contradict_its_plan(study: Study) -> None:
    outcome = audit(study, plan_of(study), CPU, canaries=40, seed=SEED)
    assert 0 <= outcome.correct <= outcome.guesses <= 40


@pytest.mark.parametrize("trainable", [{"trainable": "head"}, {"trainable": "lora", "lora_rank": 2}])
def test_a_part_of_it_can_be_trained_alone(trainable: dict[str, Any]) -> None:
    whole = graphs.for_task(NAMES[0])
    part = Study.model_validate({**whole.contract, "model": {**whole.contract["model"], **trainable}})
    check_independence(part)
    left = [name for name, parameter in build(part).named_parameters() if parameter.requires_grad]
    assert "head.weight" in left
    assert "hidden.weight" not in left
    assert any("up" in name for name in left) == (trainable["trainable"] == "lora")


def test_a_graph_of_which_torch_gives_other_sizes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graphs.parsed(graphs.one("affine", [12], {}))
    monkeypatch.setitem(network._MAKERS, type(graph.nodes[1]), lambda node, given: torch.nn.Linear(12, 13))
    with pytest.raises(ConfigurationError, match="torch refuses the graph"):
        network.check(graph, list(graph.inputs))
    monkeypatch.setitem(network._MAKERS, type(graph.nodes[1]), lambda node, given: torch.nn.Linear(12, 12))
    with pytest.raises(ConfigurationError, match=r"torch makes 338 parameters where the graph says 182"):
        network.check(graph, list(graph.inputs))


# -- at a site


GRAPH = {
    "format": 1,
    "inputs": {"record": [2]},
    "nodes": [
        {"name": "hidden", "layer": "linear", "of": "record", "outputs": 3},
        {"name": "bent", "layer": "gelu", "of": "hidden"},
        {"name": "head", "layer": "linear", "of": "bent", "outputs": 2, "bias": False},
    ],
}


def _study() -> Study:
    return Study.model_validate({**CONTRACT, "model": {"name": "graph", "graph": GRAPH}})


def test_it_shows_people_every_layer_with_its_weights_and_its_memory_and_trains_once_approved(
    new_coordinator: Any, new_site: Any, connect: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = new_coordinator(policy="allow_graphs: true")
    coordinator.study = _study()
    coordinator.model = coordinator.pack(coordinator.study)
    site = connect(new_site(coordinator))
    site.ask(coordinator.propose())
    cli.show("synthetic-study")
    shown = " ".join(capsys.readouterr().out.split())
    assert "trains graph for tabular-classification" in shown
    assert "15 parameters; 8 numbers of a record on the way; a step of 32 records takes at least 0 MiB" in shown
    assert "hidden: linear (outputs 3) of record → 3, 9 parameters" in shown
    assert "bent: gelu of hidden → 3" in shown
    assert "head: linear (outputs 2, bias false) of bent → 2, 6 parameters" in shown
    cli.approve("synthetic-study", by="Dr Synthetic", yes=True)
    answer = site.ask(coordinator.train(1), coordinator.model)
    assert isinstance(answer, Update)
    assert site.charges() == 1


def test_a_site_that_permits_no_graphs_refuses_it_and_says_what_would(
    new_coordinator: Any, new_site: Any, connect: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = new_coordinator()
    coordinator.study = _study()
    site = connect(new_site(coordinator))
    answer = site.ask(coordinator.propose())
    assert isinstance(answer, Refusal)
    assert answer.reason == "policy"
    cli.show("synthetic-study")
    shown = " ".join(capsys.readouterr().out.split())
    assert "to permit it, in site.yaml: policy.allow_graphs: true" in shown
    assert "hidden: linear (outputs 3) of record → 3" in shown
