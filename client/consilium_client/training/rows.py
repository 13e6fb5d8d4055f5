"""Rows that do not depend on their neighbours: of one number, filled up with zeros, computed by one thread.

**The attack.** Kernels choose their path by the number of rows: a product of 16 rows is summed in another order than
one of 15, so one more patient rounds every other's logit and gradient anew. Where a crafted model's weights are huge
and cancel, what is left is rounding alone: then clipping bounds nothing, and a count moves for every patient at once.

**What is done.** Whatever is counted or clipped is computed in pieces of ``ROWS`` rows, or of one patient alone,
however many others there are. What a row gives must then depend on neither its place nor its neighbours. Two things on
a CPU would make it: the last elements of a vector loop, fewer than two registers (32 float32 with AVX-512), go through
another implementation of tanh and exp; and threads cut a loop anywhere, which makes more such ends. So rows come in
multiples of 32 and one thread computes. ``tests/properties/test_rows.py`` sees it, bit by bit, on the CPU that runs it;
it is proved of no kernel, and GPU kernels were not tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ROWS = 32
"""Of a piece in which several patients are."""


def filled(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """``tensor`` ``[B, ...]``, B up to ``rows``, and zeros below it: ``[rows, ...]``, in memory of its own."""
    found = tensor.new_zeros((rows, *tensor.shape[1:]))
    found[: len(tensor)] = tensor
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels on the CPU use one thread while inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
