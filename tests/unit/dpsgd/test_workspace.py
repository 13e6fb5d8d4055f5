"""Memory that is used again holds nothing of the batch before, and is nobody else's."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape
from dpsgd.workspace import _PAGE, Workspace

LIKE = torch.empty(0)


def ends(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def test_what_was_given_out_is_given_again_in_the_same_order() -> None:
    workspace = Workspace()
    first = [workspace.take(LIKE, shape).data_ptr() for shape in ((3, 4), (1000, 1000), (5,))]
    workspace.reset()
    assert [workspace.take(LIKE, shape).data_ptr() for shape in ((2, 2), (999, 1000), (5,))] == first


def test_what_is_given_out_at_one_time_does_not_overlap() -> None:
    workspace, shapes = Workspace(), [(7,), (1024, 1024), (3, 5), (1024, 513)]
    for _ in range(2):
        taken = sorted(ends(workspace.take(LIKE, shape)) for shape in shapes)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        workspace.reset()


@pytest.mark.parametrize("like", [torch.empty(0), torch.empty(0, dtype=torch.float64), torch.empty(0).bfloat16()])
def test_it_has_the_shape_and_type_that_were_asked_for_whatever_was_there(like: Tensor) -> None:
    workspace = Workspace()
    for shape in ((4, 4), (2048, 700), (0, 3), (2, 1024, 1024)):
        workspace.take(LIKE, (10, 10))
        workspace.reset()
        found = workspace.take(like, shape)
        assert (found.shape, found.dtype) == (shape, like.dtype)
        assert found.is_contiguous()
        found.fill_(1.0)
        workspace.reset()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")
def test_what_fills_a_large_page_begins_with_one() -> None:
    assert ends(Workspace().take(LIKE, (_PAGE,)))[0] % _PAGE == 0


def test_a_system_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert Workspace().take(LIKE, (_PAGE,)).shape == (_PAGE,)


def gradients(tape: Tape, weight: nn.Parameter, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    tape.open(RowOwners(torch.arange(batch), torch.device("cpu")))
    tape.record_outer_product((weight,), *(torch.randn(batch, 48, size, generator=generator) for size in (50, 60)))
    total: dict[Tensor, Tensor] = {weight: torch.zeros(weight.numel(), dtype=torch.float64)}
    tape.add_weighted_sum(tape.factors(1.0), total)
    tape.close()
    return total[weight]


def test_a_batch_gives_the_same_bits_after_larger_and_smaller_ones() -> None:
    tape, weight = Tape(), nn.Parameter(torch.zeros(60, 50))
    tape.open(RowOwners(torch.arange(1), torch.device("cpu")))
    assert tape.materializes(48, 60, 50)
    for batch in (300, 2, 64, 400, 64):
        assert torch.equal(gradients(tape, weight, batch), gradients(Tape(), weight, batch))
