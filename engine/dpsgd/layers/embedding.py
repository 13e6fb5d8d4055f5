"""Embeddings and bags of embeddings: a sample's gradient is at the rows of the table that it looks up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpsgd.layer import Example, Layer
from dpsgd.tape import Tape


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, places: Tensor, record: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(places)
        ctx.record = record
        return nn.functional.embedding(places, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        if len(grad):
            ctx.record(places, grad)
        return None, None, None


def embedding(module: nn.Embedding | nn.EmbeddingBag, tape: Tape, places: Tensor) -> Tensor:
    """Rows ``[B, …, e]`` of the table at ``places``; see ``Layer.forward``."""

    def record(places: Tensor, grad: Tensor) -> None:
        rows = len(places)
        flat = grad.reshape(rows, -1, grad.shape[-1])
        tape.record_sparse(module.weight, places.reshape(rows, -1), flat, module.padding_idx)

    found: Tensor = _Embedding.apply(module.weight, places, record)  # type: ignore[no-untyped-call]
    return found


def embedding_bag(
    module: nn.EmbeddingBag,
    tape: Tape,
    places: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Sum or mean ``[B, e]`` of each sample's rows; see ``Layer.forward``.

    Raises:
        RuntimeError: places that are not ``[B, L]``: with offsets the first dimension is not the batch.
    """
    if places.dim() != 2 or offsets is not None:
        raise RuntimeError("bags are rows [B, L] of places, of one length, filled up with padding_idx; without offsets")
    found = embedding(module, tape, places)
    if per_sample_weights is not None:
        found = found * per_sample_weights.unsqueeze(2)
    if module.padding_idx is None:
        return found.sum(1) if module.mode == "sum" else found.mean(1)
    counted = places != module.padding_idx
    total = torch.where(counted.unsqueeze(2), found, 0.0).sum(1)
    return total if module.mode == "sum" else total / counted.sum(1, keepdim=True).clamp(min=1)


def _changes_by_words(module: nn.Embedding | nn.EmbeddingBag) -> str:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "changes by which words occur; leave out max_norm, scale_grad_by_freq, sparse"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "takes the largest of a bag's words, whose gradient is not known; use mode sum or mean"
    return ""


def places(words: int, *shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of an example: places int64 ``[B, *shape]``, several of them equal."""
    return lambda batch: (torch.randint(0, words, (batch, *shape)),)


def embeddings() -> Iterator[Example]:
    """Examples with repeated words in a sample, with and without padding."""
    yield Example(nn.Embedding(7, 3), places(7, 10))
    yield Example(nn.Embedding(7, 3, padding_idx=2), places(7, 4, 2), "padded")


def bags() -> Iterator[Example]:
    """Examples of sums and means, with and without padding."""
    for mode in ("sum", "mean"):
        yield Example(nn.EmbeddingBag(7, 3, mode=mode), places(7, 6), mode)
        yield Example(nn.EmbeddingBag(7, 3, mode=mode, padding_idx=0), places(7, 6), f"{mode}, padded")


LAYERS = [
    Layer(nn.Embedding, embedding, embeddings, _changes_by_words),
    Layer(nn.EmbeddingBag, embedding_bag, bags, _changes_by_words),
]
