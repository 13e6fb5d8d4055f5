"""Batch norms with fixed statistics in a file of weights, folded into the layers before them.

A batch norm with the statistics of its training is a scale and a shift for each channel. Weight and bias of the layer
whose output it reads take them in, and the norm is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs.weights import Array, Norm, Source, listed

_MEAN, _COUNT = "running_mean", "num_batches_tracked"


class Folded(NamedTuple):
    """Weights without batch norms.

    Attributes:
        weights: arrays by name.
        notes: name of a layer's weight to the name of the norm that it took in.
    """

    weights: dict[str, Array]
    notes: dict[str, str]


def fold(source: Source, pairs: Mapping[str, str]) -> Folded:
    """Weights of a file with every batch norm folded into the layer that it follows.

    An ONNX file says which layer that is. A state dict does not: there it is the layer of the same module that stands
    right before the norm, with as many outputs as the norm has channels.

    Args:
        source: the file's weights.
        pairs: name of a norm's module to that of its layer, where a person says it.

    Raises:
        ConfigurationError: a norm of which the layer is not known, or does not fit.
    """
    known = {norm.mean for norm in source.norms}
    own = (norm for norm in _norms(source.weights) if norm.mean not in known)
    norms = {norm.name: norm for norm in (*source.norms, *own)}
    if strange := sorted(set(pairs) - set(norms)):
        raise ConfigurationError(f"--fold {strange[0]}: the file has the batch norms {listed(norms) or '(none)'}")
    weights = {name: array for name, array in source.weights.items() if not name.endswith(f".{_COUNT}")}
    parts = {name for norm in norms.values() for name in (norm.scale, norm.shift, norm.mean, norm.variance)}
    notes: dict[str, str] = {}
    for norm in norms.values():
        layer = pairs.get(norm.name, norm.layer)
        if layer is None:
            raise ConfigurationError(
                f"batch norm {norm.name}: no layer of its module stands right before it in the file. Say which one it "
                f"follows, --fold {norm.name}=LAYER; or leave it out, --leave-out '{norm.name}.*'; or trace the module "
                "itself: consilium-server graph from-torch --batch-norm frozen"
            )
        _fold(weights, norm, layer)
        notes[f"{layer}.weight" if f"{layer}.weight" in weights else layer] = norm.name
    return Folded({name: weights[name] for name in _in_order(weights, notes) if name not in parts}, notes)


def _in_order(weights: Mapping[str, Array], notes: Mapping[str, str]) -> list[str]:
    """Names in the file's order, each new bias behind its layer's weight."""
    new = {f"{name.removesuffix('.weight')}.bias" for name in notes}
    order: list[str] = []
    for name in weights:
        order += [name] if name not in new else []
        own = f"{name.removesuffix('.weight')}.bias"
        order += [own] if name in notes and own in weights else []
    return order


def _fold(weights: dict[str, Array], norm: Norm, layer: str) -> None:
    weight = f"{layer}.weight" if f"{layer}.weight" in weights else layer
    bias = norm.bias or f"{layer}.bias"
    scale, shift, mean, variance = (weights.get(each) for each in (norm.scale, norm.shift, norm.mean, norm.variance))
    if mean is None or variance is None:
        raise ConfigurationError(f"batch norm {norm.name}: the file lacks its {_MEAN} or running_var")
    kernel = weights.get(weight)
    if kernel is None or kernel.ndim < 2 or kernel.shape[0] != len(mean):
        raise ConfigurationError(
            f"batch norm {norm.name} has {len(mean)} channels, and {layer} "
            + ("is not in the file" if kernel is None else f"has the weight {list(kernel.shape)}")
        )
    factor = (1.0 if scale is None else scale) / np.sqrt(variance.astype(np.float64) + norm.eps)
    before = weights.get(bias, np.zeros(1, np.float32)).astype(np.float64)
    moved = (before - mean) * factor + (0.0 if shift is None else shift)
    weights[weight] = (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(np.float32)
    weights[bias] = moved.astype(np.float32)


def _norms(weights: Mapping[str, Array]) -> Iterator[Norm]:
    """Batch norms of a state dict, each with the layer right before it."""
    names = list(weights)
    for mean in names:
        if not mean.endswith(f".{_MEAN}"):
            continue
        module = mean.removesuffix(f".{_MEAN}")
        first = min(place for place, name in enumerate(names) if name.rpartition(".")[0] == module)
        before = names[first - 1].rpartition(".")[0] if first else ""
        kernel = weights.get(f"{before}.weight")
        near = before.rpartition(".")[0] == module.rpartition(".")[0]
        fits = near and kernel is not None and kernel.ndim >= 2 and kernel.shape[0] == weights[mean].size
        yield Norm(
            module,
            scale=f"{module}.weight",
            shift=f"{module}.bias",
            mean=mean,
            variance=f"{module}.running_var",
            layer=before if fits else None,
        )
