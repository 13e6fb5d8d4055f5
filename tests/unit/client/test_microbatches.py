"""A step's records in pieces: the same whether a thread prepares them ahead or not, and whatever breaks off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.training import CPU, DP, KINDS, OPEN, plan, records, run, study, with_owners

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training import trainer
from consilium_client.training.microbatches import Batch, Batches, Chunking, Microbatch
from consilium_shared.study import Study
from consilium_tasks import augmentation
from dpsgd.engines import BookKeeping

COUNTS = [1, 3, 2, 1, 6, 1, 1, 1]
CHUNKING = Chunking(4, fixed=True)


def data() -> ArrayDataset:
    return with_owners(records("small-cnn", sum(COUNTS)), COUNTS)


def given() -> Study:
    return study("small-cnn", augment="light", augment_multiplicity=2)


def draws() -> list[Draw]:
    """Of all patients, of nobody, of some, of one."""
    whole, found = data(), []
    for patients in (range(8), [], [1, 4, 5], [4]):
        parts = [np.flatnonzero(whole.patients == patient) for patient in patients]
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        found.append(Draw(chosen, np.repeat(np.arange(len(parts)), [len(part) for part in parts])))
    return found


def batches(prefetch: bool, chunking: Chunking = CHUNKING, **changes: Any) -> Batches:
    about = {"study": given(), "records": data(), "draws": draws(), "generator": np.random.default_rng(0)}
    return Batches(**{**about, **changes}, device=CPU, chunking=chunking, prefetch=prefetch)


def content(found: Iterator[Microbatch]) -> list[bytes]:
    return [b"".join(np.asarray(each).tobytes() for each in (*p.inputs, *p.targets, *p[2:])) for p in found]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer prepares ahead on the CPU too."""
    monkeypatch.setattr(trainer, "Batches", partial(Batches, prefetch=True))


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    assert not preparing()


def preparing() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("microbatches")]


# The same pieces


@pytest.mark.parametrize("fixed", [True, False])
def test_a_round_has_the_same_pieces_prepared_ahead_or_not(fixed: bool) -> None:
    chunking = Chunking(4, fixed)
    found = []
    for prefetch in (False, True):
        with batches(prefetch, chunking) as whole:
            found.append([content(b.padded_microbatches(4) if fixed else b.microbatches(4)) for b in whole])
    assert found[0] == found[1]
    assert [len(step) for step in found[0]] == [7, 0, 3, 1]


def test_images_are_moved_by_draws_in_the_order_of_the_pieces_filling_too() -> None:
    with batches(prefetch=False) as whole:
        found = [piece for batch in whole for piece in batch.padded_microbatches(4)]
    generator, images = np.random.default_rng(0), data().inputs[0]
    for piece in found:
        filled = np.zeros((len(piece.targets[0]), 1, 12, 12), dtype=np.float32)
        filled[: len(piece.records)] = images[piece.records]
        moved = augmentation.moved(torch.from_numpy(filled), *augmentation.Light().draw(len(filled), generator))
        assert torch.equal(piece.inputs[0], moved)


@pytest.mark.parametrize("prepared_ahead", [False, True])
def test_asked_for_again_in_smaller_pieces_a_steps_images_are_moved_as_before(prepared_ahead: bool) -> None:
    """Also those of the steps that follow, whenever it happened."""

    def images(again: int) -> list[torch.Tensor]:
        found = []
        with batches(prepared_ahead) as whole:
            for number, batch in enumerate(whole):
                cut = list(batch.padded_microbatches(4)) if number < again else list(batch.padded_microbatches(1))
                if number == again - 1:
                    cut = list(batch.padded_microbatches(1))
                found += [image for piece in cut for image in piece.inputs[0][: len(piece.records)]]
        return found

    expected = images(again=9)
    for again in (0, 1, 3):
        for one, other in zip(images(again), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-6)


# In the trainer


@pytest.mark.parametrize("privacy", [DP, OPEN])
@pytest.mark.parametrize("model", KINDS)
def test_a_round_is_the_same_bit_for_bit_prepared_ahead_or_not(
    model: str, privacy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = "light" if model == "small-cnn" else "none"
    asked, whole = study(model, privacy, augment=augment, expected_batch=40), records(model, 80)
    how = plan(sampling_rate=0.5) if privacy is DP else None

    def update() -> bytes:
        return run(asked, whole, how, seed=bytes(32)).update.tobytes()

    plain = update()
    monkeypatch.setattr(trainer, "Batches", partial(Batches, prefetch=True))
    assert update() == plain


def test_so_it_is_when_memory_ran_out_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole, how = study("small-cnn", DP, augment="light"), records("small-cnn", 80), plan(sampling_rate=0.5)
    trainer.check_independence(asked)  # whose passes are not counted
    backward, passes = BookKeeping.backward, []

    def short(self: BookKeeping, losses: torch.Tensor) -> None:
        passes.append(len(losses))
        backward(self, losses)
        if len(losses) > 1 and len(passes) == 4:
            raise torch.OutOfMemoryError

    def update() -> bytes:
        passes.clear()
        return run(asked, whole, how, seed=bytes(32)).update.tobytes()

    monkeypatch.setattr(BookKeeping, "backward", short)
    plain, cut = update(), list(passes)
    assert cut[:5] == [32, 32, 32, 32, 1]
    monkeypatch.setattr(trainer, "Batches", partial(Batches, prefetch=True))
    assert update() == plain
    assert passes == cut


# What breaks off


class BrokenError(Exception):
    pass


def breaks(after: int) -> Callable[..., Any]:
    calls = iter(range(after))

    def light(images: torch.Tensor, *_: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise BrokenError("this image cannot be moved")
        return images

    return light


@pytest.mark.parametrize("after", [0, 1, 6, 8])
def test_an_exception_in_preparation_comes_out_as_it_is_and_where_its_piece_is_due(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prepared_ahead in (False, True):
        monkeypatch.setattr(augmentation, "moved", breaks(after))
        seen = 0
        with pytest.raises(BrokenError, match="cannot be moved"), batches(prepared_ahead) as whole:
            for batch in whole:
                for _ in batch.padded_microbatches(4):
                    seen += 1
        assert seen == after


def test_an_exception_of_the_draws_comes_out_as_it_is(ahead: None) -> None:
    def broken() -> Iterator[Draw]:
        yield draws()[0]
        raise BrokenError("no draw")

    seen = 0
    with pytest.raises(BrokenError, match="no draw"), batches(prefetch=True, draws=broken()) as whole:
        for batch in whole:
            seen += len(list(batch.padded_microbatches(4)))
    assert seen == 7


def test_memory_that_runs_out_in_preparation_makes_the_step_begin_again(
    ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, whole, how = study(privacy=DP), records(), plan(steps_per_round=4, sampling_rate=0.5)
    copy = Batch._microbatch

    def short(self: Batch, place: Any) -> Microbatch:
        if place.rows > 1:
            raise torch.OutOfMemoryError
        return copy(self, place)

    monkeypatch.setattr(trainer, "private_rows", lambda *_: 1)
    alone = run(asked, whole, how, seed=bytes(32)).update
    monkeypatch.setattr(trainer, "private_rows", lambda *_: 32)
    monkeypatch.setattr(Batch, "_microbatch", short)
    assert np.array_equal(run(asked, whole, how, seed=bytes(32)).update, alone)


def test_a_round_that_breaks_off_leaves_nothing_running(ahead: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: BookKeeping, losses: torch.Tensor) -> None:
        assert preparing()
        raise KeyboardInterrupt

    trainer.check_independence(study(privacy=DP))
    monkeypatch.setattr(BookKeeping, "backward", broken)
    with pytest.raises(KeyboardInterrupt):
        run(study(privacy=DP), records(patients=80), plan(sampling_rate=0.9))
    assert not preparing()


def test_on_the_cpu_no_thread_prepares_anything() -> None:
    with Batches(given(), data(), draws(), CPU, np.random.default_rng(0), CHUNKING) as whole:
        for batch in whole:
            for _ in batch.padded_microbatches(4):
                assert not preparing()
