"""Weights that somebody published become those of a study's model: names mapped, shapes held against it.

A person runs this on files that the person has chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs.folding import fold
from consilium_shared.graphs.weights import Array, Source, listed
from consilium_shared.models import build
from consilium_shared.models.adaptation import added, plain_name
from consilium_shared.study import Study


class Row(NamedTuple):
    """One array of the file and where it went.

    Attributes:
        there: name in the file.
        here: name in the study's model.
        shape: of both, but for a first layer whose colours were added up.
        how: same name, another name, in order; and what was changed.
    """

    there: str
    here: str
    shape: tuple[int, ...]
    how: str


class Imported(NamedTuple):
    """Weights under the names of a study's model.

    Attributes:
        weights: float32 arrays by name.
        rows: mapping, in the model's order.
        seeded: parameters that the file lacks: they begin as the study's seed has them.
        left_out: names of the file that a person left out.
    """

    weights: dict[str, Array]
    rows: tuple[Row, ...]
    seeded: tuple[str, ...]
    left_out: tuple[str, ...]


class Wishes(NamedTuple):
    """Options of a person for the mapping.

    Attributes:
        renames: beginning of a name in the file to what stands there in the model.
        left_out: patterns of names in the file that are left out, as of a shell.
        folds: batch norm to the layer that it follows.
        in_order: pair what no name pairs by its place, where the shapes agree.
        grey: add up the first layer's input channels where the model has one.
    """

    renames: Mapping[str, str] = {}
    left_out: Sequence[str] = ()
    folds: Mapping[str, str] = {}
    in_order: bool = False
    grey: bool = False


def imported(source: Source, study: Study, wishes: Wishes) -> Imported:
    """Weights of a file under the names of the study's model.

    Raises:
        ConfigurationError: an array that the model has no place for, or of another shape; or nothing of it fits.
    """
    dropped = [name for name in source.weights if any(fnmatchcase(name, each) for each in wishes.left_out)]
    kept = {name: array for name, array in source.weights.items() if name not in dropped}
    norms = tuple(norm for norm in source.norms if norm.mean in kept)
    weights, folded = fold(source._replace(weights=kept, norms=norms), wishes.folds)
    with torch.device("meta"):
        model = build(study)
    shapes = {plain_name(name): tuple(p.shape) for name, p in model.named_parameters() if not added(name)}
    by_name = _by_name(weights, shapes, wishes.renames)
    pairs = by_name | (_in_order(weights, shapes, by_name) if wishes.in_order else {})
    if strange := [name for name in weights if name not in pairs]:
        raise ConfigurationError(_strange(strange, weights, shapes, set(pairs.values())))
    if not pairs:
        raise ConfigurationError("the file has nothing of the study's model")
    transposed = {f"{plain_name(name)}.weight" for name, kind in model.named_modules() if _is_transposed(kind)}
    rows: list[Row] = []
    found: dict[str, Array] = {}
    there_of = {here: there for there, here in pairs.items()}
    for here in (name for name in shapes if name in there_of):
        there = there_of[here]
        if there in folded and here in transposed:
            raise ConfigurationError(f"batch norm {folded[there]} follows a transposed convolution; leave both out")
        found[here], changed = _fitted(there, weights[there], here, shapes[here], grey=wishes.grey)
        how = ["in order" if there not in by_name else "same name" if there == here else "another name", changed]
        how.append(f"{folded[there]} folded in" if there in folded else "")
        rows.append(Row(there, here, shapes[here], "; ".join(filter(None, how))))
    seeded = tuple(name for name in shapes if name not in found)
    return Imported(found, tuple(rows), seeded, tuple(dropped))


def _by_name(weights: Iterable[str], shapes: Collection[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Name in the file to the same name in the model: after renames, or without a beginning that most names have."""
    named = {name: _renamed(name, renames) for name in weights}
    beginnings = {""} | {beginning for name in named.values() for beginning in _beginnings(name)}

    def paired(prefix: str) -> dict[str, str]:
        found = {name: _here(here.removeprefix(prefix), shapes) for name, here in named.items()}
        return {name: here for name, here in found.items() if here is not None}

    pairs = min(map(paired, sorted(beginnings, key=lambda each: (len(each), each))), key=lambda found: -len(found))
    twice = [here for here, times in Counter(pairs.values()).items() if times > 1]
    if twice:
        raise ConfigurationError(f"two arrays of the file become {twice[0]}; --rename gives them names of their own")
    return pairs


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for before, after in renames.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _here(name: str, shapes: Collection[str]) -> str | None:
    """The model's name for one of the file: the same, or as ``graph from-torch`` writes it, ``a.b.weight``: a_b."""
    module, _, leaf = name.rpartition(".")
    return next((each for each in (name, f"{module.replace('.', '_')}.{leaf}") if each in shapes), None)


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:end]) + "." for end in range(1, len(parts)))


def _in_order(
    weights: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], pairs: Mapping[str, str]
) -> dict[str, str]:
    there = [name for name in weights if name not in pairs]
    here = [name for name in shapes if name not in pairs.values()]
    return dict(zip(there, here, strict=False))


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def _fitted(there: str, array: Array, here: str, shape: tuple[int, ...], *, grey: bool) -> tuple[Array, str]:
    """The array in the model's shape, and what was done to it."""
    if array.shape == shape:
        return array, ""
    colours = len(shape) > 2 and array.ndim == len(shape) and (array.shape[1], shape[1]) == (3, 1)
    colours = colours and (array.shape[0], *array.shape[2:]) == (shape[0], *shape[2:])
    if colours and grey:
        return array.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32), "colours added up"
    raise ConfigurationError(
        f"{there} is {list(array.shape)} in the file, and {here} is {list(shape)} in the study's model"
        + ("; --grey adds up the colours of a first layer" if colours else "")
    )


def _strange(
    names: Sequence[str], weights: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], taken: set[str]
) -> str:
    def said(found: Mapping[str, tuple[int, ...]]) -> str:
        return listed(f"{name} {list(shape)}" for name, shape in found.items()) or "nothing"

    strange = {name: weights[name].shape for name in names}
    free = {name: shape for name, shape in shapes.items() if name not in taken}
    biases = all(name.endswith(".bias") for name in names)
    return (
        f"the study's model has no {said(strange)}; of what it has the file has not given {said(free)}. "
        "--rename OLD=NEW replaces the beginning of names, --leave-out PATTERN leaves some out, --in-order pairs them "
        "by their places" + (". A batch norm is folded into layers with a bias alone (bias: true)" if biases else "")
    )
