"""Numbers below 2^-126: zero in the passes through a model, by the one thread that makes them, and nowhere else."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.training import CPU, DP, OPEN, plan, records, run, study

from consilium_client.training import trainer
from consilium_client.training.evaluation import evaluate
from consilium_shared.metrics import Layout
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from dpsgd import engines
from dpsgd.isolation import one_thread, thread_beside, without_denormals
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

TINY = 2.0**-140


def flushed() -> bool:
    """Of the thread that asks."""
    return not bool((torch.full((64,), TINY) * torch.ones(64)).count_nonzero())


def asked_beside() -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(flushed()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such mode")
@pytest.mark.parametrize("before", [False, True])
def test_inside_they_are_zero_and_afterwards_as_they_were_also_after_an_exception(before: bool) -> None:
    torch.set_flush_denormal(before)
    try:
        with without_denormals():
            assert flushed()
            with without_denormals():
                pass
            assert flushed()
        assert flushed() == before
        with pytest.raises(KeyError), without_denormals():
            raise KeyError
        assert flushed() == before
    finally:
        torch.set_flush_denormal(False)


def seen(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, found: dict[str, set[bool]]) -> None:
    whole: Callable[..., Any] = getattr(owner, name)

    def looking(*args: Any, **named: Any) -> Any:
        found.setdefault(name, set()).add(flushed())
        return whole(*args, **named)

    monkeypatch.setattr(owner, name, looking)


@pytest.mark.parametrize("engine", ["book-keeping", "opacus"])
def test_a_private_round_forms_gradients_without_them_and_clips_adds_and_draws_noise_with_them(
    engine: engines.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a number could be zero in a norm and not in the sum, where torch's threads read it otherwise."""
    given = study("lstm", DP)
    found: dict[Any, Any] = {}
    trainer.check_independence(given)
    for owner, name in [
        (Tape, "record_gradients"),
        (Tape, "ratios"),
        (Tape, "add_weighted_sum"),
        (Noise, "add_to"),
        (PrivateOptimizer, "add_noise"),
    ]:
        seen(monkeypatch, owner, name, found)
    start = pack(to_vector(build(given)), given)
    trainer.train(start, given, records("lstm"), plan(), round=1, site="north", device=CPU, engine=engine)
    assert found.pop("record_gradients") == {True}
    assert found == {name: {False} for name in ("ratios", "add_weighted_sum", "add_noise", "add_to")}
    assert not flushed()


def test_a_plain_round_has_them_because_torchs_own_threads_would(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, set[bool]] = {}
    seen(monkeypatch, torch.optim.SGD, "step", found)
    seen(monkeypatch, torch.nn.LSTM, "forward", found)
    run(study("lstm", OPEN), records("lstm"))
    assert found == {"step": {False}, "forward": {False}}


def test_threads_that_begin_beside_a_step_are_not_told() -> None:
    with without_denormals():
        assert asked_beside()  # which is why no thread is begun inside
    assert not asked_beside()
    beside = thread_beside("test")
    with one_thread(), without_denormals():
        assert not beside.submit(flushed).result()
    beside.shutdown()


def test_what_a_model_says_of_a_record_is_found_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = study("lstm", OPEN)
    found: dict[Any, Any] = {}
    seen(monkeypatch, torch.nn.LSTM, "forward", found)
    data = records("lstm")
    held = dataclasses.replace(data, train=np.zeros(40, dtype=bool))
    evaluate(pack(to_vector(build(given)), given), given, held, CPU, Layout.of(given))
    assert found == {"forward": {True}}


def test_a_tiny_input_before_a_huge_gradient_is_in_the_norm_as_it_is_in_the_sum() -> None:
    """2^-127 times 2^127 is no tiny number: left out of the norm alone, it would be added to the sum unclipped."""
    weight, tape = torch.nn.Parameter(torch.zeros(2, 4)), Tape()
    inputs, deltas = torch.full((3, 5, 4), 2.0**-127), torch.full((3, 5, 2), 2.0**127)
    tape.open(RowOwners(torch.arange(3), CPU))
    with one_thread(), without_denormals():
        tape.record_factors((weight,), inputs, deltas)
    factors, total = tape.factors(1.0), torch.zeros(8, dtype=torch.float64)
    tape.add_weighted_sum(factors, {weight: total})
    assert float(torch.linalg.vector_norm(total)) == pytest.approx(3.0, rel=1e-5)
    assert float(factors.max()) == pytest.approx(1 / np.sqrt(8 * 25), rel=1e-5)
