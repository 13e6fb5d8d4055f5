"""No private step waits for the device: whatever a GPU has computed stays there until the round is over.

No GPU is needed to see it. The model lies on torch's ``meta`` device, whose tensors have shapes and no numbers, so that
whoever asks for a number is told there is none; and a dispatch mode refuses every operation whose result or shape
depends on numbers, and every copy from the host that is not queued from page-locked memory. Tensors of the host are
free of that: a patient's rows are counted there (``owners``), records are picked, moved and filled up there
(``pieces``), Adam counts its steps there, and the key stream's words are made there (``noise``).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.training import KINDS, records, study, with_owners
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training.microbatches import Batch
from consilium_client.training.steps import accumulate
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.device import exact_arithmetic
from dpsgd.engines import BookKeeping
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer

DEVICE, SIZE = torch.device("meta"), 8
ONE_EACH, SEVERAL = [1] * 11, [1, 3, 2, 11, 1, 1]


class Waited(AssertionError):
    """An operation that a GPU's host would wait for."""


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a device."""

    _NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    _COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    _INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
    _UNTAGGED = (torch.ops.aten.isin.Tensor_Tensor, torch.ops.aten.is_nonzero.default)
    pinned: set[int]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        there = [each for each in tensors if each.device == DEVICE]
        if func in self._INDEXING:
            indices = [each for each in args[1] if each is not None]
            if there and any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                raise Waited(f"{func} by truth values")
        elif there and (func in self._UNTAGGED or any(tag in func.tags for tag in self._NUMBERS)):
            raise Waited(str(func))
        found = func(*args, **kwargs)
        if func in self._COPIES:
            self._see_copy(func, tensors[-1], found, kwargs.get("non_blocking", args[2:] == (True,)))
        return found

    def _see_copy(self, func: Any, source: torch.Tensor, found: torch.Tensor, queued: bool) -> None:
        if source.device == DEVICE != found.device:
            raise Waited(f"{func} to the host")
        if source.device != DEVICE == found.device and not (queued and source.data_ptr() in self.pinned):
            raise Waited(f"{func} from memory that is not page-locked, or not queued")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoWaiting]:
    """Inside, a device that has no numbers is taken for a GPU."""
    mode, kept = NoWaiting(), []
    mode.pinned = set()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())  # kept, so that no other tensor is given its place
        mode.pinned.add(kept[-1].data_ptr())
        return kept[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # there is no autocast for the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with exact_arithmetic():
        yield mode


def a_step(
    mode: NoWaiting, model: nn.Module, given: Study, data: ArrayDataset, optimizer: str = "sgd", size: int = SIZE
) -> PrivateOptimizer:
    """Two private steps as the trainer makes them."""
    model = model.to(DEVICE)
    wrapped = engines.wrap(model, "book-keeping")
    parameters = list(model.parameters())
    made = torch.optim.Adam(parameters) if optimizer == "adam" else torch.optim.SGD(parameters, 0.1, momentum=0.9)
    private = PrivateOptimizer(
        made,
        wrapped.tape,
        clipping_norm=0.5,
        noise_multiplier=1.0,
        expected_batch=SIZE,
        noise=Noise(bytes(32)),
    )
    draw, loss = Draw(np.arange(len(data)), data.patients), task.of(given).loss(given, DEVICE)
    with mode:
        for _ in range(2):
            private.begin()
            batch = Batch(given, data, draw, DEVICE, np.random.default_rng(0))
            accumulate(wrapped, private, loss, batch.padded_microbatches(size))
            private.finish()
    return private


def models() -> dict[str, tuple[str, Callable[[Study], Study]]]:
    def named(name: str) -> Callable[[Study], Study]:
        return lambda given: given.model_copy(update={"model": given.model.model_copy(update={"name": name})})

    kinds = {kind: (kind, lambda given: given) for kind in KINDS}
    return {**kinds, "logistic": ("mlp", named("logistic")), "resnet18-gn": ("small-cnn", named("resnet18-gn"))}


@pytest.mark.parametrize("counts", [ONE_EACH, SEVERAL], ids=["one record each", "several records"])
@pytest.mark.parametrize("name", models())
def test_a_step_of_every_model_waits_for_nothing(no_waiting: NoWaiting, name: str, counts: list[int]) -> None:
    kind, change = models()[name]
    given = change(study(kind, class_weights=[1.0, 2.0]))
    a_step(no_waiting, build(given), given, with_owners(records(kind, sum(counts)), counts))


def test_nor_does_one_with_augmented_copies_or_adam(no_waiting: NoWaiting) -> None:
    given = study("small-cnn", augment="light", augment_multiplicity=3)
    a_step(no_waiting, build(given), given, with_owners(records("small-cnn", sum(SEVERAL)), SEVERAL), "adam")


class Words(nn.Module):
    """An embedding whose weight also gives the logits, and is looked up twice."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=padding)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.recurrent(self.embedding(places))[0].mean(1))
        return logits


class Plain(nn.Module):
    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4, padding_idx=padding), nn.Linear(4, 2)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.embedding(places)).mean(1))
        return logits


@pytest.mark.parametrize("counts", [ONE_EACH, SEVERAL], ids=["one record each", "several records"])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("model", [Words, Plain])
def test_nor_does_one_of_an_embedding_or_of_tied_weights(
    no_waiting: NoWaiting, model: type[nn.Module], padding: int | None, counts: list[int]
) -> None:
    data = with_owners(records("mlp", sum(counts)), counts)
    places = np.random.default_rng(0).integers(0, 6, (sum(counts), 5))
    a_step(no_waiting, model(padding), study(), dataclasses.replace(data, inputs=(places,)))


def test_nor_does_an_empty_one(no_waiting: NoWaiting) -> None:
    given = study()
    a_step(no_waiting, build(given), given, records("mlp", 40).select(held_back=True))


def test_nor_does_the_noise(no_waiting: NoWaiting) -> None:
    """Another thread makes a step's noise, where a dispatch mode does not see it."""
    with no_waiting:
        Noise(bytes(32)).add_to(torch.zeros(300_001, dtype=torch.float64, device=DEVICE), 1.0)


@pytest.mark.parametrize(
    "waits",
    [
        lambda there, where: there.sum().item(),
        lambda there, where: bool((there > 0).any()),
        lambda there, where: torch.nonzero(there),
        lambda there, where: torch.unique(there),
        lambda there, where: there[there > 0],
        lambda there, where: torch.masked_select(there, there > 0),
        lambda there, where: there.index_put_((there > 0,), there),
        lambda there, where: torch.repeat_interleave(there, there.long()),
        lambda there, where: torch.bincount(there.long()),
        lambda there, where: torch.isin(there, there),
        lambda there, where: there.cpu(),
        lambda there, where: torch.zeros(4).to(where),
        lambda there, where: torch.zeros(4).to(where, non_blocking=True),
        lambda there, where: there.copy_(torch.zeros(4)),
    ],
)
def test_what_waits_is_seen(no_waiting: NoWaiting, waits: Callable[[torch.Tensor, torch.device], Any]) -> None:
    there = torch.zeros(4, device=DEVICE)
    with no_waiting, pytest.raises((Waited, NotImplementedError, RuntimeError)):
        waits(there, DEVICE)


def test_a_step_that_waits_is_seen(no_waiting: NoWaiting, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = BookKeeping.backward

    def looks(self: BookKeeping, losses: torch.Tensor) -> None:
        if losses.isfinite().all():
            whole(self, losses)

    monkeypatch.setattr(BookKeeping, "backward", looks)
    given = study()
    with pytest.raises(Waited, match=r"_local_scalar_dense|is_nonzero"):
        a_step(no_waiting, build(given), given, records("mlp", 9))
