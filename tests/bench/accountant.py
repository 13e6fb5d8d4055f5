"""How long an ε takes, cold: 10,000 charges of few and of many different studies, and a calibration.

    python tests/bench/accountant.py

Prints seconds of processor time (the median of three, one thread) and how many times longer dp-accounting takes to
compose the same history on an interval of 1e-3, up to ten studies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from consilium_shared.privacy import accountant, composition
from consilium_shared.privacy.event import DpSgdEvent, Event, GaussianEvent

CHARGES = 10_000
DELTA = 1e-5
OTHERS_UP_TO = 10


def history(studies: int, steps: int, seed: int) -> list[Event]:
    """Charges of some studies with one evaluation release each where there are several; ε is about 5 in all."""
    draw = np.random.default_rng(seed)
    q = np.exp(draw.uniform(np.log(1e-3), np.log(0.3), studies))
    share = q * np.exp(draw.uniform(-0.7, 0.7, studies))
    sigma = np.maximum(0.6, share * np.sqrt(CHARGES * steps))
    charges: list[Event] = [
        DpSgdEvent(float(q[i % studies]), float(sigma[i % studies]), steps) for i in range(CHARGES - studies // 2)
    ]
    return [*charges, *(GaussianEvent(float(x)) for x in draw.uniform(100, 1000, studies // 2))]


def cold(task: Callable[[], object]) -> float:
    """Median seconds of processor time of a task, nothing cached."""
    taken = []
    for _ in range(3):
        accountant._kept.cache_clear()
        accountant._pair.cache_clear()
        begun = time.process_time()
        task()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


def others(events: list[Event]) -> float:
    """Seconds that dp-accounting takes, once."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    begun = time.process_time()
    other = PLDAccountant(value_discretization_interval=1e-3)
    for q, sigma, steps in accountant._grouped(e for e in events if isinstance(e, (DpSgdEvent, GaussianEvent))):
        other.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    other.get_epsilon(DELTA)
    return time.process_time() - begun


def main() -> None:
    assert composition.composed_epsilon  # imported before anything is timed
    table = Table("different studies", "steps a charge", "ε", "seconds", "dp-accounting takes")
    others(history(1, 1, 0))
    for studies in (1, 10, 100, 200, 1000, CHARGES):
        for steps in (1, 10):
            events = history(studies, steps, studies)
            seconds = cold(lambda events=events: accountant.epsilon(events, DELTA))  # type: ignore[misc]
            ratio = f"{others(events) / seconds:.0f} times" if studies <= OTHERS_UP_TO else "–"
            cost = accountant.epsilon(events, DELTA)
            table.add_row(f"{studies:,}", str(steps), f"{cost:.3f}", f"{seconds:.3f}", ratio)
    spent = [GaussianEvent(50.0), GaussianEvent(50.0), DpSgdEvent(1.0, 80.0, 20)]
    for name, task in {
        "calibrate 500 steps": lambda: accountant.calibrate_noise(0.0128, 500, 3.0, DELTA),
        "calibrate beside 3 releases": lambda: accountant.calibrate_noise(0.1, 1000, 8.0, DELTA, spent),
        "calibrate 20 releases": lambda: accountant.calibrate_noise(1.0, 20, 0.5, DELTA),
    }.items():
        table.add_row(name, "", "", f"{cold(task):.3f}", "–")
    Console().print(table)


if __name__ == "__main__":
    main()
