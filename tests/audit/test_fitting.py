"""Charges that are judged in blocks are judged as one by one, and in work that grows as their number does."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_audit import fitting
from consilium_audit.fitting import Fitting, Use
from consilium_shared.errors import LedgerError
from consilium_shared.privacy import composition
from consilium_shared.privacy.accountant import _SOME, Pair, _coarser, as_steps, epsilon, epsilon_of_steps, within
from consilium_shared.privacy.composition import composed_epsilon
from consilium_shared.privacy.event import DpSgdEvent, Event, GaussianEvent, NonPrivateEvent

DELTA = 1e-4
PAIRS: list[Pair] = [(0.01, 1.0), (0.1, 2.0), (1.0, 20.0), (1.0, 0.0)]


def one_by_one(uses: list[Use]) -> Use | None:
    """The rule itself: the state at each charge, against the limit that it had."""
    for place, use in enumerate(uses):
        steps: Counter[Pair] = Counter()
        for each in uses[: place + 1]:
            steps[each.pair] += each.ran if each.until <= use.line else each.charged
        if epsilon_of_steps(+steps, use.delta) > use.limit:
            return use
    return None


@st.composite
def histories(draw: st.DrawFn) -> list[Use]:
    uses, line = [], 0
    for _ in range(draw(st.integers(1, 12))):
        line += draw(st.integers(1, 3))
        charged = draw(st.sampled_from([1, 20, 300]))
        ran = draw(st.sampled_from([0, charged // 2, charged, charged]))
        until = math.inf if ran == charged and draw(st.booleans()) else line + draw(st.integers(1, 9)) + 0.5
        pair = PAIRS[draw(st.sampled_from([0, 0, 1, 1, 2, 2, 3]))]
        limit = draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, math.inf]))
        uses.append(Use(line, pair, charged, ran, until, limit, draw(st.sampled_from([DELTA, DELTA, 1e-5]))))
    return uses


@settings(max_examples=60, deadline=None)
@given(histories())
def test_blocks_of_charges_are_judged_as_one_by_one(uses: list[Use]) -> None:
    assert Fitting(uses).first_beyond(0.0) == one_by_one(uses)


@pytest.mark.parametrize("limit", [3.0, 0.05])
def test_the_work_for_different_charges_that_are_given_back_does_not_grow_with_their_square(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each charged in full for a moment, nearly all of it given back at once, no two alike."""
    composed = []

    def counting(steps: Counter[Pair], delta: float, limit: float) -> bool:
        composed.append(len(steps))
        return within(steps, delta, limit)

    monkeypatch.setattr(fitting, "within", counting)
    for number in (100, 400):
        composed.clear()
        pairs = [(round(0.001 + i * 1e-6, 7), round(3 + i * 0.001, 3)) for i in range(number)]
        uses = [Use(2 * i + 1, pair, 1000, 1, 2 * i + 2, limit, DELTA) for i, pair in enumerate(pairs)]
        Fitting(uses).first_beyond(0.0)
        assert sum(composed) <= 4 * number * math.log2(number)


def test_what_would_take_hours_is_given_up_and_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_TRY", 1e6)
    uses = [Use(i, (0.01, 1.0), 10, 0, i + 0.5, 0.01, DELTA) for i in range(1, 9)]
    with pytest.raises(LedgerError, match="cannot be told in reasonable time") as caught:
        Fitting(uses).first_beyond(0.0)
    assert caught.value.line == 1


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1.0), st.floats(0.2, 100.0), st.integers(1, 100_000)), min_size=1, max_size=2 * _SOME
    ),
    st.floats(0.01, 20.0),
    st.sampled_from([DELTA, 1e-7, 1e-2]),
)
@settings(max_examples=60, deadline=None)
def test_whether_steps_are_within_a_limit_is_what_their_epsilon_says(
    drawn: list[tuple[float, float, int]], limit: float, delta: float
) -> None:
    """The shorter ways accept nothing that the exact cost refuses, however near the limit is."""
    steps: Counter[Pair] = Counter()
    for event in (DpSgdEvent(*each) for each in drawn):
        pair, count = as_steps(event)
        steps[pair] += count
    exact = epsilon_of_steps(steps, delta)
    for bound in (limit, exact, *(exact * (1 - 10.0**-digits) for digits in (1, 2, 3, 5, 9))):
        assert within(steps, delta, bound) == (exact <= bound)


@given(st.floats(1e-9, 1.0), st.floats(0.1, 1e4), st.integers(1, 10**9), st.sampled_from([1.02, 1.3]))
def test_a_coarser_history_draws_no_seldomer_with_no_more_noise_and_no_fewer_steps(
    rate: float, noise: float, steps: int, ratio: float
) -> None:
    (q, sigma), count = as_steps(DpSgdEvent(rate, noise, steps))
    ((coarse_q, coarse_sigma, coarse_count),) = _coarser({(q, sigma): count}, ratio)
    assert q <= coarse_q and coarse_sigma <= sigma and count <= coarse_count


def test_many_different_studies_far_from_their_limits_are_judged_by_few_compositions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each by a history that costs no less, and many of them by the same one."""
    composed = []

    def counting(*arguments: Any) -> float:
        composed.append(arguments)
        return composed_epsilon(*arguments)

    monkeypatch.setattr(composition, "composed_epsilon", counting)
    draw = random.Random(0)
    for _ in range(1000):
        pair, count = as_steps(DpSgdEvent(draw.uniform(0.01, 0.02), draw.uniform(2.0, 4.0), draw.randint(100, 200)))
        assert within({pair: count}, DELTA, 5.0)
    assert len(composed) < 100


def test_events_that_are_added_up_before_cost_what_they_cost() -> None:
    events: list[Event] = [DpSgdEvent(0.01, 1.0, 30), GaussianEvent(8.0), DpSgdEvent(0.01, 1.0, 12)]
    steps: Counter[Pair] = Counter()
    for event in events:
        pair, count = as_steps(event)
        steps[pair] += count
    assert epsilon_of_steps(steps, DELTA) == epsilon(events, DELTA) < math.inf
    assert epsilon_of_steps({**steps, as_steps(NonPrivateEvent())[0]: 1}, DELTA) == math.inf
