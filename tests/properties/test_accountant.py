"""The accountant against closed forms, others' accountants and its own promises, over random histories."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from consilium_shared.limits import SMALL_NOISE
from consilium_shared.privacy.accountant import ROUNDING, epsilon
from consilium_shared.privacy.event import DpSgdEvent, Event, GaussianEvent
from consilium_shared.privacy.loss import discretised

RENYI_ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)

rates = st.one_of(st.just(1.0), st.floats(math.log(1e-4), 0.0).map(math.exp))
noises = st.floats(math.log(0.3), math.log(50)).map(math.exp)
steps = st.floats(0, math.log(5000)).map(lambda exponent: int(math.exp(exponent)))
deltas = st.floats(-8, -3).map(lambda exponent: 10.0**exponent)
trainings = st.builds(DpSgdEvent, rates, noises, steps)
releases = st.builds(GaussianEvent, st.floats(1.0, 5000.0))
histories = st.lists(st.one_of(trainings, releases), min_size=1, max_size=5)


def random_history(draw: np.random.Generator) -> tuple[list[DpSgdEvent], float]:
    """1 to 6 studies; sampling rates and noise such that most cost something sensible."""
    history = []
    for _ in range(draw.integers(1, 7)):
        q = 1.0 if draw.random() < 0.15 else float(f"{math.exp(draw.uniform(math.log(1e-4), 0)):.3g}")
        count = int(math.exp(draw.uniform(0, math.log(5000))))
        least = max(0.3, min(40.0, q * math.sqrt(count) / 4))
        history.append(DpSgdEvent(q, round(math.exp(draw.uniform(math.log(least), math.log(50))), 3), count))
    return history, float(10 ** draw.uniform(-8, -3))


def renyi(history: list[DpSgdEvent], delta: float) -> float:
    """Opacus's Rényi accountant, at whole orders: between them its sums may fail to converge."""
    from opacus.accountants.analysis import rdp

    orders = list(RENYI_ORDERS)
    total = sum(
        rdp.compute_rdp(q=e.sampling_rate, noise_multiplier=e.noise_multiplier, steps=e.steps, orders=orders)
        for e in history
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the best order is the least or the greatest of the list
        return float(rdp.get_privacy_spent(orders=orders, rdp=total, delta=delta)[0])


def one_step_delta(q: float, sigma: float, eps: float, *, reverse: bool = False) -> float:
    """δ of one step in closed form: of removing a patient, or in ``reverse`` of adding one."""
    odds = 1 + math.expm1(-eps if reverse else eps) / q
    if odds <= 0:
        return 0.0 if reverse else -math.expm1(eps)
    x = 0.5 + sigma**2 * (eps * (-1 if reverse else 1) if q == 1 else math.log(odds))
    if reverse:
        free, drawn = ndtr(x / sigma), ndtr((x - 1) / sigma)
        return float(free - math.exp(eps) * ((1 - q) * free + q * drawn))
    return float(q * (ndtr((1 - x) / sigma) - odds * ndtr(-x / sigma)))


def test_never_exceeds_the_renyi_bound() -> None:
    draw = np.random.default_rng(1)
    for _ in range(300):
        history, delta = random_history(draw)
        assert epsilon(history, delta) <= max(0.0, renyi(history, delta)) + 1e-6, (history, delta)


def test_agrees_with_prv_within_its_stated_errors() -> None:
    from opacus.accountants import PRVAccountant

    draw, compared, allowed = np.random.default_rng(2), 0, 0.01
    while compared < 60:
        history, delta = random_history(draw)
        ours = epsilon(history, delta)
        if not 0.05 < ours < 8 or sum(event.steps for event in history) > 1500:
            continue
        prv = PRVAccountant()
        prv.history = [(event.noise_multiplier, event.sampling_rate, event.steps) for event in history]
        composed = prv._get_dprv(eps_error=allowed, delta_error=delta / 1000)
        lower, _, upper = composed.compute_epsilon(delta, delta / 1000, allowed)
        assert lower - 1e-6 <= ours <= upper + 1e-3, (history, delta)
        compared += 1


def test_lies_between_the_optimistic_and_the_pessimistic_estimate_of_dp_accounting() -> None:
    draw, compared = np.random.default_rng(3), 0
    while compared < 40:
        history, delta = random_history(draw)
        ours = epsilon(history, delta)
        if not 0.05 < ours < 12:
            continue
        low, high = (_dp_accounting(history, delta, pessimistic=pessimistic) for pessimistic in (False, True))
        assert low - 1e-9 <= ours <= high * (1 + 5e-4), (history, delta)
        compared += 1


def _dp_accounting(history: list[DpSgdEvent], delta: float, *, pessimistic: bool) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld

    composed: Any = None
    for event in history:
        one = pld.from_gaussian_mechanism(
            event.noise_multiplier,
            sampling_prob=event.sampling_rate,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=1e-3,
            use_connect_dots=pessimistic,
        ).self_compose(event.steps)
        composed = one if composed is None else composed.compose(one)
    return float(composed.get_epsilon_for_delta(delta))


wild_numbers = st.one_of(
    st.floats(-323, 308).map(lambda exponent: 10.0**exponent),
    st.sampled_from([5e-324, 2.2e-308, 0.1, 1.0, 1e4, 1e100, 1.7e308]),
).filter(lambda number: number > 0)
wild_events = st.one_of(
    st.builds(GaussianEvent, wild_numbers),
    st.builds(
        DpSgdEvent,
        wild_numbers.map(lambda number: min(number, 1.0)),
        st.one_of(wild_numbers, st.floats(0.1, 1e5)),
        st.integers(1, 100_000),
    ),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(wild_events, min_size=1, max_size=4), st.floats(-12, -0.01).map(lambda e: max(1e-12, 10.0**e)))
def test_wild_numbers_of_an_old_ledger_have_a_cost_that_is_not_flattered(history: list[Event], delta: float) -> None:
    cost = epsilon(history, delta)
    assert cost >= 0  # not NaN
    for event in history:
        if event.noise_multiplier < SMALL_NOISE:  # type: ignore[union-attr]
            assert math.isinf(cost)
    assert cost >= epsilon(history[:1], delta) * (1 - 1e-4)


@settings(max_examples=300, deadline=None)
@given(sigma=st.floats(math.log(SMALL_NOISE), math.log(1e4)).map(math.exp), steps=steps, delta=st.floats(-12, -0.1))
def test_is_a_thousandth_above_the_exact_gaussian_and_never_below(sigma: float, steps: int, delta: float) -> None:
    sigma, delta = max(SMALL_NOISE, float(f"{sigma:.4g}")), 10.0**delta
    sigma = max(SMALL_NOISE, round(sigma, 3))
    s = sigma / math.sqrt(steps)  # the loss's standard deviation is 1 / s

    def excess(eps: float) -> float:  # Balle and Wang 2018, theorem 8
        return float(ndtr(0.5 / s - eps * s) - math.exp(eps + log_ndtr(-0.5 / s - eps * s)) - delta)

    exact = brentq(excess, 0, 0.5 / s**2 + 40 / s, xtol=1e-13) if excess(0) > 0 else 0.0
    ours = epsilon([DpSgdEvent(1.0, sigma, steps)], delta)
    assert exact * (1 - 1e-9) - 1e-12 <= ours <= exact + 1e-3 * max(exact, 1 / s)


@settings(max_examples=100, deadline=None)
@given(q=rates, sigma=noises, delta=deltas)
def test_one_step_is_not_below_its_closed_form(q: float, sigma: float, delta: float) -> None:
    ours = epsilon([DpSgdEvent(q, sigma, 1)], delta)
    assert one_step_delta(q, sigma, ours) <= delta
    assert one_step_delta(q, sigma, ours, reverse=True) <= delta


@settings(max_examples=100, deadline=None)
@given(q=rates, sigma=noises, points=st.integers(30, 3000))
def test_the_lattice_dominates_the_true_losses_in_both_directions(q: float, sigma: float, points: int) -> None:
    h = (2 / sigma**2 + 10 / sigma) / points
    (losses,) = discretised(np.array([q]), np.array([sigma]), h, 1e-12)
    loss = (losses.first[0] + np.arange(losses.mass.shape[1])) * h
    for reverse in (False, True):
        for eps in (0.0, h / 3, h, 0.1, 0.5, 1.0, 2.5 * h):
            if reverse:
                ours = losses.lost_reversed[0] + (losses.mass[0] * np.maximum(np.exp(-loss) - math.exp(eps), 0)).sum()
            else:
                ours = losses.lost[0] + (losses.mass[0] * np.maximum(-np.expm1(eps - loss), 0)).sum()
            true = one_step_delta(q, sigma, eps, reverse=reverse)
            assert true - 1e-14 <= ours
            if abs(eps / h - round(eps / h)) < 1e-9 and round(eps / h) < losses.mass.shape[1] + losses.first[0]:
                assert ours <= true + 1e-7, "on the lattice both are the same"


@settings(max_examples=100, deadline=None)
@given(history=histories, more=st.one_of(trainings, releases), delta=deltas)
def test_more_events_are_not_cheaper(history: list[Event], more: Event, delta: float) -> None:
    assert epsilon([*history, more], delta) >= epsilon(history, delta) * (1 - ROUNDING)


@settings(max_examples=50, deadline=None)
@given(history=histories, delta=deltas, part=st.floats(0, 1), seed=st.randoms(use_true_random=False))
def test_neither_order_nor_division_into_rounds_matters(
    history: list[Event], delta: float, part: float, seed: Any
) -> None:
    divided: list[Event] = []
    for event in history:
        first = int(event.steps * part) if isinstance(event, DpSgdEvent) else 0
        if isinstance(event, DpSgdEvent) and 0 < first < event.steps:
            divided += [
                DpSgdEvent(event.sampling_rate, event.noise_multiplier, count) for count in (first, event.steps - first)
            ]
        else:
            divided.append(event)
    seed.shuffle(divided)
    assert epsilon(divided, delta) == epsilon(history, delta)


@settings(max_examples=50, deadline=None)
@given(event=trainings, other=trainings, delta=deltas)
def test_drawing_more_or_less_noise_is_not_cheaper(event: DpSgdEvent, other: DpSgdEvent, delta: float) -> None:
    worse = DpSgdEvent(
        max(event.sampling_rate, other.sampling_rate),
        min(event.noise_multiplier, other.noise_multiplier),
        max(event.steps, other.steps),
    )
    assert epsilon([worse], delta) >= max(epsilon([event], delta), epsilon([other], delta)) * (1 - ROUNDING)
