"""Pieces of a private step side by side: threads that each have a replica of the model, and one order of adding up.

Each thread runs the passes of one piece through its own replica, on the same weights, and takes its patients' norms.
Into the total of a parameter the pieces go in their order: a piece waits until the one before it has added its part,
and meanwhile that one goes on to its next parameter. So the sum has the bits of pieces that are computed one after the
other, however many threads there are and however long each takes.

Each thread uses one core (``isolation``); the caller sets torch to one thread, and only hands out pieces meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Barrier, Condition
from typing import Generic, TypeVar

import torch

from dpsgd.engines import PerSampleModel
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.tape import MARKS

Piece = TypeVar("Piece")


class BrokenOff(Exception):
    """A piece that was not added, because another one's computation broke off."""


class Order:
    """Order in which the pieces of a step are added to each of its totals."""

    def __init__(self, totals: Iterable[object]) -> None:
        """``totals``: the parameters, and whatever else is summed."""
        self._changed = Condition()
        self._next = dict.fromkeys(totals, 0)
        self.error: BaseException | None = None
        """First that made a piece break off."""

    @contextmanager
    def turn(self, piece: int, totals: Iterable[object]) -> Iterator[None]:
        """Context in which a piece alone adds to these totals, after every earlier piece and before every later one.

        Raises:
            BrokenOff: another piece broke off.
        """
        wanted = tuple(totals)
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or all(self._next[each] == piece for each in wanted))
            if self.error is not None:
                raise BrokenOff
        yield
        with self._changed:
            self._next.update(dict.fromkeys(wanted, piece + 1))
            self._changed.notify_all()

    def end(self, piece: int) -> None:
        """Pass over the totals to which this piece adds nothing, once it is its turn."""
        with self.turn(piece, [each for each, following in self._next.items() if following <= piece]):
            pass

    def break_off(self, error: BaseException) -> None:
        """Wake all who wait; nobody adds anything any more."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()


class SideBySide(Generic[Piece]):
    """Threads that compute the pieces of a step, as many as there are replicas of its model."""

    def __init__(
        self,
        models: Sequence[PerSampleModel],
        optimizer: PrivateOptimizer,
        passes: Callable[[PerSampleModel, Piece], None],
    ) -> None:
        """
        Args:
            models: replicas on the same weights (``engines.replicas``), each with a tape of its own.
            optimizer: takes what is on the tapes.
            passes: opens a model's tape and runs a piece's forward and backward pass; called by several threads.
        """
        self._models, self._optimizer, self._passes = models, optimizer, passes
        self._totals = (*optimizer.params, MARKS)
        self._free: SimpleQueue[PerSampleModel] = SimpleQueue()
        for model in models:
            self._free.put(model)
        self._threads = ThreadPoolExecutor(
            len(models), thread_name_prefix="pieces", initializer=torch.set_num_threads, initargs=(1,)
        )

    def add(self, pieces: Iterable[Piece], *, at_once: bool = False) -> None:
        """Add the clipped gradients of a step's pieces to its sum, as ``PrivateOptimizer.accumulate`` would in turn.

        Args:
            pieces: prepared one by one, by the caller's thread, as threads become free.
            at_once: keep each piece's records until as many pieces as threads have theirs: the most memory that pieces
                can take. There must be a multiple of that number.

        Raises:
            Exception: what made a piece break off. Some of the others are in the sum (``PrivateOptimizer.forget``).
        """
        order, running = Order(self._totals), deque[Future[None]]()
        barrier = Barrier(len(self._models)) if at_once else None
        try:
            for number, piece in enumerate(pieces):
                if len(running) == len(self._models):
                    running.popleft().result()
                running.append(self._threads.submit(self._compute, number, piece, order, barrier))
            while running:
                running.popleft().result()
        except BaseException as error:
            order.break_off(error)
            if barrier is not None:
                barrier.abort()
            wait(running)
            for model in self._models:
                model.tape.close()
            if isinstance(error, Exception) and order.error is not None:
                raise order.error from None
            raise

    def _compute(self, number: int, piece: Piece, order: Order, barrier: Barrier | None) -> None:
        model = self._free.get()
        try:
            self._passes(model, piece)
            if barrier is not None:
                barrier.wait()
            self._optimizer.add_piece(model.tape, lambda totals: order.turn(number, totals))
            order.end(number)
        except BaseException as error:
            if not isinstance(error, BrokenOff):
                order.break_off(error)
            if barrier is not None:
                barrier.abort()
            raise
        finally:
            self._free.put(model)
