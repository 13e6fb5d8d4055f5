"""Graph as a study's model, for every task: the part of the contract, and how it becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from consilium_shared import task
from consilium_shared.architecture import Architecture
from consilium_shared.graphs.graph import Graph
from consilium_shared.graphs.node import said
from consilium_shared.task import ModelKind

if TYPE_CHECKING:
    from consilium_shared.study import Study

HEAD = "head"
"""Name of the layer that ``trainable: head`` and ``lora`` train."""


class GraphModel(Architecture):
    """A graph, from the task's inputs to its outputs."""

    graph: Graph

    @model_validator(mode="after")
    def _trained(self) -> GraphModel:
        if self.trainable == "all":
            return self
        layers = {node.name: getattr(node, "layer", "") for node in self.graph.nodes}
        if layers.get(HEAD) != "linear":
            raise ValueError(f"trainable: {self.trainable} trains the node {HEAD}, a linear layer; the graph has none")
        if self.trainable == "lora" and not {"linear", "conv2d"} & {layers[name] for name in layers if name != HEAD}:
            raise ValueError("trainable: lora adds to linear and conv2d layers besides the head; the graph has none")
        return self

    def check(self, study: Study) -> None:
        """Inputs and output are the task's; raises ValueError with both."""
        own = task.of(study)
        expected = dict(zip(own.reads(study).names, own.shapes(study), strict=True))
        if self.graph.inputs != expected:
            there, here = (
                ", ".join(f"{name} {said(shape)}" for name, shape in each.items())
                for each in (self.graph.inputs, expected)
            )
            raise ValueError(f"model.graph takes {there}; the study's data give {here}")
        if self.graph.output != own.output_shape(study):
            raise ValueError(
                f"model.graph gives {said(self.graph.output)} of a record; {study.task} of these data takes "
                f"{said(own.output_shape(study))}"
            )


KIND = ModelKind(GraphModel, "consilium_shared.graphs.network:of_study", since=2)
