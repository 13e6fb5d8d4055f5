"""Isolation of rows: microbatches padded to a fixed number of rows and computed by one thread, so that a sample's bits
do not depend on who shares its batch.

**The attack.** Kernels choose their path by the number of rows: a product of 16 rows is summed in another order than
one of 15, so one more patient rounds every other's logit and gradient anew. Where a crafted model's weights are huge
and cancel, what is left is rounding alone: then clipping bounds nothing, and a count moves for every patient at once.

**What is done.** Whatever is counted or clipped is computed in pieces of ``ROWS`` rows, or of one patient alone,
however many others there are. What a row gives must then depend on neither its place nor its neighbours. Three things
on a CPU would make it: the last elements of a vector loop, fewer than two registers (32 float32 with AVX-512), go
through another implementation of tanh and exp; threads cut a loop anywhere, which makes more such ends; and MKL chooses
its path by a matrix's address. So rows come in multiples of 32, one thread computes, and MKL is in strict mode
(``blas.py``). ``tests/properties/test_rows.py`` sees it, bit by bit, on the CPU that runs it. It is proved of no
kernel, so each site tests its machine, CPU or GPU, with the study's model before a private round (``neighbours.py``),
and takes the pieces that pass.

**Numbers below 2^-126** take a processor up to a hundred times as long, and a long recurrence makes many. The passes
through a model take them as zero, but nothing else does. torch tells that to the calling thread alone, so where several
compute it would hold for some. One of them could then leave out of a norm what another adds to the sum, and that can be
large: 2^-127 from the data times 2^127 from a crafted weight. So what is clipped is formed inside of
``without_denormals``, by one thread, and its norms and sums are taken outside, where all read the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

ROWS = 32
"""Number of rows of a piece in which several patients are."""


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


@contextmanager
def without_denormals() -> Iterator[None]:
    """On the CPU the caller's thread takes numbers of float32 below 2^-126 as zero while inside, and float64 below
    2^-1022. Only for what one thread computes: others are not told, and one that was begun here would keep it."""
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def thread_beside(name: str) -> ThreadPoolExecutor:
    """A thread beside the caller's, whose kernels on the CPU use that one thread."""
    beside = ThreadPoolExecutor(1, thread_name_prefix=name)
    with one_thread():  # a thread of torch's keeps the number that it found when it began
        beside.submit(torch.get_num_threads).result()
    return beside
