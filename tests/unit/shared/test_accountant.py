"""What events cost, against other accountants and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from consilium_shared.errors import BudgetRefused, ConfigurationError
from consilium_shared.privacy.accountant import calibrate_noise, check_delta, epsilon, on_grid
from consilium_shared.privacy.accountants import side_by_side
from consilium_shared.privacy.event import MOST_STEPS, DpSgdEvent, Event, GaussianEvent, NonPrivateEvent

HISTORIES = {
    "one long study": ([DpSgdEvent(0.01, 1.0, 1000)], 1e-5),
    "a small hospital": ([DpSgdEvent(0.128, 1.5, 156)], 1e-3),
    "little noise": ([DpSgdEvent(0.01, 0.5, 500)], 1e-5),
    "three studies": ([DpSgdEvent(0.05, 1.2, 100), DpSgdEvent(0.02, 0.9, 200), DpSgdEvent(0.1, 3.0, 300)], 1e-5),
}


def _opacus(mechanism: str, events: list[DpSgdEvent], delta: float) -> float:
    from opacus.accountants import create_accountant

    other = create_accountant(mechanism)
    other.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in events]
    return float(other.get_epsilon(delta))


@pytest.mark.parametrize("name", HISTORIES)
def test_agrees_with_prv_within_its_error_and_never_exceeds_rdp(name: str) -> None:
    events, delta = HISTORIES[name]
    ours, prv = epsilon(events, delta), _opacus("prv", events, delta)
    assert prv - 0.025 <= ours <= prv + 0.001  # PRV answers the upper end of an interval: its error of 0.01 either way
    assert ours <= _opacus("rdp", events, delta)


def test_agrees_with_the_closed_form_of_the_gaussian_mechanism() -> None:
    # Balle and Wang 2018, theorem 8: delta(eps) = Phi(1/2s - eps s) - exp(eps) Phi(-1/2s - eps s), s = σ / sqrt(steps)
    from scipy.stats import norm

    s = 6.0 / math.sqrt(16)
    eps = epsilon([DpSgdEvent(1.0, 6.0, 16)], 1e-5)

    def delta(value: float) -> float:
        return float(norm.cdf(0.5 / s - value * s) - math.exp(value) * norm.cdf(-0.5 / s - value * s))

    assert delta(eps) <= 1e-5 < delta(eps - 0.002)


def test_nothing_costs_nothing_and_non_private_use_costs_everything() -> None:
    assert epsilon([], 1e-5) == 0
    assert math.isinf(epsilon([DpSgdEvent(0.01, 2.0, 10), NonPrivateEvent()], 1e-5))
    assert math.isinf(epsilon([DpSgdEvent(0.01, 0.05, 1)], 1e-5)), "noise too small to bound counts as none"


def test_equal_events_compose_as_one_and_order_does_not_matter() -> None:
    a, b = DpSgdEvent(0.02, 1.1, 25), DpSgdEvent(0.05, 2.0, 10)
    assert epsilon([a] * 20, 1e-5) == epsilon([DpSgdEvent(0.02, 1.1, 500)], 1e-5)
    assert epsilon([a, b, a], 1e-5) == epsilon([b, a, a], 1e-5)
    assert epsilon([GaussianEvent(7.0)] * 3, 1e-5) == epsilon([DpSgdEvent(1.0, 7.0, 3)], 1e-5)


def test_every_further_event_costs_something() -> None:
    history: list[Event] = []
    last = 0.0
    for event in [DpSgdEvent(0.02, 1.1, 25), DpSgdEvent(0.001, 4.0, 5), DpSgdEvent(0.02, 1.1, 1)]:
        history.append(event)
        now = epsilon(history, 1e-5)
        assert now > last
        last = now


def test_a_part_of_a_history_costs_no_more_than_all_of_it_where_the_best_order_jumps() -> None:
    """Else what was reserved for a study were refused on the way to it, and an audit found a budget exceeded."""
    spent = [DpSgdEvent(0.16, 1.071, 4), DpSgdEvent(0.16, 1.575, 2), DpSgdEvent(0.1883, 3.26, 6)]
    costs = [epsilon([*spent, *[GaussianEvent(10.0)] * 4, DpSgdEvent(0.1883, 1.696, k)], 1e-3) for k in range(1, 13)]
    assert costs == sorted(costs)
    assert max(after / before for before, after in pairwise(costs)) < 1.05


def test_a_hopeless_history_is_answered_without_filling_the_memory() -> None:
    assert 1e10 < epsilon([DpSgdEvent(0.5, 0.11, 10**9)], 1e-5) < 1e11
    assert epsilon([DpSgdEvent(1.0, 0.1, MOST_STEPS)], 1e-5) > 1e13


@pytest.mark.parametrize(
    ("q", "sigma", "expected"),
    [
        (0.0128, 1.34, (0.0128, 1.34)),
        (0.0128000001, 1.3400001, (0.01281, 1.34)),
        (0.99999, 0.12345678, (1.0, 0.1234)),
        (1.0, 12.3456, (1.0, 12.345)),
        (64 / 1007, 3941.8109, (0.06356, 3941.81)),
        (5e-324, 1e300, (1e-9, 10_000.0)),
        (1e-12, 1e100, (1e-9, 10_000.0)),
    ],
)
def test_the_grid_never_flatters(q: float, sigma: float, expected: tuple[float, float]) -> None:
    assert on_grid(q, sigma) == expected
    assert on_grid(*expected) == expected


@pytest.mark.parametrize(
    ("q", "steps", "target", "delta", "spent"),
    [
        (0.0128, 500, 1.0, 1e-5, ()),
        (0.128, 500, 3.0, 1e-5, ()),
        (0.32, 50, 10.0, 1e-3, ()),
        (0.05, 200, 3.0, 1e-5, (DpSgdEvent(0.02, 1.0, 400),)),
        (1.0, 20, 2.0, 1e-5, (GaussianEvent(40.0), GaussianEvent(40.0), DpSgdEvent(0.1, 2.0, 20))),
        (0.01, 100_000, 2.0, 1e-8, ()),
    ],
)
def test_calibrated_noise_meets_the_target_and_one_percent_less_does_not(
    q: float, steps: int, target: float, delta: float, spent: tuple[Event, ...]
) -> None:
    sigma = calibrate_noise(q, steps, target, delta, spent)
    assert sigma == round(sigma, 3)
    assert epsilon([*spent, DpSgdEvent(q, sigma, steps)], delta) <= target
    assert epsilon([*spent, DpSgdEvent(q, round(sigma - 0.001, 3), steps)], delta) > target
    assert epsilon([*spent, DpSgdEvent(q, sigma * 0.99, steps)], delta) > target


def test_calibration_says_when_no_noise_is_enough() -> None:
    with pytest.raises(BudgetRefused, match="no noise is enough"):
        calibrate_noise(0.1, 100, 1.0, 1e-5, spent=[DpSgdEvent(0.1, 1.0, 100)])
    with pytest.raises(ConfigurationError, match="no privacy"):
        calibrate_noise(0.001, 1, 99.0, 1e-5)


def test_delta_must_be_below_one_over_patients() -> None:
    check_delta(0.0019, 500)
    with pytest.raises(ConfigurationError, match="500 patients"):
        check_delta(0.002, 500)
    for delta in (0.0, 1.0, -1e-5, math.nan, 1e-13):
        with pytest.raises(ConfigurationError):
            epsilon([], delta)


def test_what_hardly_ever_draws_the_patient_costs_nothing_up_to_delta() -> None:
    assert epsilon([DpSgdEvent(9e-6, 0.5, 1)], 1e-5) == 0
    assert epsilon([DpSgdEvent(9e-6, 0.5, 1), DpSgdEvent(1e-4, 0.5, 1)], 1e-5) > 0
    assert epsilon([DpSgdEvent(1e-300, 1.0, 10**6)], 0.9) == 0
    assert epsilon([DpSgdEvent(1e-300, 0.11, 10**6)], 1e-12) < math.inf


def test_other_accountants_stand_beside_ours_and_agree() -> None:
    ours, pld, renyi = side_by_side([DpSgdEvent(0.02, 1.1, 500), GaussianEvent(20.0)], 1e-5).values()
    assert ours <= pld <= ours + 0.005
    assert pld < renyi < 1.4 * pld
    assert set(side_by_side([], 1e-5).values()) == {0.0}
    assert set(side_by_side([GaussianEvent(5.0), NonPrivateEvent()], 1e-5).values()) == {math.inf}
    assert min(side_by_side([DpSgdEvent(0.5, 0.11, 10**9)], 1e-5).values()) > 1e10
