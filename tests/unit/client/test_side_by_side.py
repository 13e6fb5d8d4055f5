"""Pieces of a private step that threads compute side by side: the same bits, every piece or none, the memory tried."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.training import CPU, DP, KINDS, plan, records, study, with_owners

from consilium_client.data.dataset import ArrayDataset
from consilium_client.training import fit, steps
from consilium_client.training.fit import Fit, fitting
from consilium_client.training.rehearsal import rehearse
from consilium_client.training.trainer import TrainResult, train
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.engines import BookKeeping
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.side_by_side import BrokenOff, Order

PATIENTS = 150


@pytest.fixture(autouse=True)
def every_piece_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WORTH_S", -1.0)


class Round(NamedTuple):
    """Result of a round, and the bits of each step's sum before it is rounded: the lattice hides the order."""

    result: TrainResult
    sums: list[bytes]


def a_round(asked: Study, data: ArrayDataset, workers: int) -> Round:
    start, sums, noised = pack(to_vector(build(asked)), asked), list[bytes](), PrivateOptimizer.add_noise
    how = plan(sampling_rate=0.9, steps_per_round=3)

    def add_noise(optimizer: PrivateOptimizer) -> None:
        sums.append(optimizer._sum.numpy().tobytes())
        noised(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateOptimizer, "add_noise", add_noise)
        found = train(
            start, asked, data, how, round=1, site="north", device=CPU, seed=bytes(32), rows=32, workers=workers
        )
    return Round(found, sums)


def same(one: Round, other: Round) -> bool:
    results = one.result, other.result
    return results[0].update.tobytes() == results[1].update.tobytes() and about(one) == about(other)


def about(found: Round) -> tuple[Any, ...]:
    result = found.result
    return result.steps, result.patients, result.clipping_norm, result.diverged, found.sums


@pytest.fixture
def uneven_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Every second piece is held back between its passes and its sum; the threads in which pieces were computed."""
    whole, seen, count, lock = steps.run_passes, set[int](), iter(range(10_000)), threading.Lock()

    def run_passes(*about: Any) -> None:
        with lock:
            number = next(count)
        whole(*about)
        seen.add(threading.get_ident())
        time.sleep(0.004 * (number % 2 == 0))  # the piece after it is done first

    monkeypatch.setattr(steps, "run_passes", run_passes)
    yield seen


@pytest.mark.parametrize("adaptive", [None, {}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_has_the_same_bits_however_many_threads_compute_it(
    kind: str, adaptive: dict[str, Any] | None, uneven_threads: set[int]
) -> None:
    asked, data = study(kind, privacy=DP, adaptive_clipping=adaptive), records(kind, PATIENTS)
    alone = a_round(asked, data, 1)
    assert len(uneven_threads) == 1
    for workers in (2, 3):
        uneven_threads.clear()
        assert same(a_round(asked, data, workers), alone)
        assert len(uneven_threads) > 1


def test_patients_of_several_records_and_copies_have_the_same_bits_too() -> None:
    asked = study("small-cnn", privacy=DP, augment="light", augment_multiplicity=2, records_per_patient=40)
    data = with_owners(records("small-cnn", 180), [1] * 60 + [3] * 20 + [40, 20])
    assert same(a_round(asked, data, 3), a_round(asked, data, 1))


def test_pieces_shorter_than_a_hand_over_stay_with_the_caller(
    uneven_threads: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "WORTH_S", 1e9)
    a_round(study("mlp", privacy=DP), records("mlp", PATIENTS), 3)
    assert uneven_threads == {threading.get_ident()}


@pytest.mark.parametrize("broken", range(2, 5))
def test_a_piece_that_breaks_off_wakes_the_others_and_the_step_is_computed_one_by_one(
    broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all: one by one it works, and the sum is that of every patient."""
    asked, data = study("mlp", privacy=DP), records("mlp", PATIENTS)
    whole, lock, count = steps.run_passes, threading.Lock(), iter(range(10_000))

    def run_passes(*about: Any) -> None:
        with lock:
            number = next(count)
        if number == broken:
            raise RuntimeError("a kernel")
        whole(*about)

    monkeypatch.setattr(steps, "run_passes", run_passes)
    found = a_round(asked, data, 3)
    count = iter(range(10_000))
    again = a_round(asked, data, 1)
    assert found.result.steps == 3
    assert same(found, again)


def test_a_failure_is_the_first_one_and_not_that_others_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = study("mlp", privacy=DP)

    def run_passes(*about: Any) -> None:
        raise MemoryError("all of it")

    monkeypatch.setattr(steps, "run_passes", run_passes)
    with pytest.raises(MemoryError, match="all of it"):
        rehearse(asked, plan(), CPU, "book-keeping", 32, 3)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.integers(1, 8),
    threads=st.integers(1, 4),
    used=st.lists(st.sets(st.integers(0, 3)), min_size=8, max_size=8),
)
def test_every_total_gets_the_pieces_in_their_order_whichever_of_them_adds_to_it(
    pieces: int, threads: int, used: list[set[int]]
) -> None:
    order, added = Order(range(4)), [list[int]() for _ in range(4)]

    def piece(number: int) -> None:
        for total in sorted(used[number], key=lambda each: (each * 7 + number) % 5):
            with order.turn(number, [total]):
                added[total].append(number)
        order.end(number)

    with ThreadPoolExecutor(threads) as pool:
        for each in [pool.submit(piece, number) for number in range(pieces)]:
            each.result()
    assert added == [[number for number in range(pieces) if total in used[number]] for total in range(4)]


def test_whoever_waits_for_a_piece_that_broke_off_is_told() -> None:
    order, error = Order(["total"]), ValueError("first")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(order.end, 1)
        order.break_off(error)
        order.break_off(ValueError("second"))
        with pytest.raises(BrokenOff):
            waiting.result()
    assert order.error is error


def test_as_many_of_the_largest_pieces_as_threads_are_in_memory_at_once_before_the_charge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, most, whole, lock = set[int](), [0], BookKeeping.backward, threading.Lock()

    def backward(self: BookKeeping, losses: torch.Tensor) -> None:
        whole(self, losses)
        with lock:
            held.add(id(self.tape))
            most[0] = max(most[0], sum(not tape.empty for tape in tapes))

    tapes: list[Any] = []
    made = engines.replicas

    def replicas(*about: Any) -> Any:
        found = made(*about)
        tapes.extend(each.tape for each in found)
        return found

    monkeypatch.setattr(engines, "replicas", replicas)
    monkeypatch.setattr(BookKeeping, "backward", backward)
    rehearse(study("small-cnn", privacy=DP), plan(), CPU, "book-keeping", 32, 4)
    assert len(held) == 4
    assert most == [4]


def test_where_memory_is_short_one_thread_is_tried_before_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, tried = study("mlp", privacy=DP), []
    assert fit.threads(asked, CPU, "book-keeping") == min(torch.get_num_threads(), fit.MOST_THREADS)
    assert fit.threads(asked, CPU, "opacus") == 1
    assert fit.threads(study("mlp", privacy=DP, precision="bfloat16"), CPU, "book-keeping") == 1
    monkeypatch.setattr(fit, "threads", lambda *_: 4)

    def short(*about: Any) -> None:
        tried.append(about[-2:])
        if about[-1] > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(fit, "rehearse", short)
    assert fitting(asked, plan(), "cpu", "book-keeping") == Fit(CPU, 32, 1)
    assert tried == [(32, 4), (32, 1)]


def test_replicas_have_the_same_weights_and_tapes_and_buffers_of_their_own() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
    model.register_buffer("table", torch.ones(2))
    one, two = (each for each in engines.replicas(model, 2) if isinstance(each, BookKeeping))
    assert all(a is b for a, b in zip(one._model.parameters(), two._model.parameters(), strict=True))
    assert one.tape is not two.tape
    assert one._model.get_buffer("table") is not two._model.get_buffer("table")
    inputs = torch.from_numpy(np.eye(3, dtype=np.float32))
    with torch.no_grad():
        assert torch.equal(one(inputs), two(inputs))
