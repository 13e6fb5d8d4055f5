"""Cross table as a model: float32 ``[B, F]`` to ``[B, C]``, linear in the cells that a record is in."""

from __future__ import annotations

import torch
from torch import nn

from consilium_shared.inputs import Categorical
from consilium_shared.study import Study
from consilium_tasks.cross_table.schema import TableData, cells


class Table(nn.Module):
    """Weights ``[C, 1 + cells]``: a count for each class and row, which begin at 0.

    With the loss of ``loss.py`` a record's gradient is minus 1 in the cells that the record is in, and 0 elsewhere,
    whatever the weights: so one step that adds up all patients' gradients counts them.
    """

    def __init__(self, data: TableData) -> None:
        super().__init__()
        self.places = list[tuple[int, int, tuple[float, ...]]]()
        place = 0
        for each in data.features:
            size = len(each.categories) if isinstance(each, Categorical) else 1
            self.places.append((place, size, data.edges.get(each.name, ())))
            place += size
        rows = 1 + sum(map(len, cells(data).values()))
        self.head = nn.Linear(rows, len(data.label.classes), bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Sums ``[B, C]`` of the weights of the cells that records ``[B, F]`` would be in, were they of each class."""
        out: torch.Tensor = self.head(self.rows(inputs))
        return out

    def rows(self, inputs: torch.Tensor) -> torch.Tensor:
        """Rows ``[B, 1 + cells]`` that records are in: 1 in that of everybody, and in one of each feature."""
        found = [torch.ones_like(inputs[:, :1])]
        for place, size, edges in self.places:
            part = inputs[:, place : place + size]
            if edges:
                above = torch.cat([(part >= edge).to(inputs.dtype) for edge in edges], dim=1)
                first, last = torch.ones_like(part), torch.zeros_like(part)
                part = torch.cat([first, above], dim=1) - torch.cat([above, last], dim=1)
            found.append(part)
        return torch.cat(found, dim=1)


def table(study: Study) -> Table:
    """``Table`` of the contract's features and classes."""
    assert isinstance(study.data, TableData)  # noqa: S101  (the contract's validation made it)
    return Table(study.data)
