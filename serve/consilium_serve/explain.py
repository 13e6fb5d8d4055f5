"""Explanation of one answer: how much each part of the record moved it, as Shapley values against the study's centre.

The quantity that is shared out is the task's: a classifier's is the logit of the most probable class, over the mean of
the others'. A part that is taken
away is what the study declares as nothing known: a number at its center, no category, a variable without a sample; of
an image a tile's place in a blurred picture. The values add up to the difference that all parts together make; only the
model is asked, so that any model can be explained, and the same record always gets the same explanation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_serve.model import Model
from consilium_shared import task
from consilium_shared.inputs import Numeric
from consilium_shared.preparation.record import Arrays, Prepared
from consilium_shared.study import Study

Values = npt.NDArray[np.float64]

EXACT = 10
"""Parts up to which all coalitions are asked; of more, some orders and their reverses."""
ORDERS, ORDERS_OF_TILES = 24, 4
TILES = 8
"""Tiles of an image along one edge."""


@dataclass(frozen=True)
class Part:
    """A part of a record.

    Attributes:
        name: for people.
        masks: by input, bool of its shape: what belongs to the part.
    """

    name: str
    masks: dict[str, npt.NDArray[np.bool_]]


def explain(model: Model, prepared: Prepared) -> dict[str, Any]:
    """Shapley values of a record's parts, for the quantity that the task names."""
    inputs = prepared.inputs
    parts, nothing = parts_of(model.study, inputs)
    logits = model.run({name: values[None] for name, values in inputs.items()})["logits"][0]
    words, quantity = model.predictions.explained(np.asarray(logits, dtype=np.float64))

    def margins(coalitions: npt.NDArray[np.bool_]) -> Values:
        batch = {name: np.repeat(nothing[name][None], len(coalitions), axis=0) for name in inputs}
        for row, taken in enumerate(coalitions):
            for part in itertools.compress(parts, taken):
                for name, mask in part.masks.items():
                    batch[name][row][mask] = inputs[name][mask]
        return quantity(np.asarray(model.run(batch)["logits"], dtype=np.float64))

    values, whole = shapley(margins, len(parts), ORDERS_OF_TILES if "image" in inputs else ORDERS)
    told: dict[str, Any] = {
        "method": "Shapley values of the logit, against nothing known",
        **words,
        "adds_up_to": whole,
    }
    if "image" in inputs:
        told["tiles"] = values.reshape(TILES, TILES).tolist()
    else:
        told["parts"] = {part.name: float(value) for part, value in zip(parts, values, strict=True)}
    return told


def shapley(
    margins: Callable[[npt.NDArray[np.bool_]], Values], parts: int, orders: int = ORDERS
) -> tuple[Values, float]:
    """Shapley values ``[parts]``, exact up to ``EXACT`` parts; and their sum, exact always.

    Args:
        margins: of coalitions bool ``[n, parts]``, float64 ``[n]``.
        parts: their number.
        orders: tried, each with its reverse, where there are more than ``EXACT`` parts.

    >>> shapley(lambda taken: taken @ np.array([1.0, 2.0]), 2)
    (array([1., 2.]), 3.0)
    """
    if parts <= EXACT:
        every = np.array(list(itertools.product([False, True], repeat=parts)), dtype=bool).reshape(-1, parts)
        found = margins(every)
        values = np.zeros(parts)
        index = {tuple(row): value for row, value in zip(every.tolist(), found, strict=True)}
        for taken, value in index.items():
            size = sum(taken)
            for part in range(parts):
                if not taken[part]:
                    more = (*taken[:part], True, *taken[part + 1 :])
                    weight = math.factorial(size) * math.factorial(parts - size - 1) / math.factorial(parts)
                    values[part] += weight * (index[more] - value)
        return values, float(found[-1] - found[0])
    draw, values = np.random.default_rng(0), np.zeros(parts)
    tried = [order for _ in range(orders) for one in [draw.permutation(parts)] for order in (one, one[::-1])]
    for order in tried:
        steps = np.zeros((parts + 1, parts), dtype=bool)
        for number, part in enumerate(order):
            steps[number + 1 :, part] = True
        values[order] += np.diff(margins(steps))
    return values / len(tried), float(values.sum() / len(tried))


def parts_of(study: Study, inputs: Arrays) -> tuple[list[Part], Arrays]:
    """Parts of a record, and the inputs of which nothing is known."""
    reading = task.reads(study)
    if reading.image is not None:
        return _tiles(inputs["image"])
    if reading.series is None:
        return _columns("record", reading.features, len(inputs["record"])), {"record": np.zeros_like(inputs["record"])}
    series, count = inputs["series"], len(reading.series.variables)
    nothing = {"series": np.zeros_like(series)}
    nothing["series"][:, 2 * count :] = 1.0  # before the first sample the gap is the whole window
    parts = []
    for number, variable in enumerate(reading.series.variables):
        mask = np.zeros(series.shape, dtype=bool)
        mask[:, number::count] = True
        parts.append(Part(variable.name, {"series": mask}))
    if "statics" in inputs:
        nothing["statics"] = np.zeros_like(inputs["statics"])
        parts += _columns("statics", reading.series.statics, len(inputs["statics"]))
    return parts, nothing


def _columns(name: str, features: Sequence[Any], width: int) -> list[Part]:
    parts, start = [], 0
    for feature in features:
        end = start + (1 if isinstance(feature, Numeric) else len(feature.categories))
        mask = np.zeros(width, dtype=bool)
        mask[start:end] = True
        parts.append(Part(feature.name, {name: mask}))
        start = end
    return parts


def _tiles(image: npt.NDArray[np.float32]) -> tuple[list[Part], Arrays]:
    edges = np.linspace(0, image.shape[-1], TILES + 1).round().astype(int)
    parts = []
    for down, right in itertools.product(range(TILES), repeat=2):
        mask = np.zeros(image.shape, dtype=bool)
        mask[..., edges[down] : edges[down + 1], edges[right] : edges[right + 1]] = True
        parts.append(Part(f"{down},{right}", {"image": mask}))
    return parts, {"image": _blurred(image)}


def _blurred(image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The mean over a window of a quarter of the edge, three times: no tile's content is left, its brightness is."""
    width = max(1, image.shape[-1] // 8)
    kernel = np.ones(2 * width + 1) / (2 * width + 1)

    def along(line: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.convolve(np.pad(line, width, mode="edge"), kernel, mode="valid")

    found = image.astype(np.float64)
    for _ in range(3):
        for axis in (-1, -2):
            found = np.apply_along_axis(along, axis, found)
    return found.astype(np.float32)
