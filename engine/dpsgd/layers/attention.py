"""Multi-head attention (Vaswani et al. 2017) on torch's own parameters: weights of ``nn.MultiheadAttention`` load.

The only weights are those of the projections, linear layers of which the first three share one tensor: the gradient of
a third is that of a linear layer, and of another third's places it has none. What lies between has no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dpsgd.layer import Example, Layer, random, uneven
from dpsgd.layers.linear import RecordedLinear
from dpsgd.tape import Tape

functional = nn.functional


def forward(
    module: nn.MultiheadAttention,
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output and attention weights, as ``module`` returns them; see ``Layer.forward``.

    Raises:
        RuntimeError: inputs without a batch.
    """
    if query.dim() != 3:
        raise RuntimeError(f"attention to inputs of {query.dim()} dimensions: one of the three must be the batch")
    alone = query is key and key is value
    if not module.batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    low = _precision(query)
    q, k, v = _projected(module, tape, query.to(low), key.to(low), value.to(low), alone)
    q, k, v = (each.view(len(q), -1, module.num_heads, module.head_dim).transpose(1, 2) for each in (q, k, v))
    mask = _mask(attn_mask, key_padding_mask, module.num_heads, q)
    weights = None
    dropout = module.dropout if module.training else 0.0
    if need_weights or dropout > 0.0:
        scores = (q / math.sqrt(module.head_dim)) @ k.transpose(2, 3)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=3)
        if dropout > 0.0:
            weights = tape.dropout(weights, dropout)
        found = weights @ v
    else:
        found = functional.scaled_dot_product_attention(q, k, v, mask)
    output = _linear(tape, module.out_proj.weight, module.out_proj.bias, found.transpose(1, 2).flatten(2))
    if weights is not None:
        weights = weights.mean(1) if average_attn_weights else weights
    return output if module.batch_first else output.transpose(0, 1), weights if need_weights else None


def _precision(inputs: Tensor) -> torch.dtype:
    kind = inputs.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype


def _projected(
    module: nn.MultiheadAttention, tape: Tape, query: Tensor, key: Tensor, value: Tensor, alone: bool
) -> tuple[Tensor, ...]:
    """Query, key and value ``[B, T, E]`` after their projections."""
    whole, bias = module.in_proj_weight, module.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if whole is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        record_bias = _Thirds(tape, None, bias)
        return tuple(
            _linear(tape, weight, None, side, record_bias.of(third), part)
            for third, (weight, part, side) in enumerate(zip(weights, biases, (query, key, value), strict=True))
        )
    if alone:
        return _linear(tape, whole, bias, query).chunk(3, dim=2)
    thirds = _Thirds(tape, whole, bias)
    return tuple(
        _apply(side, weight, part, thirds.of(third))
        for third, (weight, part, side) in enumerate(zip(whole.chunk(3), biases, (query, key, value), strict=True))
    )


class _Thirds:
    """Records of the thirds of one tensor, as gradients of the whole with zeros elsewhere.

    They come one by one in the backward pass. A tape adds what it has of one weight, sample by sample, so each can be
    recorded by itself.
    """

    def __init__(self, tape: Tape, weight: Tensor | None, bias: Tensor | None) -> None:
        self._tape, self._weight, self._bias = tape, weight, bias

    def of(self, third: int) -> Callable[[Tensor, Tensor], None]:
        """``record`` of one third."""

        def record(inputs: Tensor, grad: Tensor) -> None:
            width = grad.shape[2]
            wide = grad.new_zeros((*grad.shape[:2], 3 * width))
            wide[..., third * width : (third + 1) * width] = grad
            if self._weight is not None:
                self._tape.record_outer_product((self._weight,), inputs, wide)
            if self._bias is not None:
                self._tape.record_gradients(self._bias, wide.sum(1))

        return record


def _linear(
    tape: Tape,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    also: Callable[[Tensor, Tensor], None] | None = None,
    part: Tensor | None = None,
) -> Tensor:
    """A linear layer of parameters; ``part`` is a bias whose record ``also`` makes."""

    def record(inputs: Tensor, grad: Tensor) -> None:
        tape.record_outer_product((weight,), inputs, grad)
        if bias is not None:
            tape.record_gradients(bias, grad.sum(1))
        if also is not None:
            also(inputs, grad)

    return _apply(inputs, weight, part if bias is None else bias, record)


def _apply(inputs: Tensor, weight: Tensor, bias: Tensor | None, record: Callable[[Tensor, Tensor], None]) -> Tensor:
    weight, bias = weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)
    found: Tensor = RecordedLinear.apply(inputs, weight, bias, record)  # type: ignore[no-untyped-call]
    return found


def _mask(attn_mask: Tensor | None, padding: Tensor | None, heads: int, query: Tensor) -> Tensor | None:
    """Term that is added to the scores ``[B, heads, T, S]``: -∞ where a mask is True, a mask of numbers as it is."""
    found = None
    if attn_mask is not None:
        found = _added(attn_mask, query)
        found = found.view(len(query), heads, *found.shape[1:]) if found.dim() == 3 else found
    if padding is not None:
        keys = _added(padding, query)[:, None, None, :]
        found = keys if found is None else found + keys
    return found


def _added(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(mask, -math.inf)


def _refusal(module: nn.MultiheadAttention) -> str:
    if module.bias_k is not None or module.add_zero_attn:
        return "attends to constants beside its keys; leave out add_bias_kv and add_zero_attn"
    return ""


def examples() -> Iterator[Example]:
    """Examples of self- and cross-attention, with one tensor of projections and three, few steps and many."""
    yield Example(uneven(nn.MultiheadAttention(6, 2, batch_first=True)), _same(5, 6), "to itself")
    yield Example(
        uneven(nn.MultiheadAttention(6, 3, bias=False, batch_first=True)), _others(6, 6), "to others, no bias"
    )
    made = uneven(nn.MultiheadAttention(6, 2, kdim=4, vdim=3, batch_first=True))
    yield Example(made, _others(4, 3), "of other widths")
    yield Example(nn.MultiheadAttention(32, 4, batch_first=True), _same(40, 32), "large")


def _same(steps: int, width: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: random(steps, width)(batch) * 3


def _others(keys: int, values: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (torch.randn(batch, 3, 6), torch.randn(batch, 5, keys), torch.randn(batch, 5, values))


LAYERS = [Layer(nn.MultiheadAttention, forward, examples, _refusal, whole=True)]
