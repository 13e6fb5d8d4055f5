"""What right guesses prove: never more than a private run allows, and as much as a leaking one deserves."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from consilium_shared.errors import ConfigurationError
from consilium_shared.limits import CANARIES
from consilium_shared.privacy.canaries import (
    WAYS,
    Bounds,
    Outcome,
    compare,
    contradiction,
    lower_bound,
    needed,
    p_value,
    power,
)
from consilium_shared.privacy.event import DpSgdEvent

DELTAS = (0.0, 1e-9, 1e-5, 1e-3)


@st.composite
def outcomes(draw: Any, largest: int = 400) -> Outcome:
    m = draw(st.integers(1, largest))
    r = draw(st.integers(0, m))
    return Outcome(m, r, draw(st.integers(0, r)))


def right(epsilon: float) -> float:
    return 1 / (1 + math.exp(-epsilon))


@given(outcomes(), st.floats(0, 10))
def test_without_delta_the_p_value_is_randomised_responses_own_tail(outcome: Outcome, epsilon: float) -> None:
    expected = stats.binom.sf(outcome.correct - 1, outcome.guesses, right(epsilon))
    assert p_value(outcome, epsilon, 0.0) == pytest.approx(expected, rel=1e-9, abs=1e-290)


def test_randomised_response_of_four_bits_counted_by_hand() -> None:
    q = right(1.0)
    for v in range(5):
        told = sum(q ** sum(bits) * (1 - q) ** (4 - sum(bits)) for bits in product((0, 1), repeat=4) if sum(bits) >= v)
        assert p_value(Outcome(4, 4, v), 1.0, 0.0) == pytest.approx(told)


@given(outcomes(60), st.floats(0, 5), st.sampled_from(DELTAS))
def test_the_term_of_delta_is_the_largest_over_every_i(outcome: Outcome, epsilon: float, delta: float) -> None:
    m, r, v = outcome.canaries, outcome.guesses, outcome.correct
    told = stats.binom(r, right(epsilon))
    worst = max((told.cdf(v - 1) - told.cdf(v - i - 1)) / i for i in range(1, m + 1))
    expected = min(1.0, told.sf(v - 1) + 2 * m * delta * worst)
    assert p_value(outcome, epsilon, delta) == pytest.approx(expected, abs=1e-12)


@given(outcomes(100), st.floats(0, 4), st.sampled_from(DELTAS[1:]), st.integers(1, 100))
def test_a_run_that_gives_some_canaries_away_with_probability_delta_stays_within_the_p_value(
    outcome: Outcome, epsilon: float, delta: float, given_away: int
) -> None:
    """With probability λ it tells the coins of s random canaries, so each one's with λ s / m = δ; else it flips."""
    m, v = outcome.canaries, outcome.correct
    s = min(given_away, m)
    leaks = delta * m / s
    if leaks > 1:
        return
    q = right(epsilon)
    reached = leaks * stats.binom.sf(v - s - 1, m - s, q) + (1 - leaks) * stats.binom.sf(v - 1, m, q)
    assert p_value(Outcome(m, m, v), epsilon, delta) >= reached - 1e-12


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_of_a_private_run_is_too_high_at_most_as_often_as_it_says(epsilon: float, delta: float) -> None:
    m, q = 200, right(epsilon)
    told = (1 - delta) * q + delta
    too_high = sum(
        stats.binom.pmf(v, m, told) for v in range(m + 1) if lower_bound(Outcome(m, m, v), delta, 0.95) > epsilon
    )
    assert too_high <= 0.05 / len(WAYS)


@given(outcomes(), st.sampled_from(DELTAS))
def test_one_more_right_guess_never_proves_less(outcome: Outcome, delta: float) -> None:
    if outcome.correct < outcome.guesses:
        more = Outcome(outcome.canaries, outcome.guesses, outcome.correct + 1)
        assert lower_bound(more, delta) >= lower_bound(outcome, delta)


@given(outcomes(), st.sampled_from(DELTAS))
def test_what_is_proven_holds_at_a_smaller_delta_and_at_less_confidence(outcome: Outcome, delta: float) -> None:
    found = lower_bound(outcome, delta)
    assert lower_bound(outcome, delta / 10) >= found
    assert lower_bound(outcome, delta, 0.9) >= found


@given(outcomes())
def test_the_bound_is_the_last_epsilon_that_is_refuted(outcome: Outcome) -> None:
    found, error = lower_bound(outcome, 1e-6), 0.05 / len(WAYS)
    if found:
        assert p_value(outcome, found, 1e-6) < error <= p_value(outcome, found + 1e-3, 1e-6)
    else:
        assert p_value(outcome, 1e-3, 1e-6) >= error * 0.9


def test_coins_that_are_all_told_prove_the_logarithm_of_their_number() -> None:
    """(e^ε / (1 + e^ε))^r = error, solved for ε."""
    for r in (10, 100, 10_000):
        told = (0.05 / len(WAYS)) ** (1 / r)
        assert lower_bound(Outcome(r, r, r), 0.0) == pytest.approx(math.log(told / (1 - told)), abs=2e-4)


def test_guessing_at_random_proves_nothing() -> None:
    draw = np.random.default_rng(5)
    found = [lower_bound(Outcome(1000, 1000, int(v)), 1e-6) for v in draw.binomial(1000, 0.5, 200)]
    assert np.mean(np.array(found) > 0) <= 0.05


def test_the_measured_bound_of_a_single_gaussian_release_lies_below_its_proven_curve_and_above_nothing() -> None:
    """σ = 1, every canary in its own coordinate: the best guess is the sign of x - 1/2."""
    draw, m, r = np.random.default_rng(6), 4000, 400
    coins = draw.random(m) < 0.5
    order = np.argsort(draw.standard_normal(m) + coins)
    correct = int(coins[order[-r // 2 :]].sum() + (~coins[order[: r // 2]]).sum())
    bounds = compare(Outcome(m, r, correct), [DpSgdEvent(1.0, 1.0, 1)], 1e-5)
    assert contradiction(bounds) is None
    assert 1.0 < bounds[0].measured < bounds[0].proven


def test_a_contradiction_at_any_delta_is_found() -> None:
    fine, wrong, worse = Bounds(1e-3, 1.8, 3.0), Bounds(1e-5, 4.5, 4.2), Bounds(1e-6, 6.0, 5.0)
    assert contradiction([fine]) is None
    assert contradiction([fine, wrong, worse]) == worse


def test_every_tenth_of_delta_is_looked_at_as_far_as_the_accountant_goes() -> None:
    bounds = compare(Outcome(1000, 1000, 1000), [DpSgdEvent(1.0, 5.0, 10)], 1e-3)
    assert [round(math.log10(b.delta)) for b in bounds] == list(range(-3, -13, -1))
    assert all(a.proven <= b.proven and a.measured <= b.measured for a, b in pairwise(bounds))


@pytest.mark.parametrize(("m", "r", "v"), [(0, 0, 0), (CANARIES + 1, 1, 1), (5, 6, 1), (5, 4, 5), (5, 4, -1)])
def test_an_outcome_that_cannot_be_is_refused(m: int, r: int, v: int) -> None:
    with pytest.raises(ConfigurationError):
        Outcome(m, r, v)


def test_no_guess_proves_nothing() -> None:
    assert lower_bound(Outcome(10, 0, 0), 1e-5) == 0.0


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7])
def test_the_best_number_of_canaries_is_that_from_which_both_more_and_fewer_show_less(delta: float) -> None:
    events = [DpSgdEvent(0.05, 1.0, 50)]
    told = power(2000, events, delta)

    def margin(bounds: tuple[Bounds, ...]) -> float:
        return max(each.measured - each.proven for each in bounds)

    assert told.able and margin(told.most_of_best) >= margin(told.most)
    for other in (100, 300, 10_000):
        assert margin(power(other, events, delta).most) <= margin(told.most_of_best)
    assert power(told.best, events, delta).most == told.most_of_best


def test_at_a_large_delta_more_canaries_show_less_at_that_delta() -> None:
    everything = [lower_bound(Outcome(m, m, m), 1e-3) for m in (2_000, 5_000, 20_000, 100_000)]
    assert everything == sorted(everything, reverse=True) and everything[0] > everything[-1] + 0.1


@given(outcomes(), st.floats(0, 3), st.sampled_from(DELTAS))
def test_so_many_right_guesses_as_are_needed_prove_more_and_one_fewer_does_not(
    outcome: Outcome, epsilon: float, delta: float
) -> None:
    m, r = outcome.canaries, outcome.guesses
    least, error = needed(outcome, epsilon, delta), (1 - 0.95) / len(WAYS)
    if least is None:
        assert p_value(Outcome(m, r, r), epsilon, delta) >= error
        return
    assert p_value(Outcome(m, r, least), epsilon, delta) < error <= p_value(Outcome(m, r, least - 1), epsilon, delta)
