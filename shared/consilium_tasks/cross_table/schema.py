"""Contract part of a cross table about its data."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field, FiniteFloat, model_validator

from consilium_shared.fields import Column
from consilium_shared.inputs import Categorical, Feature, Numeric
from consilium_tasks.classification.schema import Data

Edges = Annotated[tuple[FiniteFloat, ...], Field(min_length=1, max_length=255)]


class TableData(Data):
    """The asset, the column whose classes are the table's columns, and the features whose values are its rows."""

    features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=100)]
    edges: dict[Column, Edges] = {}  # noqa: RUF012  (pydantic copies it)
    """Numeric feature to the ends of its bins, public numbers in the feature's own unit: a value is in the bin that
    begins at the last edge that is not above it; below the first and from the last on are bins too."""

    @model_validator(mode="after")
    def _edged(self) -> TableData:
        numeric = {each.name: each for each in self.features if isinstance(each, Numeric)}
        if numeric.keys() != self.edges.keys():
            raise ValueError("edges has the ends of the bins of each numeric feature, and of nothing else")
        if len({each.name for each in self.features}) < len(self.features):
            raise ValueError("features has each column once")
        if self.missing != "refuse":
            raise ValueError("a table of counts takes missing: refuse; a value that is not there is in no bin")
        for name, edges in self.edges.items():
            if list(edges) != sorted(set(edges)):
                raise ValueError(f"edges of {name} grow from one to the next")
            if (numeric[name].center, numeric[name].scale) != (0.0, 1.0):
                raise ValueError(f"{name}: its edges are in the column's own unit, so it takes no center and no scale")
        return self


def cells(data: TableData) -> dict[str, tuple[str, ...]]:
    """Feature to the names of its rows, in the order in which they stand in the table after the row of everybody.

    >>> from consilium_shared.inputs import Label
    >>> label = Label(column="died", classes=("no", "yes"))
    >>> cells(TableData(asset="a", label=label, features=(Numeric(name="age"),), edges={"age": (50.0, 70.0)}))
    {'age': ('< 50', '50 to < 70', '>= 70')}
    """
    found = dict[str, tuple[str, ...]]()
    for each in data.features:
        if isinstance(each, Categorical):
            found[each.name] = each.categories
            continue
        edges = data.edges[each.name]
        between = (f"{low:g} to < {high:g}" for low, high in pairwise(edges))
        found[each.name] = (f"< {edges[0]:g}", *between, f">= {edges[-1]:g}")
    return found
